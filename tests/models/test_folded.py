"""What is computed in another way on TPUs or for speed, against the plain way."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from virst_jax.config import Compute, FusionConfig, Sam2Config
from virst_jax.models import st_fusion
from virst_jax.models.sam2 import memory
from virst_jax.ops.position import axial_angles, rotate_halves, rotate_pairs

SAM = Sam2Config(image_size=128, hidden_size=16, memory_dim=8, memory_kernel=3, memory_fuser_layers=1)


def filled(module, *args):
    """Random parameters of a module."""
    shapes = nn.unbox(jax.eval_shape(lambda: module.init(jax.random.key(0), *args)))["params"]
    rng = np.random.default_rng(1)
    return {"params": jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.4, jnp.float32), shapes)}


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_memories_of_folded_masks(monkeypatch, dtype, bound):
    encoder = memory.MemoryEncoder(SAM, Compute(dtype=dtype, param_dtype="float32"))
    image, mask = normal(1, 8, 8, 16), 5 * normal(2, 128, 128)
    params = filled(encoder, image, mask)
    with jax.default_matmul_precision("highest"):
        plain = np.asarray(encoder.apply(params, image, mask), np.float32)
        monkeypatch.setattr(memory, "target_platform", lambda: "tpu")
        shapes = jax.eval_shape(lambda: encoder.init(jax.random.key(0), image, mask))["params"]
        assert jax.tree.map(jnp.shape, nn.unbox(shapes)) == jax.tree.map(jnp.shape, params["params"])
        folded = np.asarray(encoder.apply(params, image, mask), np.float32)
    # bfloat16 rounds after each of some ten operations, by 2^-9 each
    assert np.linalg.norm(folded - plain) < bound * np.linalg.norm(plain)


def test_rotation_of_pairs_taken_apart():
    angles, q, k = axial_angles(3, 4, 16, 10000.0), normal(2, 12, 2, 16), normal(2, 12, 2, 16)[::-1]
    apart = [jnp.concatenate([x[..., ::2], x[..., 1::2]], -1) for x in (q, k)]
    neighbours = jnp.einsum("bqhd,bkhd->bhqk", *(rotate_pairs(x, angles) for x in (q, k)))
    halves = jnp.einsum("bqhd,bkhd->bhqk", *(rotate_halves(x, angles) for x in apart))
    np.testing.assert_allclose(halves, neighbours, atol=2e-6 * float(jnp.abs(neighbours).max()))


@pytest.mark.parametrize("kind", [st_fusion.SecondFusion, st_fusion.InitialFusion])
def test_fusions_share_the_maps_of_a_video(kind):
    """Maps of one video for several expressions are those of the video for each of them."""
    module = kind(FusionConfig(num_heads=2), Compute(dtype="float32", param_dtype="float32"), 12)
    tokens, maps = normal(3, 2, 24), normal(1, 2, 16, 16, 12)
    params = filled(module, tokens, maps)
    shared = module.apply(params, tokens, maps)
    apart = module.apply(params, tokens, jnp.repeat(maps, 3, axis=0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), shared, apart)
