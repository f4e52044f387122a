"""Functions that a batch runs one example after another."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from virst_jax.ops import splash
from virst_jax.ops.attention import attention
from virst_jax.ops.constrain import activation_rules, constrain
from virst_jax.ops.one_at_a_time import gradient_with_value, one_at_a_time, recomputed
from virst_jax.parallel import sharding


def function(shared: Any, own: Any) -> Any:
    x, (scale, key) = own
    noise = jax.random.normal(key, (2, 4))
    return (jnp.sin(x @ shared["kernel"] + noise) * scale).sum(), {"largest": jnp.abs(x).max()}


def arguments() -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    shared = {"kernel": jnp.asarray(rng.standard_normal((3, 4)), jnp.float32)}
    keys = jax.random.split(jax.random.key(1), 5)
    fixed = (jnp.arange(5), keys)
    return shared, jnp.asarray(rng.standard_normal((5, 2, 3)), jnp.float32), fixed


def test_a_batch_runs_in_a_loop_of_one_example_each() -> None:
    shared, x, fixed = arguments()
    run = jax.vmap(one_at_a_time(function), (None, 0))
    (value, parts), (expected, others) = run(shared, (x, fixed)), jax.vmap(function, (None, 0))(shared, (x, fixed))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_array_equal(parts["largest"], others["largest"])
    shapes = str(jax.make_jaxpr(run)(shared, (x, fixed)))
    assert "scan" in shapes
    assert "f32[2,4] = dot_general" in shapes
    assert "f32[5,2,4] = dot_general" not in shapes


def test_values_that_examples_have_in_common() -> None:
    shared, x, (_, keys) = arguments()
    one = (jnp.ones(()), keys[0])
    given = jax.vmap(lambda x: one_at_a_time(function)(shared, (x, one))[0])(x)
    np.testing.assert_allclose(given, jax.vmap(lambda x: function(shared, (x, one))[0])(x), rtol=1e-6)


def test_what_is_shared_has_no_batch_axis() -> None:
    shared, x, fixed = arguments()
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 5), shared)
    with pytest.raises(ValueError, match="over what the examples share"):
        jax.vmap(one_at_a_time(function))(stacked, (x, fixed))


@pytest.mark.parametrize("in_jit", [False, True])
def test_the_gradient_is_that_of_all_examples_at_once(in_jit: bool) -> None:
    shared, x, fixed = arguments()
    alone = gradient_with_value(function)

    def total(of: Any) -> Any:
        def loss(shared: Any, x: Any) -> Any:
            values, parts = jax.vmap(of, (None, 0, 0))(shared, x, fixed)
            return (values * jnp.arange(1.0, 6)).mean(), parts

        given = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        return (jax.jit(given) if in_jit else given)(shared, x)

    (value, parts), gradients = total(alone)
    (expected, others), plain = total(lambda shared, x, fixed: function(shared, (x, fixed)))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_array_equal(parts["largest"], others["largest"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), gradients, plain)


def test_a_gradient_from_what_is_computed_again() -> None:
    """Results are arrays that another function goes on with."""
    shared, x, (scales, _) = arguments()

    def features(shared: Any, own: Any) -> Any:
        x, scale = own
        return [jnp.sin(x @ shared["kernel"]) * scale, (x @ shared["kernel"]).sum(0)]

    def total(of: Any) -> Any:
        def loss(shared: Any) -> Any:
            wide, narrow = jax.vmap(of, (None, 0))(shared, (x, scales))
            return (jnp.square(wide).sum((1, 2)) * jnp.arange(1.0, 6)).sum() + jnp.cos(narrow).sum()

        return jax.jit(jax.value_and_grad(loss))(shared)

    (value, gradient), (expected, plain) = total(recomputed(features)), total(features)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient["kernel"], plain["kernel"], rtol=1e-5, atol=1e-6)
    assert float(jnp.abs(plain["kernel"]).max()) > 0.1


def test_a_value_without_a_gradient() -> None:
    shared, x, fixed = arguments()
    fixed = jax.tree.map(lambda leaf: leaf[0], fixed)
    np.testing.assert_allclose(
        gradient_with_value(function)(shared, x[0], fixed)[0], function(shared, (x[0], fixed))[0], rtol=1e-6
    )


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 1), (2, 2, 2)], ids=str)
def test_kernels_of_examples_on_a_mesh(sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A TPU's compiler partitions no kernel: no axis of the mesh may be left to it, nor named in a constraint."""
    monkeypatch.setattr(splash, "target_platform", lambda: "tpu")
    mesh = AbstractMesh(sizes, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)

    def attend(kernel: Any, own: Any) -> Any:
        x = constrain(own[0] @ kernel, None, None, "heads", None)
        return jnp.square(attention(x, x, x, impl="splash").astype(jnp.float32)).sum(), {}

    def loss(kernel: Any, x: Any) -> Any:
        of_example = lambda x: gradient_with_value(attend)(kernel, x, None)[0]  # noqa: E731
        return jax.vmap(of_example, spmd_axis_name=sharding.BATCH_AXES)(x).sum()

    places = (NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES)))
    shapes = ((128, 128), (8, 2, 256, 4, 128))
    given = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=where) for shape, where in zip(shapes, places)]
    axes, rules = splash.sharded_over(sharding.BATCH_AXES, ("tensor",)), activation_rules(sharding.ACTIVATION_RULES)
    with jax.sharding.use_abstract_mesh(mesh), axes, rules:
        traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*given)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text
