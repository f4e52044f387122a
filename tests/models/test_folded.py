"""What is computed in another way on TPUs or for speed, against the plain way."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from virst_jax.config import Compute, FusionConfig, Sam2Config, VisionConfig
from virst_jax.models import layers, st_fusion, umt
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
def test_memories_on_every_platform(monkeypatch, dtype, bound):
    """Folded masks on TPUs, planes and parts on CPUs, and convolutions as they are on GPUs."""
    encoder = memory.MemoryEncoder(SAM, Compute(dtype=dtype, param_dtype="float32"))
    image, mask = normal(1, 8, 8, 16), 5 * normal(2, 128, 128)
    params = filled(encoder, image, mask)
    made = {}
    monkeypatch.setattr(layers, "PART", 1024)
    for platform in ("gpu", "tpu", "cpu"):
        for module in (layers, memory):
            monkeypatch.setattr(module, "target_platform", lambda platform=platform: platform)
        with jax.default_matmul_precision("highest"):
            shapes = jax.eval_shape(lambda: encoder.init(jax.random.key(0), image, mask))["params"]
            assert jax.tree.map(jnp.shape, nn.unbox(shapes)) == jax.tree.map(jnp.shape, params["params"])
            made[platform] = np.asarray(jax.jit(encoder.apply)(params, image, mask), np.float32)
    for platform in ("tpu", "cpu"):
        # bfloat16 rounds after each of some ten operations, by 2^-9 each
        assert np.linalg.norm(made[platform] - made["gpu"]) < bound * np.linalg.norm(made["gpu"])


def test_planes_have_the_gradients_of_the_convolution(monkeypatch):
    encoder = memory.MemoryEncoder(SAM, Compute(dtype="float32", param_dtype="float32"))
    image, mask = normal(1, 8, 8, 16), 5 * normal(1, 128, 128)
    params = filled(encoder, image, mask)

    def gradients(platform):
        for module in (layers, memory):
            monkeypatch.setattr(module, "target_platform", lambda: platform)
        with jax.default_matmul_precision("highest"):
            return jax.jit(jax.grad(lambda p, m: (encoder.apply(p, image, m) ** 2).sum(), (0, 1)))(params, mask)

    for ours, theirs in zip(*(jax.tree.leaves(gradients(platform)) for platform in ("cpu", "gpu")), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * float(jnp.abs(theirs).max()))


def test_a_clip_is_padded_to_what_the_kernel_takes(monkeypatch):
    cfg = VisionConfig(hidden_size=16, depth=3, num_heads=2, image_size=96, pretrained_grid=6)  # 144 tokens
    encoder = umt.VideoEncoder(cfg, Compute(dtype="float32", param_dtype="float32"))
    pixels = normal(2, 4, 96, 96, 3)
    params = filled(encoder, pixels)
    with jax.default_matmul_precision("highest"):
        plain = encoder.apply(params, pixels)
        monkeypatch.setattr(umt, "target_platform", lambda: "tpu")
        monkeypatch.setattr(umt, "LANES", 74)  # two are four more than there are
        assert "[2,148,16]" in str(jax.make_jaxpr(encoder.apply)(params, pixels))
        padded = encoder.apply(params, pixels)
    np.testing.assert_allclose(padded, plain, atol=2e-6 * float(jnp.abs(plain).max()))


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
