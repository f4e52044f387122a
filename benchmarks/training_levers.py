"""Predicted time of a training step's language model: what samples a chip, rematerialisation and windows change.

    python -m benchmarks.training_levers --topology v5e:4x4 --samples 4 --remat full dots --gathers whole
    python -m benchmarks.training_levers --topology v5p:2x2x1 --stage stage3 --kind video

Compiles the layers of virst_7b's language model alone, forward and backward, as a stage trains them: adapters over
frozen weights, split over all chips. It needs libtpu and no TPU (`pip install 'virst-jax[aot]'`),
and takes 3 minutes a row on two idle cores. docs/notes/predicted_times.md has its figures.
"""

import argparse
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

import train
from benchmarks import run
from configs import stage1, stage2, stage3
from virst_jax.errors import UserError
from virst_jax.models.virst import Virst
from virst_jax.parallel import sharding
from virst_jax.profiling import aot, prediction
from virst_jax.profiling.flops import llm_weights
from virst_jax.training import losses, recipe
from virst_jax.training.compile_only import PREFIX_TOKENS
from virst_jax.training.optim import join
from virst_jax.training.start import StateLayout
from virst_jax.training.tasks import get_task, visual_tokens

STAGES = {"stage1": stage1, "stage2": stage2, "stage3": stage3}
WINDOWS = "xla_jf_spmd_threshold_for_windowed_einsum_mib"  # products of smaller weights gather them in one piece
GATHERS: dict[str, dict[str, str | bool]] = {"windows": {}, "whole": {WINDOWS: str(10**6)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--stage", default="stage1", choices=STAGES)
    parser.add_argument("--kind", default="image", choices=["image", "video", "video_text"], help="of batch")
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 4], help="on each chip")
    parser.add_argument("--remat", nargs="+", default=["full"], choices=["none", "full", "dots"])
    parser.add_argument("--gathers", nargs="+", default=list(GATHERS), choices=GATHERS)
    args = parser.parse_args()
    title = f"language model of {args.stage}, batches of kind {args.kind}, {args.topology}"
    table = Table(title=title, title_justify="left")
    for heading in ("samples a chip", "remat", "gathers", "GiB", "ms", "products", "moves", "waiting", "MFU"):
        table.add_column(heading, justify="right")
    for samples, remat, gathers in itertools.product(args.samples, args.remat, args.gathers):
        found = row(args.topology, args.stage, args.kind, samples, remat, GATHERS[gathers])
        table.add_row(str(samples), remat, gathers, *found)
    Console().print(table)


def row(topology: str, name: str, kind: str, samples: int, remat: str, options: dict[str, str | bool]) -> list[str]:
    """Temporaries, time, what it goes to, and MFU; of two figures the second takes moves at the memory's bandwidth."""
    config = STAGES[name].get_config()
    config.model.overrides.compute.remat = remat
    cfg, stage = train.starting_point(config)[0], recipe.stages(config)[0]
    data = next((data for data in stage.data if data.name == kind), None)
    if data is None:
        raise UserError(f"{name} has no batches of kind {kind}; it has {', '.join(d.name for d in stage.data)}")
    prefix = visual_tokens(cfg, data.batch) + PREFIX_TOKENS
    _, conversations, length = get_task(data.batch.kind).shapes(cfg, data.batch, prefix)["token_ids"][0]
    devices = aot.topology_devices(topology)
    mesh = sharding.make_mesh(data=1, fsdp=len(devices), devices=devices)
    layout = StateLayout.of(cfg, stage, mesh)
    batch, width = samples * mesh.size, cfg.llm.hidden_size
    trained = {"llm": {"layers": layout.abstract.params["llm"]["layers"]}}
    frozen = {"llm": {name: layout.abstract.frozen["llm"][name] for name in ("layers", "norm")}}

    def loss(trained: Any, frozen: Any, embeds: jax.Array, mask: jax.Array, rngs: jax.Array) -> jax.Array:
        params = join(trained, frozen)

        def of_example(embeds: jax.Array, mask: jax.Array, rng: jax.Array) -> jax.Array:
            apply = losses.bind(cfg, params, rng)
            both = apply(Virst.hidden_after_prefix, embeds, mask, prefix, deterministic=False)
            return sum((jnp.square(x.astype(jnp.float32)).sum() for x in both), jnp.zeros(()))

        return jax.vmap(of_example, spmd_axis_name=sharding.BATCH_AXES)(embeds, mask, rngs).mean()

    def step(trained: Any, frozen: Any, embeds: jax.Array, mask: jax.Array, key: jax.Array) -> Any:
        rngs = jax.random.split(key, batch)
        return jax.value_and_grad(loss, argnums=(0, 2))(trained, frozen, embeds, mask, rngs)

    rows, whole = sharding.batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    key = jax.eval_shape(lambda: jax.random.key(0))
    given = (
        jax.ShapeDtypeStruct((batch, conversations, length, width), cfg.compute.dtype, sharding=rows),
        jax.ShapeDtypeStruct((batch, conversations, length), bool, sharding=rows),
        jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole),
    )
    split = jax.tree.map(lambda x: x.sharding, trained)
    with sharding.use_mesh(mesh):
        jitted = jax.jit(step, out_shardings=(None, (split, rows)))
        compiled = jitted.lower(trained, frozen, *given).compile(compiler_options=options)
    memory: Any = compiled.memory_analysis()
    # forward, and the gradient of what comes in: the weights are frozen
    flops = 2 * samples * (prefix + conversations * (length - prefix)) * llm_weights(cfg.llm)
    found = prediction.predict(compiled.as_text() or "", topology, flops, mesh.size)
    spent = (found.slow, found.fast)
    waiting = (prediction.MEMORY, prediction.ICI)
    return [
        f"{memory.temp_size_in_bytes / 2**30:.1f}",
        " to ".join(f"{1e3 * x.seconds:.0f}" for x in spent),
        f"{1e3 * found.slow.category(prediction.PRODUCTS):.0f}",
        " to ".join(f"{1e3 * x.category(prediction.MOVES):.0f}" for x in spent),
        " to ".join(f"{1e3 * sum(x.category(name) for name in waiting):.0f}" for x in spent),
        " to ".join(f"{found.mfu(x.seconds):.0%}" for x in spent),
    ]


if __name__ == "__main__":
    run(main)
