"""Predicted time of a training step's encoders on one TPU chip.

    python -m benchmarks.training_encoders --topology v5e:1x1 --stage stage3 --samples 4

Compiles what comes before the language model (benchmarks.training_levers) and the tracker (benchmarks.training_tracker)
as a step computes it: the tracker's image encoder, and the video encoder with the projector. Both encoders are frozen,
so that only the projector and two convolutions have gradients. The chip holds their parameters whole. It needs libtpu
and no TPU (`pip install 'virst-jax[aot]'`), and takes five minutes. docs/notes/predicted_times.md has its figures.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

import train
from benchmarks import run
from benchmarks.training_levers import FIGURES, STAGES, figures
from virst_jax.config import VirstConfig
from virst_jax.parallel import sharding
from virst_jax.profiling import aot
from virst_jax.profiling.flops import step_flops
from virst_jax.training import losses, recipe
from virst_jax.training.compile_only import PREFIX_TOKENS
from virst_jax.training.optim import join
from virst_jax.training.start import StateLayout
from virst_jax.training.tasks import get_task, video_shape, visual_tokens
from virst_jax.types import PyTree

KINDS = {"stage1": "image", "stage2": "video", "stage3": "video"}  # of batch, in which frames are segmented
Sizes = dict[str, tuple[tuple[int, ...], Any]]  # shapes and dtypes of a batch's arrays
Compute = Callable[[losses.Apply, PyTree, jax.Array], PyTree]  # what is made of all parameters and a sample's array


@dataclass(frozen=True)
class Part:
    """A part of the network."""

    parameters: tuple[str, ...]
    given: str  # of a batch's arrays, the one that it reads
    compute: Callable[[VirstConfig], Compute]
    counted: tuple[str, ...]  # what flops.py calls it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:1x1")
    parser.add_argument("--stage", default="stage3", choices=STAGES)
    parser.add_argument("--samples", type=int, default=4, help="on a chip")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    args = parser.parse_args()
    report(args.topology, args.stage, args.samples, args.parts)


def report(topology: str, name: str, samples: int, parts: list[str]) -> None:
    """Compiles each part, and prints where its time goes."""
    config = STAGES[name].get_config()
    cfg, stage = train.starting_point(config)[0], recipe.stages(config)[0]
    data = next(data for data in stage.data if data.name == KINDS[name])
    task, prefix = get_task(data.batch.kind), visual_tokens(cfg, data.batch) + PREFIX_TOKENS
    shapes = task.shapes(cfg, data.batch, prefix)
    sizes: Sizes = {key: ((samples, *shape[1:]), dtype) for key, (shape, dtype) in shapes.items()}
    batch: Any = task.batch({key: jax.ShapeDtypeStruct(*size) for key, size in sizes.items()}, prefix)
    mesh = sharding.make_mesh(data=1, fsdp=1, devices=aot.topology_devices(topology)[:1])
    layout = StateLayout.of(cfg, stage, mesh)
    counted = step_flops(cfg, video_shape(batch), layout.trained).parts
    table = Table(title=f"{name}, {samples} samples a chip, {topology}", title_justify="left")
    for heading in ("", *FIGURES):
        table.add_column(heading, justify="right" if heading else "left")
    for part in parts:
        compiled = compile_part(PARTS[part], cfg, layout, sizes, mesh)
        flops = sum(counted[key].forward + counted[key].backward for key in PARTS[part].counted)
        table.add_row(part, *figures(compiled, topology, flops, 1))
    Console(width=150).print(table)


def compile_part(part: Part, cfg: VirstConfig, layout: StateLayout, sizes: Sizes, mesh: Mesh) -> Any:
    """Forward, and the gradients of what is trained."""
    compute = part.compute(cfg)

    def loss(trained: PyTree, array: jax.Array, frozen: PyTree, key: jax.Array) -> jax.Array:
        params: Any = join(trained, frozen)

        def of_sample(array: jax.Array, key: jax.Array) -> jax.Array:
            made = compute(losses.bind(cfg, params, key), params, array)
            return sum((jnp.square(x.astype(jnp.float32)).sum() for x in jax.tree.leaves(made)), jnp.zeros(()))

        return jax.vmap(of_sample)(array, jax.random.split(key, len(array))).sum()

    shape, dtype = sizes[part.given]
    whole = sharding.replicated(mesh)
    array = jax.ShapeDtypeStruct(shape, dtype, sharding=whole)
    key = jax.eval_shape(lambda: jax.random.key(0))
    trained, frozen = (
        {name: tree[name] for name in part.parameters if name in tree}
        for tree in (layout.abstract.params, layout.abstract.frozen)
    )
    step = jax.jit(jax.value_and_grad(loss))
    with sharding.use_mesh(mesh):
        return step.lower(trained, array, frozen, jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole)).compile()


def encode_frames(cfg: VirstConfig) -> Compute:
    return lambda apply, params, frames: losses.encode_alone(cfg, params, frames)


def encode_clips(cfg: VirstConfig) -> Compute:
    return lambda apply, params, clips: losses.visual_tokens(cfg, params, apply, clips, alone=True)


PARTS = {
    "image encoder": Part(("sam2",), "frames", encode_frames, ("image encoder",)),
    "video encoder": Part(("vision", "projector"), "clips", encode_clips, ("video encoder", "projector")),
}


if __name__ == "__main__":
    run(main)
