"""A training step of the whole network on a mesh, with tracking; arguments as on_meshes.py says."""

import dataclasses
from typing import Any

import jax
import numpy as np
import on_meshes
from jax.sharding import Mesh

from virst_jax.config import Compute, VirstConfig, tiny
from virst_jax.parallel import sharding
from virst_jax.training import losses
from virst_jax.training.losses import VideoBatch
from virst_jax.training.optim import OptimConfig
from virst_jax.training.step import init_state, make_train_step

SHARED = 72
OPTIM = OptimConfig(learning_rate=1e-3, warmup_steps=1, eps=1e-2, ema=0.5)
GROUPS = (("occ_predictor/.*", 0.0), ("vision/.*", 0.0), (".*", 1.0))


def config() -> VirstConfig:
    cfg = tiny()
    hiera = dataclasses.replace(cfg.sam2.hiera, stages=(1, 1, 1, 1), global_att_blocks=(2,))
    return dataclasses.replace(
        cfg,
        llm=dataclasses.replace(cfg.llm, num_layers=2, vocab_size=1023),
        vision=dataclasses.replace(cfg.vision, depth=3, image_size=64, pretrained_grid=4),
        sam2=dataclasses.replace(
            cfg.sam2,
            hiera=hiera,
            memory_layers=1,
            decoder_layers=1,
            memory_kernel=3,
            memory_fuser_layers=1,
            num_multimask=1,
        ),
        compute=Compute(attention="plain"),
    )


def make_batch() -> dict[str, np.ndarray]:
    """Four videos, two conversations of each."""
    videos, conversations, length, frames, segs, side, image = 4, 2, 100, 3, 2, 64, 128
    rows = (videos, conversations)
    rng = np.random.default_rng(0)
    batch: dict[str, np.ndarray] = {
        "clips": rng.integers(256, size=(videos, 1, 4, side, side, 3)).astype(np.uint8),
        "token_ids": rng.integers(1000, size=(*rows, length)).astype(np.int32),
        "visual_index": np.tile(np.r_[[-1] * 8, :64, [-1] * 28].astype(np.int32), (*rows, 1)),
        "labels": np.where(np.arange(length) < 80, -100, rng.integers(1000, size=(*rows, length))).astype(np.int32),
        "mask": np.ones((*rows, length), bool),
        "seg_positions": np.tile(np.arange(90, 90 + segs, dtype=np.int32), (*rows, 1)),
        "frames": rng.integers(256, size=(videos, frames, image, image, 3)).astype(np.uint8),
        "targets": rng.random((*rows, frames, image, image)) > 0.7,
        "anchors": np.tile(np.array([0, 2], np.int32), (videos, 1)),
        "frames_used": np.tile(np.arange(frames, dtype=np.int32), (videos, 1)),
    }
    batch["token_ids"][:, :, :SHARED] = batch["token_ids"][:, :1, :SHARED]
    return batch


def program(mesh: Mesh) -> tuple[Any, dict[str, Any]]:
    cfg = config()
    shapes, _ = sharding.logical_axes(cfg)
    parameters = sharding.parameter_shardings(cfg, mesh, replicate_below=0)

    def begin(params: Any) -> Any:
        return init_state(cfg, OPTIM, GROUPS, params)

    shardings = sharding.state_shardings(jax.eval_shape(begin, shapes), parameters, shapes, mesh)
    losses.FRAME_BY_FRAME = 1  # one video after another, as with large frames
    shardings = shardings.replace(frozen=sharding.whole_over(shardings.frozen, "fsdp"))  # the others stay split
    step = make_train_step(cfg, OPTIM, GROUPS, mesh_axes=sharding.BATCH_AXES)
    draw = np.random.default_rng(1)
    host = jax.tree.map(lambda x: (0.05 * draw.standard_normal(x.shape)).astype(np.float32), shapes)
    state = jax.jit(begin, out_shardings=shardings)(sharding.put_global(host, parameters))
    local = on_meshes.rows_of_process(make_batch(), mesh)
    placed = VideoBatch(**sharding.global_batch(local, mesh), prefix_len=SHARED)
    run = jax.jit(step, out_shardings=(shardings, sharding.replicated(mesh)))
    state, metrics = run(state, placed)
    jax.block_until_ready(state)
    assert bool(metrics["finite"])
    return state.params, {f"metric/{name}": np.asarray(value) for name, value in metrics.items()}


if __name__ == "__main__":
    on_meshes.run(program)
