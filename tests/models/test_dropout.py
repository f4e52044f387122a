"""Dropout is on in training only, draws anew for every key, and is off where its rate is zero."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from virst_jax.config import Compute, FusionConfig, tiny
from virst_jax.models.sam2.memory import MemoryAttention
from virst_jax.models.st_fusion import SecondFusion


def memory(rate):
    cfg = dataclasses.replace(tiny().sam2, memory_dropout=rate)
    rng = np.random.default_rng(0)
    positions = cfg.feature_size**2
    image, keys = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, positions, 64), (1, 2 * positions, 16)))
    return MemoryAttention(cfg, Compute()), (image, image, keys, keys), (None, 0)


def fusion(rate):
    rng = np.random.default_rng(0)
    hidden, maps = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, 2, 24), (1, 3, 8, 8, 32)))
    return SecondFusion(FusionConfig(num_heads=4, dropout=rate), Compute(), 32), (hidden, maps), ()


@pytest.mark.parametrize("make", [memory, fusion])
def test_dropout(make):
    module, inputs, static = make(0.1)
    params = jax.jit(lambda key, *inputs: module.init(key, *inputs, *static))(jax.random.key(0), *inputs)

    def apply(module, *deterministic):
        def run(params, key, inputs):
            return jax.tree.leaves(module.apply(params, *inputs, *static, *deterministic, rngs={"dropout": key}))[0]

        compiled = jax.jit(run)
        return lambda key: np.asarray(compiled(params, jax.random.key(key), inputs))

    train = apply(module, False)
    plain = apply(module)(0)
    one, same, other = (train(k) for k in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-3
    # what drops out is made up for: the mean stays near
    mean = np.mean([train(k) for k in range(40)], axis=0)
    assert np.abs(mean - plain).mean() < 0.35 * np.abs(one - plain).mean()
    off, *_ = make(0.0)
    np.testing.assert_array_equal(apply(off, False)(1), plain)
