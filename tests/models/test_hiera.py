"""Hiera's blocks on windows against the same blocks on grids, and the layers that are written for accelerators."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from virst_jax.config import Compute, HieraConfig
from virst_jax.models import layers
from virst_jax.models.layers import gelu, layer_norm
from virst_jax.models.sam2 import hiera

COMPUTE = Compute(dtype="float32", param_dtype="float32")


def on_grids(cfg, params, x):
    """The stages' outputs with every block on the whole grid, as the release computes."""
    ends, features = np.cumsum(cfg.stages), []
    for run in hiera.block_runs(cfg):
        for i in range(run.count):
            own = params[run.name]
            own = own if run.count == 1 else jax.tree.map(lambda p, i=i: p[i], own)
            x, _ = hiera.Block(run.spec, cfg.mlp_ratio, COMPUTE).apply({"params": own}, x)
        if run.start + run.count in ends:
            features.append(x)
    return features


@pytest.mark.parametrize(
    ("side", "windows", "global_blocks"),
    [
        (64, (8, 4, 4, 2), (5,)),  # whole windows, which pooling turns into those of the next stage or into others
        (64, (8, 4, 8, 4), (3, 6)),  # global blocks first in a stage, and while it pools
        (96, (8, 4, 14, 7), (4,)),  # grids that are not whole windows, in the later stages
        (32, (4, 6, 4, 2), ()),  # grids that are smaller than a window
    ],
)
def test_windows_equal_grids(side, windows, global_blocks):
    cfg = HieraConfig(
        embed_dim=8, num_heads=1, stages=(1, 2, 3, 2), global_att_blocks=global_blocks, window_spec=windows
    )
    network = hiera.Hiera(cfg, COMPUTE)
    pixels = jnp.asarray(np.random.default_rng(0).normal(size=(2, side, side, 3)), jnp.float32)
    with jax.default_matmul_precision("highest"):
        shapes = nn.unbox(jax.eval_shape(network.init, jax.random.key(0), pixels))["params"]
        rng = np.random.default_rng(1)
        params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.2, jnp.float32), shapes)
        ours, kept = network.apply({"params": params}, pixels, mutable=["intermediates"])
        theirs = on_grids(cfg, params, kept["intermediates"]["embedded"][0])
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(b).max()))  # sums of other order


def test_parts_of_a_block_equal_the_whole(monkeypatch):
    """Windows a few at a time and, where attention is global, positions in the MLP."""
    x = jnp.asarray(np.random.default_rng(3).normal(size=(6, 4, 4, 8)), jnp.float32)
    for window, pool in ((4, False), (4, True), (0, False)):
        block = hiera.Block(hiera.BlockSpec(8, 16 if pool else 8, 2, window, pool), 4.0, COMPUTE, windows=6)
        made = {}
        for part in (10**9, 1024):
            monkeypatch.setattr(layers, "PART", part)
            params = nn.unbox(jax.jit(block.init)(jax.random.key(0), x))

            def loss(params, block=block):  # a new one, for jax keeps what it has traced
                return (block.apply(params, x)[0] ** 2).sum()

            assert ("scan" in str(jax.make_jaxpr(loss)(params))) == (part == 1024)
            made[part] = jax.jit(jax.value_and_grad(loss))(params)
        for ours, whole in zip(*(jax.tree.leaves(made[part]) for part in (1024, 10**9)), strict=True):
            np.testing.assert_allclose(ours, whole, atol=1e-5 * float(jnp.abs(whole).max()))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_windows_keep_their_axes_where_nothing_is_split(platform, monkeypatch):
    """To join a window's axes costs a TPU a copy of all windows, in every block."""
    monkeypatch.setattr(layers, "target_platform", lambda: platform)
    monkeypatch.setattr(layers, "PART", 2**10 if platform == "cpu" else 1)
    block = hiera.Block(hiera.BlockSpec(8, 8, 1, 14, False), 4.0, COMPUTE, windows=0)
    x = jax.ShapeDtypeStruct((4, 14, 14, 8), jnp.float32)
    params = nn.unbox(jax.eval_shape(block.init, jax.random.key(0), x))
    jaxpr = str(jax.make_jaxpr(block.apply)(params, x))
    assert ("f32[4,14,14,32] = dot_general" in jaxpr) == (platform == "tpu")


def test_max_pool_is_the_same_on_every_platform(monkeypatch):
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 6, 4, 3)), jnp.float32)
    here = hiera.max_pool_2x(x)
    monkeypatch.setattr(hiera, "target_platform", lambda: "tpu")
    np.testing.assert_array_equal(hiera.max_pool_2x(x), here)


def test_gelu_of_bfloat16_is_rounded_once():
    x = jnp.arange(-12, 12, 1 / 64, dtype=jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    exact = 0.5 * exact * (1 + erf(exact / np.sqrt(2)))
    np.testing.assert_allclose(np.asarray(gelu(x), np.float64), exact, rtol=2**-8, atol=1e-6)


def test_layer_norm_of_bfloat16_in_one_pass():
    """One pass over a mean that is thirty times the deviation is as near as two passes."""
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(64, 576)) + rng.normal(size=(64, 1)) * 30, jnp.bfloat16)
    norm = layer_norm(Compute(dtype="bfloat16", param_dtype="float32"), 1e-6)
    out = norm.apply(norm.init(jax.random.key(0), x), x)
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, rtol=2**-7, atol=2**-9)
