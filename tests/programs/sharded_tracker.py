"""A tracker alone on a mesh: a training step from prompts, and a session; arguments as on_meshes.py says."""

import dataclasses
from typing import Any

import jax
import numpy as np
import on_meshes
from jax.sharding import Mesh

from virst_jax.config import Compute, TrackerConfig, tiny
from virst_jax.data.prompted import BOX, POINT
from virst_jax.parallel import sharding
from virst_jax.tracking import TrackerModel
from virst_jax.training.optim import OptimConfig
from virst_jax.training.prompted import PromptedBatch, prompted_loss
from virst_jax.training.step import init_state, make_train_step

OPTIM = OptimConfig(learning_rate=1e-3, warmup_steps=1, eps=1e-2)
GROUPS = (("sam2/no_memory_position", 0.0), ("sam2/.*", 1.0))
VIDEOS, OBJECTS, FRAMES, SIDE = 4, 2, 2, 128


def config() -> TrackerConfig:
    sam2 = tiny().sam2
    hiera = dataclasses.replace(sam2.hiera, stages=(1, 1, 1, 1), global_att_blocks=(2,))
    small = dataclasses.replace(
        sam2, hiera=hiera, memory_layers=1, decoder_layers=1, memory_kernel=3, memory_fuser_layers=1, num_multimask=1
    )
    return TrackerConfig(sam2=small, compute=Compute(attention="plain"))


def make_batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIDE, :SIDE]
    centers = rng.integers(30, 98, (VIDEOS, OBJECTS, FRAMES, 2, 1, 1))
    return {
        "frames": rng.integers(256, size=(VIDEOS, FRAMES, SIDE, SIDE, 3)).astype(np.uint8),
        "targets": (y - centers[..., 0, :, :]) ** 2 + (x - centers[..., 1, :, :]) ** 2 < 400,
        "object_valid": np.ones((VIDEOS, OBJECTS), bool),
        "first": np.zeros((VIDEOS, 1), np.int32),
        "first_valid": np.ones((VIDEOS, 1), bool),
        "kinds": np.array([[POINT], [BOX], [POINT], [BOX]], np.int32),
        "corrected": np.ones((VIDEOS, 1), np.int32),
        "corrected_valid": np.array([[True], [False], [True], [True]]),
        "from_truth": np.zeros((VIDEOS, 2, 2), bool),
        "seed": np.arange(VIDEOS, dtype=np.int32),
    }


def program(mesh: Mesh) -> tuple[Any, dict[str, Any]]:
    cfg = config()
    shapes, _ = sharding.logical_axes(cfg)
    parameters = sharding.parameter_shardings(cfg, mesh, replicate_below=0)

    def begin(params: Any) -> Any:
        return init_state(cfg, OPTIM, GROUPS, params)

    shardings = sharding.state_shardings(jax.eval_shape(begin, shapes), parameters, shapes, mesh)
    step = make_train_step(cfg, OPTIM, GROUPS, prompted_loss, mesh_axes=sharding.BATCH_AXES, dropout=False)
    draw = np.random.default_rng(1)
    host = jax.tree.map(lambda x: (0.1 * draw.standard_normal(x.shape)).astype(np.float32), shapes)
    placed = sharding.put_global(host, parameters)
    values = {f"session/{name}": x for name, x in session(cfg, placed["sam2"]).items()}
    state = jax.jit(begin, out_shardings=shardings)(placed)
    batch = PromptedBatch(**sharding.global_batch(on_meshes.rows_of_process(make_batch(), mesh), mesh))
    state, metrics = jax.jit(step, out_shardings=(shardings, sharding.replicated(mesh)))(state, batch)
    jax.block_until_ready(state)
    assert bool(metrics["finite"])
    return state.params, values | {f"metric/{name}": np.asarray(value) for name, value in metrics.items()}


def session(cfg: TrackerConfig, params: Any) -> dict[str, np.ndarray]:
    """The tracker's masks of two objects, one of them corrected."""
    frames = np.random.default_rng(2).integers(256, size=(4, 60, 80, 3)).astype(np.uint8)
    made = TrackerModel(cfg.sam2, params).session(frames)
    made.add_points(1, 0, [(20, 30)])
    made.add_points(2, 1, box=(5, 5, 50, 40))
    for _ in made.propagate():
        pass
    made.add_points(1, 3, [(60, 40)], [0])
    return {f"{number}_{frame}": made.logits(number, frame) for number in (1, 2) for frame in range(4)}


if __name__ == "__main__":
    on_meshes.run(program)
