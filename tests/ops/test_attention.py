import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import compiling
from virst_jax.errors import UserError
from virst_jax.ops import attention as module
from virst_jax.ops.attention import IMPLEMENTATIONS, attention

B, S, K, H, G, D = 2, 37, 53, 6, 2, 16

jitted = jax.jit(attention, static_argnames=("causal", "impl", "chunk", "scale"))


@pytest.fixture(autouse=True)
def exact_and_in_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "KEY_BLOCK", 16)  # K keys are four blocks, the last one short
    with jax.default_matmul_precision("highest"):
        yield


def inputs(value_width: int = D, dtype: Any = jnp.float32) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    shapes = (B, S, H, D), (B, K, G, D), (B, K, G, value_width)
    return tuple(jnp.asarray(rng.standard_normal(s), dtype) for s in shapes)


def masks() -> jax.Array:
    """Row 0 sees the last keys only, so its first causal queries see none; row 1 sees some, with holes."""
    mask = np.random.default_rng(1).random((B, K)) < 0.5
    mask[0] = np.arange(K) > 20
    return jnp.asarray(mask)


def by_hand(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, positions: np.ndarray | None, scale: float
) -> np.ndarray:
    """float64, a query and a head at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, s, h in np.ndindex(*q.shape[:3]):
        group = h // (q.shape[2] // k.shape[2])
        seen = np.ones(k.shape[1], bool) if mask is None else np.asarray(mask[b])
        if positions is not None:
            seen = seen & (np.arange(k.shape[1]) <= positions[b, s])
        if seen.any():
            logits = scale * k[b, seen, group] @ q[b, s, h]
            weights = np.exp(logits - logits.max())
            out[b, s, h] = weights / weights.sum() @ v[b, seen, group]
    return out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("order", ["none", "causal", "positions"])
def test_plain_follows_the_definition(masked: bool, order: str) -> None:
    q, k, v = inputs(value_width=24)
    mask = masks() if masked else None
    default = np.tile(np.arange(S), (B, 1))
    positions = {"none": None, "causal": default, "positions": (7 * default) % K}[order]
    out = jitted(
        q,
        k,
        v,
        key_mask=mask,
        causal=order != "none",
        q_positions=jnp.asarray(positions) if order == "positions" else None,
        scale=0.3,
        impl="plain",
    )
    np.testing.assert_allclose(out, by_hand(q, k, v, mask, positions, 0.3), atol=2e-6)


def test_default_scale_is_that_of_the_width() -> None:
    q, k, v = inputs()
    np.testing.assert_allclose(jitted(q, k, v, impl="plain"), jitted(q, k, v, impl="plain", scale=0.25), atol=1e-6)


@pytest.fixture
def cudnn_by_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    """What we hand to cuDNN, computed by XLA."""
    compute = jax.nn.dot_product_attention

    def stand_in(*args: Any, implementation: str, **kwargs: Any) -> jax.Array:
        assert implementation == "cudnn"
        return compute(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(module, "_cudnn_obstacle", lambda q, v: "")
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)


@functools.partial(jax.jit, static_argnums=(4, 5))
def with_gradients(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, causal: bool, impl: str
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attention(q, k, v, key_mask=mask, causal=causal, impl=impl, chunk=8)
        return jnp.sin(out).sum(), out

    (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return out, gradients


@pytest.mark.usefixtures("cudnn_by_xla")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("impl", ["eager", "chunked", "cudnn", "splash"])
def test_implementations_agree_with_plain(impl: str, causal: bool, masked: bool) -> None:
    q, k, v = inputs(value_width=D if impl == "cudnn" else 24)
    mask = np.array(masks()) if masked else np.ones((B, K), bool)
    if masked and not causal:
        mask[0] = False
    out, gradients = with_gradients(q, k, v, mask if masked else None, causal, impl)
    # one program for all: a mask of ones is no mask
    expected, expected_gradients = with_gradients(q, k, v, mask, causal, "plain")
    np.testing.assert_allclose(out, expected, atol=2e-6)
    for one, other in zip(gradients, expected_gradients):
        np.testing.assert_allclose(one, other, atol=3e-5)
    if masked:
        blind = np.asarray(out[0, :20] if causal else out[0])
        assert (blind == 0).all()


@pytest.mark.usefixtures("cudnn_by_xla")
@pytest.mark.parametrize("impl", ["eager", "chunked", "cudnn"])
@pytest.mark.parametrize("masked", [False, True])
def test_positions_of_queries(impl: str, masked: bool) -> None:
    q, k, v = inputs()
    positions = jnp.asarray(np.random.default_rng(2).integers(-1, K, (B, S)))
    kwargs: Any = {"key_mask": masks() if masked else None, "causal": True, "q_positions": positions}
    expected = jitted(q, k, v, impl="plain", **kwargs)
    np.testing.assert_allclose(jitted(q, k, v, impl=impl, chunk=8, **kwargs), expected, atol=2e-6)
    assert np.isfinite(expected).all()


@pytest.mark.usefixtures("cudnn_by_xla")
@pytest.mark.parametrize("impl", ["eager", "chunked", "cudnn", "splash"])
def test_one_query_at_a_position(impl: str) -> None:
    q, k, v = inputs()
    kwargs: Any = {"key_mask": masks(), "causal": True, "q_positions": jnp.array([[30], [8]])}
    expected = jitted(q[:, :1], k, v, impl="plain", **kwargs)
    np.testing.assert_allclose(jitted(q[:, :1], k, v, impl=impl, **kwargs), expected, atol=2e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_blocks_that_nobody_sees_are_passed_over(causal: bool) -> None:
    q, k, v = inputs()
    mask = None if causal else jnp.broadcast_to(np.arange(K) < 32, (B, K))
    expected = jitted(q, k, v, key_mask=mask, causal=causal, impl="plain")
    hidden = jnp.asarray(np.arange(K) >= 42)[:, None, None]  # the last of four blocks of 14 keys
    k, v = jnp.where(hidden, jnp.nan, k), jnp.where(hidden, jnp.nan, v)
    np.testing.assert_allclose(jitted(q, k, v, key_mask=mask, causal=causal, impl="chunked"), expected, atol=2e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_of_gpus(causal: bool, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger ones, and no branches, also where nobody sees a block or a query sees nothing."""
    monkeypatch.setattr(module, "target_platform", lambda: "gpu")
    options: dict[str, Any] = {"key_mask": masks() if masked else None, "causal": causal}
    plain = attention(*inputs(), impl="plain", **options)
    whole = attention(*inputs(), impl="chunked", **options)
    monkeypatch.setattr(module, "GPU_KEY_BLOCK", 16)
    monkeypatch.setattr(module, "GPU_BLOCK_BUDGET", 16 * G * 8)
    text = str(jax.make_jaxpr(functools.partial(attention, impl="chunked", **options))(*inputs()))
    assert "cond[" not in text
    blocks = attention(*inputs(), impl="chunked", **options)
    for out in (whole, blocks):
        np.testing.assert_allclose(out, plain, atol=2e-6)


