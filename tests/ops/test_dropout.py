"""Dropout: its shares, that its numbers are independent, and that a number's fate follows from key and place alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.kernels import equations
from virst_jax.ops.dropout import drop, drop_relu, hardware_key, keep_mask

SHAPES = [(7,), (3, 5, 40), (2, 4099), (64, 1)]


def mask(seed: int, rate: float, shape: tuple[int, ...], impl: str = "threefry2x32") -> np.ndarray:
    return np.asarray(jax.jit(keep_mask, static_argnums=(1, 2))(jax.random.key(seed, impl=impl), rate, shape))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_the_share_that_is_dropped(rate: float, impl: str) -> None:
    kept = mask(0, rate, (500, 2000), impl)
    deviation = np.sqrt(rate * (1 - rate))
    assert abs(kept.mean() - (1 - rate)) < 4.5 * deviation / 1000
    for axis, count in ((0, 500), (1, 2000)):  # rows and columns alike
        assert np.abs(kept.mean(axis) - (1 - rate)).max() < 5 * deviation / np.sqrt(count)


def test_numbers_are_independent() -> None:
    """Neighbours, the four numbers of one pass of the generator, and the same place under other keys."""
    kept = mask(1, 0.5, (1000, 400)) * 2.0 - 1
    pairs = [(kept[:, :-1], kept[:, 1:]), (kept[:-1], kept[1:]), (kept, mask(2, 0.5, (1000, 400)) * 2.0 - 1)]
    pairs += [(kept[:, :100], kept[:, 100 * i : 100 * (i + 1)]) for i in (1, 2, 3)]
    for one, other in pairs:
        assert abs((one * other).mean()) < 4.5 / np.sqrt(one.size)


def test_keys_of_the_hardware_differ_as_those_that_they_come_from() -> None:
    one, other = (hardware_key(jax.random.key(seed)) for seed in (5, 6))
    kept = [
        np.asarray(keep_mask(key, 0.5, (100, 400))) * 2.0 - 1 for key in (one, other, hardware_key(jax.random.key(5)))
    ]
    np.testing.assert_array_equal(kept[0], kept[2])
    assert abs((kept[0] * kept[1]).mean()) < 4.5 / np.sqrt(kept[0].size)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_keys_and_shapes(shape: tuple[int, ...]) -> None:
    one = mask(3, 0.5, shape)
    assert one.shape == shape
    assert one.dtype == bool
    np.testing.assert_array_equal(one, mask(3, 0.5, shape))
    keys = jax.random.split(jax.random.key(4), 3)
    together = jax.vmap(lambda key: keep_mask(key, 0.5, shape))(keys)
    for key, found in zip(keys, together, strict=True):
        np.testing.assert_array_equal(found, keep_mask(key, 0.5, shape))


def test_what_is_kept_grows() -> None:
    x = jnp.arange(1.0, 4001.0).reshape(4, 1000)
    out = jax.jit(drop, static_argnums=1)(x, 0.2, jax.random.key(0))
    kept = mask(0, 0.2, x.shape)
    np.testing.assert_array_equal(out, np.where(kept, x / (1 - 0.2), 0))
    np.testing.assert_array_equal(drop(x, 0.0, jax.random.key(0)), x)
    np.testing.assert_array_equal(drop(x, 1.0, jax.random.key(0)), 0 * x)
    gradient = jax.grad(lambda x: drop(x, 0.2, jax.random.key(0)).sum())(x)
    np.testing.assert_allclose(gradient, kept / 0.8, rtol=1e-6)
    assert drop(x.astype(jnp.bfloat16), 0.2, jax.random.key(0)).dtype == jnp.bfloat16


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_a_share_that_rounds_to_nothing(impl: str) -> None:
    assert mask(0, 1e-7, (40, 40), impl).all()


def test_a_pass_of_the_generator_decides_four_numbers() -> None:
    program = jax.make_jaxpr(lambda key: keep_mask(key, 0.1, (8, 400)))(jax.random.key(0)).jaxpr
    passes: list[Any] = [e for e in equations(program) if e.primitive.name == "threefry2x32"]
    assert [e.outvars[0].aval.size for e in passes] == [800]


@pytest.mark.parametrize("transform", [lambda f: f, jax.checkpoint, jax.jit])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.9, 1.0])
def test_relu_and_dropout_are_those_of_one_after_the_other(rate: float, dtype: Any, transform: Any) -> None:
    rng = np.random.default_rng(0)
    x, weights = (jnp.asarray(rng.normal(size=(3, 40, 50)), dtype) for _ in range(2))
    x = x.at[0, :5].set(0)
    key = jax.random.key(1)

    def apart(x: jax.Array) -> jax.Array:
        return drop(jax.nn.relu(x), rate, key)

    def together(x: jax.Array) -> jax.Array:
        return drop_relu(x, rate, key if rate else None)

    np.testing.assert_array_equal(together(x), apart(x))
    found, expected = (
        jax.grad(lambda x, f=f: (f(x) * weights).astype(jnp.float32).sum())(x)
        for f in map(transform, (together, apart))
    )
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected)


def test_the_gradient_of_relu_and_dropout_keeps_no_mask() -> None:
    kept = jax.eval_shape(lambda x: jax.vjp(lambda x: drop_relu(x, 0.1, jax.random.key(0)), x)[1], jnp.ones((4, 8)))
    assert {(leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(kept)} == {((4, 8), "float32")}
