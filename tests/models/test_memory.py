"""Memory attention as TPUs compute it: memories are padded once for the kernel, and give the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.kernels import equations
from helpers.network import SMALL, random_params
from virst_jax.config import Compute
from virst_jax.models.sam2 import memory
from virst_jax.models.sam2.memory import MemoryAttention


def test_memories_are_padded_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = SMALL.sam2
    positions, pointers = cfg.feature_size**2, 4
    keys = 3 * positions + pointers
    rng = np.random.default_rng(0)
    shapes = (2, positions, cfg.hidden_size), (positions, cfg.hidden_size), *(((2, keys, cfg.memory_dim),) * 2)
    arrays = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]
    mask = jnp.asarray(rng.random((2, keys)) < 0.6)
    params = random_params(SMALL)["sam2"]["memory_attention"]
    module = MemoryAttention(cfg, Compute(attention="splash"))

    def run(arrays: list[jax.Array], mask: jax.Array | None) -> jax.Array:
        return module.apply({"params": params}, *arrays, mask, pointers)  # type: ignore[return-value]

    with jax.default_matmul_precision("highest"):
        expected = jax.jit(run)(arrays, mask), jax.jit(run)(arrays, None)
        monkeypatch.setattr(memory, "target_platform", lambda: "tpu")
        found = jax.jit(lambda *x: run(*x))(arrays, mask), jax.jit(lambda x: run(x, None))(arrays)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(other).max()))
    program = jax.make_jaxpr(lambda *x: run(*x))(arrays, mask).jaxpr
    layers = next(e for e in equations(program) if e.primitive.name == "scan")
    pads = [e for e in equations(layers.params["jaxpr"].jaxpr) if e.primitive.name == "pad"]
    assert all(e.outvars[0].aval.shape == e.invars[0].aval.shape for e in pads if e.invars[0].aval.shape[1] > positions)