@pytest.mark.parametrize("impl", ["plain", "chunked", "splash"])
def test_low_precision_in_and_out_softmax_in_float32(impl: str) -> None:
    q, k, v = inputs(dtype=jnp.bfloat16)
    out = jitted(q, k, v, key_mask=masks(), causal=True, impl=impl)
    assert out.dtype == jnp.bfloat16
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    expected = jitted(*wide, key_mask=masks(), causal=True, impl="plain")
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=2e-2)


def test_a_product_sums_the_weights_on_tpus(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, n, 2, D)), jnp.bfloat16) for n in (5, 130, 130))
    seen = jnp.asarray(rng.random((2, 130)) < [[0.5], [0]])  # the second row sees nothing
    exact = attention(*(x.astype(jnp.float32) for x in (q, k, v)), key_mask=seen, impl="plain")
    before = attention(q, k, v, key_mask=seen, impl="plain").astype(jnp.float32)
    monkeypatch.setattr(module, "target_platform", lambda: "tpu")
    text = str(jax.make_jaxpr(lambda *a: attention(*a, impl="plain"))(q, k, v))
    assert f"f32[2,2,5,{D + 1}]" in text
    now = attention(q, k, v, key_mask=seen, impl="plain").astype(jnp.float32)
    assert not now[1].any()
    errors = [float(jnp.abs(x - exact).max()) for x in (before, now)]
    assert 1e-4 < errors[1] < 1.5 * errors[0] < 1e-2


