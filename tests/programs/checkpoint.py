"""Saves or restores a small state on a mesh of all devices: checkpoint.py save|restore FOLDER STEP

Prints "restored STEP SUM OF PARAMETERS".
"""

import dataclasses
import os
import sys

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from virst_jax.config import tiny
from virst_jax.io import buckets
from virst_jax.parallel import processes, sharding
from virst_jax.training.checkpoints import TrainCheckpoints
from virst_jax.training.optim import OptimConfig
from virst_jax.training.step import TrainState, init_state

what, folder, step = sys.argv[1], buckets.place(sys.argv[2]), int(sys.argv[3])
if "JAX_NUM_PROCESSES" in os.environ:
    processes.start()
mesh = sharding.make_mesh(data=1, fsdp=-1)
split = jax.sharding.NamedSharding(mesh, PartitionSpec("fsdp"))


def begin() -> TrainState:
    params = {"llm": {"kernel": jnp.arange(64.0), "bias": jnp.ones(8)}}
    state = init_state(tiny(), OptimConfig(ema=0.5), ((".*", 1.0),), params)
    return dataclasses.replace(state, step=jnp.int32(step))


abstract = jax.eval_shape(begin)
layout = jax.tree.map(lambda x: split if x.shape else sharding.replicated(mesh), abstract)
saved = TrainCheckpoints(folder)
with processes.together():
    if what == "save":
        saved.save(jax.jit(begin, out_shardings=layout)(), wait=True)
        saved.add_score(step, 0.25)
    else:
        target = jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), abstract, layout)
        latest = saved.latest_step()
        assert latest is not None
        state = saved.restore(latest, target, frozen={})
        assert saved.score(int(state.step)) == 0.25
        total = jax.jit(lambda p: p["llm"]["kernel"].sum(), out_shardings=sharding.replicated(mesh))(state.params)
        print(f"restored {int(state.step)} {float(total):.0f}", flush=True)
saved.close()
processes.barrier("end")
