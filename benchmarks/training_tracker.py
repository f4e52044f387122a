"""Predicted time of a training step's tracker on one TPU chip: one sample of stage 2 or 3, forward and backward.

    python -m benchmarks.training_tracker --topology v5e:1x1 --stage stage3

Compiles what follows the image encoder: anchors, tracked frames and the losses of their masks, for one video with three
expressions. Every chip holds the tracker's parameters whole, so one chip tells the time of all. It needs libtpu and no
TPU (`pip install 'virst-jax[aot]'`), and takes a quarter of an hour. docs/notes/predicted_times.md has its figures.

The kernels of memory attention pass over blocks of keys that no frame has filled yet, which the compiled program does
not tell. Their share is the mean over all places that the anchors can have in the video.
"""

import argparse
import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

import train
from benchmarks import run
from configs import stage2, stage3
from virst_jax.config import Sam2Config, VirstConfig
from virst_jax.models.sam2.sam2 import Features, Sam2
from virst_jax.models.sam2.tracker import Tracker
from virst_jax.ops import splash
from virst_jax.ops.dropout import hardware_key
from virst_jax.parallel import sharding
from virst_jax.profiling import aot, prediction
from virst_jax.profiling.flops import StepCount, StepShape
from virst_jax.profiling.schedule import Spent
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
        tracker = Tracker(Sam2(cfg.sam2, cfg.compute), training=True, dropout_rng=hardware_key(given["key"]))
        frames = (given["anchors"], given["frames_used"], given["used_valid"])
        predicted = losses.segment_frames(tracker, params, features, prompts, *frames)
        weights = given["used_valid"][:, None].astype(jnp.float32)
        parts = losses.mask_losses(cfg, tracker, predicted, given["targets"], weights)
        return parts["mask_loss"] + parts["iou_loss"] + parts["occ_loss"]

    whole = NamedSharding(mesh, PartitionSpec())
    given = {key: shape(sizes[key][0][1:], sizes[key][1], whole) for key in ("anchors", "frames_used", "used_valid")}
    given["targets"] = shape((objects, used, *[cfg.sam2.image_size] * 2), bool, whole)
    key = jax.eval_shape(lambda: jax.random.key(0))
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
    shares = blocks_run(cfg.sam2, used, anchors)
    found = dataclasses.replace(found, slow=passing_over(found.slow, *shares), fast=passing_over(found.fast, *shares))
    console.print(
        f"{name}, {used} frames of which {anchors} are anchors, {objects} expressions: temporaries "
        f"{memory.temp_size_in_bytes / 2**30:.1f} GiB; memory attention runs {shares[0]:.0%} of its blocks forward and "
        f"{shares[1]:.0%} backward"
    )
    prediction.print_prediction(found, 1, console, rows=24)


def keys_seen(sam: Sam2Config, frames: int, anchors: tuple[int, ...]) -> np.ndarray:
    """Keys that a video's tracked frames attend to, bool[frame, K]; anchors: their places among `frames`, rising."""
    ring, positions = sam.num_maskmem - 1, sam.feature_size**2
    pointers = (len(anchors) + sam.max_pointers - 1) * (sam.hidden_size // sam.memory_dim)
    masks = []
    for number in sorted(set(range(frames)) - set(anchors)):
        # the first anchor is there from the start, the others when they have passed
        available = {anchor for i, anchor in enumerate(anchors) if i == 0 or anchor < number}
        filled = np.zeros(ring, bool)
        for before in set(range(max(0, number - ring), number)) - available:
            filled[before % ring] = True
        memories = np.concatenate([np.arange(len(anchors)) < len(available), filled])
        # which pointers are seen changes no block: they are in the last one, with a memory or without
        masks.append(np.append(np.repeat(memories, positions), np.ones(pointers, bool)))
    return np.stack(masks)


def all_places(sam: Sam2Config, frames: int, anchors: int) -> np.ndarray:
    """The keys that tracked frames attend to, bool[N, K], for all places of the anchors together."""
    return np.concatenate([keys_seen(sam, frames, places) for places in itertools.combinations(range(frames), anchors)])


def blocks_run(sam: Sam2Config, frames: int, anchors: int) -> tuple[float, float]:
    """Shares of memory attention's blocks of keys that its kernel and that of its gradient run."""
    if frames == anchors:
        return 1.0, 1.0
    seen = all_places(sam, frames, anchors)
    block = splash.block_length(seen.shape[1])
    seen = np.pad(seen, ((0, 0), (0, -seen.shape[1] % block)))
    sizes = block, splash.gradient_block_length(seen.shape[1], block)
    forward, backward = (float(seen.reshape(len(seen), -1, size).any(2).mean()) for size in sizes)
    return forward, backward


def passing_over(spent: Spent, forward: float, backward: float) -> Spent:
    """The same step with these shares of the kernels of attention to memories."""
    found = dataclasses.replace(spent, seconds=0.0, by=Spent().by)
    for (name, category), seconds in spent.by.items():
        if category == prediction.KERNELS and "cross_attn" in name and "memory_attention" in name:
            seconds *= backward if "dkv" in name else forward
        found.add((name, category), seconds)
    return found


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