@pytest.mark.parametrize("blind", [False, True])
def test_a_mask_that_is_known_when_tracing(blind: bool) -> None:
    mask = np.broadcast_to(np.arange(K) < 50, (B, K)).copy()
    mask[0] &= not blind
    found = jax.jit(lambda *x: attention(*x, key_mask=mask, impl="splash"))(*inputs())
    np.testing.assert_allclose(found, jitted(*inputs(), key_mask=jnp.asarray(mask), impl="plain"), atol=2e-6)
    assert bool(found[0].any()) != blind


def largest_array(jaxpr: Any) -> int:
    """Elements of the largest intermediate, through all inner programs."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [int(np.prod(v.aval.shape)) for v in equation.outvars]
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, jax.extend.core.ClosedJaxpr)
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                sizes.append(largest_array(inner))
    return max(sizes)


@pytest.mark.parametrize("impl", ["plain", "chunked"])
def test_only_plain_builds_the_matrix(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEY_BLOCK", 512)
    queries, keys, width = 4096, 36936, 256

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
        return attention(q, k, v, key_mask=mask, impl=impl).sum()

    arrays = [jax.ShapeDtypeStruct((1, n, 1, width), jnp.float32) for n in (queries, keys, keys)]
    mask = jax.ShapeDtypeStruct((1, keys), bool)
    for function in (loss, jax.grad(loss, (0, 1, 2))):
        largest = largest_array(jax.make_jaxpr(function)(*arrays, mask).jaxpr)
        assert largest >= keys * width
        assert (largest >= queries * keys) == (impl == "plain")
        assert impl == "plain" or largest <= module.CHUNK_BUDGET


@pytest.mark.parametrize(("queries", "keys", "heads"), [(512, 200_000, 8), (4096, 2048, 64)])
def test_long_keys_and_many_heads_shrink_the_chunk(
    queries: int, keys: int, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEY_BLOCK", 512)
    arrays = [jax.ShapeDtypeStruct((1, n, heads, 8), jnp.float32) for n in (queries, keys, keys)]
    largest = largest_array(jax.make_jaxpr(lambda *a: attention(*a, impl="chunked"))(*arrays).jaxpr)
    assert largest <= module.CHUNK_BUDGET < 512 * keys * heads


@pytest.mark.parametrize(
    ("platform", "size", "dtype", "causal", "expected"),
    [
        ("cpu", 64, jnp.float32, False, "plain"),
        ("tpu", 64, jnp.bfloat16, False, "plain"),
        ("cpu", 4096, jnp.float32, False, "chunked"),
        ("gpu", 4096, jnp.bfloat16, False, "cudnn"),
        ("gpu", 4096, jnp.float32, False, "chunked"),
        ("gpu", 16384, jnp.bfloat16, True, "chunked"),  # a causal mask with holes would be built
        ("tpu", 4096, jnp.bfloat16, False, "splash"),
        ("tpu", 4096, jnp.float32, True, "splash"),
        ("rocm", 4096, jnp.bfloat16, False, "chunked"),
    ],
)
def test_auto(
    monkeypatch: pytest.MonkeyPatch, platform: str, size: int, dtype: Any, causal: bool, expected: str
) -> None:
    class Gpu:
        compute_capability = "8.0"

    monkeypatch.setattr(module, "target_platform", lambda: platform)
    monkeypatch.setattr(jax, "devices", lambda: [Gpu()])
    taken = []
    for name in IMPLEMENTATIONS[1:]:
        monkeypatch.setattr(module, f"_{name}", lambda q, *rest, name=name: taken.append(name) or q)
    x = jax.ShapeDtypeStruct((1, size, 2, 64), dtype)
    mask = jax.ShapeDtypeStruct((1, size), bool)
    jax.eval_shape(lambda x, m: attention(x, x, x, key_mask=m, causal=causal), x, mask)
    assert taken == [expected]


def test_positions_of_their_own_on_tpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel does not know them: the whole matrix while it is small, else blocks."""
    monkeypatch.setattr(module, "target_platform", lambda: "tpu")
    for keys, expected in ((1216, "plain"), (4096, "chunked")):
        q, k = (jax.ShapeDtypeStruct((1, n, 28, 128), jnp.bfloat16) for n in (128, keys))
        assert module._choose(q, k, k, None, True, jnp.zeros((1, 128), int)) == expected


