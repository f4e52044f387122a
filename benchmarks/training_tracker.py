"""Predicted time of a training step's tracker on one TPU chip: one sample of stage 2 or 3, forward and backward.

    python -m benchmarks.training_tracker --topology v5e:1x1 --stage stage3

Compiles what follows the image encoder: anchors, tracked frames and the losses of their masks, for one video with three
expressions. Every chip holds the tracker's parameters whole, so one chip tells the time of all. It needs libtpu and no
TPU (`pip install 'virst-jax[aot]'`), and takes a quarter of an hour. docs/notes/predicted_times.md has its figures.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

import train
from benchmarks import run
from configs import stage2, stage3
from virst_jax.config import VirstConfig
from virst_jax.models.sam2.sam2 import Features, Sam2
from virst_jax.models.sam2.tracker import Tracker
from virst_jax.parallel import sharding
from virst_jax.profiling import aot, prediction
from virst_jax.profiling.flops import StepCount, StepShape
from virst_jax.training import losses, recipe
from virst_jax.training.optim import join
from virst_jax.training.start import StateLayout
from virst_jax.training.tasks import get_task
from virst_jax.types import PyTree

STAGES = {"stage2": stage2, "stage3": stage3}
PARTS = ("memory attention", "mask decoder", "memory encoder", "full-size masks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:1x1")
    parser.add_argument("--stage", default="stage3", choices=STAGES)
    args = parser.parse_args()
    report(args.topology, args.stage)


def report(topology: str, name: str) -> None:
    """Compiles, and prints where the time goes."""
    config = STAGES[name].get_config()
    cfg, stage = train.starting_point(config)[0], recipe.stages(config)[0]
    data = next(data for data in stage.data if data.name == "video")
    mesh = sharding.make_mesh(data=1, fsdp=1, devices=aot.topology_devices(topology)[:1])
    layout = StateLayout.of(cfg, stage, mesh)
    trained, frozen = ({"sam2": tree["sam2"]} for tree in (layout.abstract.params, layout.abstract.frozen))
    sizes = get_task(data.batch.kind).shapes(cfg, data.batch, 0)
    used, anchors = (sizes[key][0][1] for key in ("frames_used", "anchors"))
    objects, tokens = sizes["seg_positions"][0][1:]

    def loss(trained: PyTree, frozen: PyTree, features: Features, prompts: jax.Array, given: PyTree) -> jax.Array:
        params: Any = join(trained, frozen)
        tracker = Tracker(Sam2(cfg.sam2, cfg.compute), training=True, dropout_rng=given["key"])
        frames = (given["anchors"], given["frames_used"], given["used_valid"])
        predicted = losses.segment_frames(tracker, params, features, prompts, *frames)
        weights = given["used_valid"][:, None].astype(jnp.float32)
        parts = losses.mask_losses(cfg, tracker, predicted, given["targets"], weights)
        return parts["mask_loss"] + parts["iou_loss"] + parts["occ_loss"]

    whole = NamedSharding(mesh, PartitionSpec())
    given = {key: shape(sizes[key][0][1:], sizes[key][1], whole) for key in ("anchors", "frames_used", "used_valid")}
    given["targets"] = shape((objects, used, *[cfg.sam2.image_size] * 2), bool, whole)
    key = jax.eval_shape(lambda: jax.random.key(0, impl="rbg"))
    given["key"] = shape(key.shape, key.dtype, whole)
    prompts = shape((objects, tokens, data.batch.seg_frames, cfg.sam2.hidden_size), cfg.compute.dtype, whole)
    arguments = (trained, frozen, features_of(cfg, data.batch.seg_frames, whole), prompts, given)
    count = StepCount(cfg, 1, layout.trained)
    count.add_segmentation(StepShape(1, 1, 1, objects, 0, 0, data.batch.seg_frames, used, anchors, tokens), True)
    flops = sum(part.forward + part.backward for part in map(count.total().parts.get, PARTS) if part)
    with sharding.use_mesh(mesh):
        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 2, 3))).lower(*arguments).compile()
    memory: Any = compiled.memory_analysis()
    console = Console(width=150)
    found = prediction.predict(compiled.as_text() or "", topology, flops, 1)
    console.print(
        f"{name}, {used} frames of which {anchors} are anchors, {objects} expressions: temporaries "
        f"{memory.temp_size_in_bytes / 2**30:.1f} GiB"
    )
    prediction.print_prediction(found, 1, console, rows=24)


def shape(sizes: Any, dtype: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(sizes), dtype, sharding=sharding)


def features_of(cfg: VirstConfig, frames: int, sharding: NamedSharding) -> Features:
    """Shapes of what the image encoder gives."""
    size, width, dtype = cfg.sam2.feature_size, cfg.sam2.hidden_size, cfg.compute.dtype
    sides = (4 * size, width // 8), (2 * size, width // 4), (size, width)
    made: Any = [shape((frames, side, side, channels), dtype, sharding) for side, channels in sides]
    return Features(*made)


if __name__ == "__main__":
    run(main)
