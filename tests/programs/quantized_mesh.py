"""Integer kernels split over two devices give what they give on one; prints each kind and axis that was compared."""

import functools

import jax
import numpy as np

from helpers.network import random_params
from helpers.quantized import CFG, run
from virst_jax.config import PARTS, quantized
from virst_jax.models.quantized import quantize_params
from virst_jax.models.tree import flatten
from virst_jax.parallel import sharding

for kind in ("int8", "int4"):
    cfg = quantized(CFG, kind, PARTS)
    params = quantize_params(cfg, random_params(CFG))
    for axis, sizes in {"fsdp": (2, 1), "tensor": (1, 2)}.items():
        mesh = sharding.make_mesh(1, *sizes, devices=jax.devices())
        placed = sharding.put_global(params, sharding.parameter_shardings(cfg, mesh, replicate_below=16))
        kernel = flatten(placed)["llm/layers/mlp/gate_proj/kernel"]
        assert not kernel.sharding.is_fully_replicated
        for part in ("llm", "vision"):
            with sharding.use_mesh(mesh):
                found = jax.jit(functools.partial(run, cfg, part))(placed)
            expected = run(cfg, part, params)
            # sums in another order
            np.testing.assert_allclose(found, expected, atol=1e-4 * float(abs(expected).max()))
        print(kind, axis, flush=True)