@pytest.mark.parametrize(
    ("capability", "width", "value_width", "fits"),
    [
        ("8.0", 128, 128, True),
        ("8.0", 256, 256, False),
        ("9.0", 256, 256, True),
        ("9.0", 64, 32, False),
        ("7.5", 64, 64, False),
        ("9.0", 20, 20, False),
        ("gfx942", 64, 64, False),
    ],
)
def test_what_cudnn_takes(
    monkeypatch: pytest.MonkeyPatch, capability: str, width: int, value_width: int, fits: bool
) -> None:
    class Gpu:
        compute_capability = capability

    monkeypatch.setattr(module, "target_platform", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Gpu()])
    q, v = (jnp.zeros((1, 4, 1, w), jnp.bfloat16) for w in (width, value_width))
    assert (module._cudnn_obstacle(q, v) == "") == fits


def test_unknown_name_and_misfits_raise() -> None:
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"'flash'.*auto, plain, eager, chunked, cudnn, splash"):
        attention(q, k, v, impl="flash")
    with pytest.raises(ValueError, match="do not fit"):
        attention(q[:, :, :5], k, v)
    with pytest.raises(UserError, match=r"'splash'.*positions.*auto"):
        attention(q, k, v, causal=True, q_positions=jnp.zeros((B, S), int), impl="splash")
    if jax.default_backend() == "cpu":
        with pytest.raises(UserError, match=r"backend is cpu.*auto"):
            attention(q, k, v, impl="cudnn")


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from virst_jax.ops import attention as module
from virst_jax.ops.attention import attention
from virst_jax.ops.splash import sharded_over

mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
rng = np.random.default_rng(0)
sharding = NamedSharding(mesh, P("data", None, "tensor"))
q, k, v = (
    jax.device_put(rng.standard_normal(s).astype(np.float32), sharding)
    for s in ((2, 40, 4, 16), (2, 40, 2, 16), (2, 40, 2, 16))
)
mask = jnp.asarray(np.arange(40) < np.array([[40], [25]]))

def loss(impl, q, k, v):
    return jnp.sin(attention(q, k, v, key_mask=mask, causal=True, impl=impl)).sum()

expected = jax.jit(jax.value_and_grad(lambda *a: loss("plain", *a), (0, 1, 2)))(q, k, v)
step = lambda *a: jax.value_and_grad(lambda *a: loss("splash", *a), (0, 1, 2))(*a)
for batch, heads in ((("data",), ("tensor",)), (("data", "tensor"), ())):
    with jax.set_mesh(mesh), sharded_over(batch=batch, heads=heads):
        out = jax.block_until_ready(jax.jit(step)(q, k, v))
        # the loss is a sum of 5,120 numbers in another order
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5, rtol=1e-6), out, expected)

module.target_platform = lambda: "tpu"
module.PLAIN_LIMIT = 0
with jax.set_mesh(mesh):
    assert module._choose(q, k, v, None, True, None) == "chunked"
    with sharded_over(batch=("data",)):
        assert module._choose(q, k, v, None, True, None) == "splash"
print("passed")
"""


def test_splash_on_a_mesh() -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": compiling.flags(4)}
    done = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.endswith("passed\n"), done.stderr


@pytest.mark.parametrize("impl", ["plain", "chunked", "auto"])
def test_dropout_of_weights(impl):
    keys, rate = 64, 0.25
    q, k = jnp.zeros((2, 32, 2, 8)), jnp.zeros((2, keys, 2, 8))
    v = jnp.broadcast_to(jnp.eye(keys)[None, :, None], (2, keys, 2, keys))  # the output is the weights
    settings = {"impl": impl, "chunk": 8, "dropout": rate}
    weights = np.asarray(attention(q, k, v, rng=jax.random.key(0), **settings)) * keys
    dropped = weights == 0
    np.testing.assert_allclose(weights[~dropped], 1 / (1 - rate), rtol=1e-5)
    assert abs(dropped.mean() - rate) < 0.02
    # every row, head and chunk draws for itself
    assert len({row.tobytes() for row in dropped.reshape(-1, keys)}) == 2 * 32 * 2
    again = np.asarray(attention(q, k, v, rng=jax.random.key(0), **settings)) * keys
    np.testing.assert_array_equal(again, weights)
    np.testing.assert_allclose(attention(q, k, v, **settings) * keys, 1, rtol=1e-5)


def test_kernels_cannot_drop_weights():
    q = jnp.zeros((1, 8, 1, 8))
    with pytest.raises(UserError, match="cannot drop weights"):
        attention(q, q, q, impl="splash", dropout=0.1, rng=jax.random.key(0))
