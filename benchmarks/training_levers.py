"""Predicted time of a training step's language model: what samples a chip, rematerialisation and windows change.

    python -m benchmarks.training_levers --topology v5e:4x4 --samples 4 --remat full dots --gathers whole
    python -m benchmarks.training_levers --topology v5p:2x2x1 --stage stage3 --kind video

Compiles the layers of virst_7b's language model alone, forward and backward, as a stage trains them: adapters over
frozen weights, split over all chips or whole on each. `--part head` compiles its output head, whose labels are taken to
fit one piece, with its gradients, and `--part optimizer` the update of all trained parameters. It needs libtpu and no
TPU (`pip install 'virst-jax[aot]'`), and takes 3 minutes a row on two idle cores. docs/notes/predicted_times.md has its
figures.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

import train
from benchmarks import run
from configs import stage1, stage2, stage3
from virst_jax.config import REMAT, VirstConfig
from virst_jax.errors import UserError
from virst_jax.models.virst import Virst
from virst_jax.ops.cross_entropy import piece_size
from virst_jax.parallel import sharding
from virst_jax.profiling import aot, prediction
from virst_jax.profiling.flops import llm_weights, lm_head
from virst_jax.profiling.schedule import WAITING
from virst_jax.training import losses, recipe
from virst_jax.training.answers import Answers, answers_loss
from virst_jax.training.compile_only import PREFIX_TOKENS
from virst_jax.training.optim import join, make_optimizer
from virst_jax.training.start import StateLayout
from virst_jax.training.tasks import visual_tokens

STAGES = {"stage1": stage1, "stage2": stage2, "stage3": stage3}
WINDOWS = "xla_jf_spmd_threshold_for_windowed_einsum_mib"  # products of smaller weights gather them in one piece
GATHERS: dict[str, dict[str, str | bool]] = {"windows": {}, "whole": {WINDOWS: str(10**6)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--stage", default="stage1", choices=STAGES)
    parser.add_argument("--kind", default="image", choices=["image", "video", "video_text"], help="of batch")
    parser.add_argument("--part", default="layers", choices=PARTS)
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 4], help="on each chip")
    parser.add_argument("--remat", nargs="+", default=["full"], choices=REMAT)
    parser.add_argument("--frozen", nargs="+", default=["split"], choices=recipe.FROZEN, help="weights, over the chips")
    parser.add_argument(
        "--weights", nargs="+", default=["float"], choices=recipe.FROZEN_WEIGHTS, help="that are frozen"
    )
    parser.add_argument(
        "--packed", type=int, nargs="+", default=[0], help="positions of a sample's conversations together; 0: apart"
    )
    parser.add_argument("--gathers", nargs="+", default=list(GATHERS), choices=GATHERS)
    args = parser.parse_args()
    title = f"{args.part} of the language model, {args.stage}, batches of kind {args.kind}, {args.topology}"
    table = Table(title=title, title_justify="left")
    for heading in ("samples a chip", "remat", "frozen", "weights", "packed", "gathers", *FIGURES):
        table.add_column(heading, justify="right")
    for given in itertools.product(args.samples, args.remat, args.frozen, args.weights, args.packed, args.gathers):
        found = row(args.part, args.topology, args.stage, args.kind, Levers(*given))
        table.add_row(*map(str, given), *found)
    Console().print(table)


@dataclass(frozen=True)
class Levers:
    """What a row of the table changes."""

    samples: int  # on each chip
    remat: str
    frozen: str
    weights: str
    packed: int
    gathers: str


def row(part: str, topology: str, name: str, kind: str, levers: Levers) -> list[str]:
    """Compiles a part; see `figures`."""
    config = STAGES[name].get_config()
    config.model.overrides.compute.remat = levers.remat
    config[name].update(frozen=levers.frozen, frozen_weights=levers.weights)
    cfg, stage = train.starting_point(config)[0], recipe.stages(config)[0]
    data = next((data for data in stage.data if data.name == kind), None)
    if data is None:
        raise UserError(f"{name} has no batches of kind {kind}; it has {', '.join(d.name for d in stage.data)}")
    batch = dataclasses.replace(data.batch, packed_length=levers.packed)
    prefix = visual_tokens(cfg, batch) + PREFIX_TOKENS
    devices = aot.topology_devices(topology)
    mesh = sharding.make_mesh(data=1, fsdp=len(devices), devices=devices)
    sizes = Sizes(levers.samples * mesh.size, batch.conversations, batch.text_length, prefix, batch.packed_length)
    step, arguments, results, flops = PARTS[part](cfg, stage, StateLayout.of(cfg, stage, mesh), mesh, sizes)
    options = GATHERS[levers.gathers]
    with sharding.use_mesh(mesh):
        compiled = jax.jit(step, out_shardings=results).lower(*arguments).compile(compiler_options=options)
    return figures(compiled, topology, levers.samples * flops, mesh.size)


FIGURES = ("GiB", "ms", "products", "moves", "waiting", "MFU")


def figures(compiled: Any, topology: str, flops: float, chips: int) -> list[str]:
    """Temporaries, time, what it goes to, and MFU; of two figures the second takes moves at the memory's bandwidth.

    flops: of one chip.
    """
    found = prediction.predict(compiled.as_text() or "", topology, flops, chips)
    spent = (found.slow, found.fast)
    products = sum(found.slow.category(name) for name in (prediction.PRODUCTS, prediction.KERNELS))
    return [
        f"{compiled.memory_analysis().temp_size_in_bytes / 2**30:.1f}",
        " to ".join(f"{1e3 * x.seconds:.1f}" for x in spent),
        f"{1e3 * products:.1f}",
        " to ".join(f"{1e3 * x.category(prediction.MOVES):.1f}" for x in spent),
        " to ".join(f"{1e3 * sum(x.category(name) for name in WAITING):.1f}" for x in spent),
        " to ".join(f"{found.mfu(x.seconds):.0%}" for x in spent),
    ]


@dataclass(frozen=True)
class Sizes:
    """Of a batch's text."""

    batch: int
    conversations: int
    own: int  # positions of a conversation behind the prefix
    prefix: int
    packed: int  # positions of all conversations together behind the prefix; 0: own for each

    @property
    def positions(self) -> int:
        """Of an example, whose conversations share their prefix."""
        return self.prefix + (self.packed or self.conversations * self.own)


# A function to compile, its arguments, the shardings of its results, and FLOPs of a sample
Part = tuple[Callable[..., Any], tuple[Any, ...], Any, float]


def layers(cfg: VirstConfig, stage: recipe.Stage, layout: StateLayout, mesh: Mesh, sizes: Sizes) -> Part:
    """The layers, forward and backward."""
    trained = {"llm": {"layers": layout.abstract.params["llm"]["layers"]}}
    frozen = {"llm": {name: layout.abstract.frozen["llm"][name] for name in ("layers", "norm")}}

    def loss(trained: Any, frozen: Any, embeds: jax.Array, mask: Any, places: Any, rngs: jax.Array) -> jax.Array:
        params = join(trained, frozen)

        def of_example(embeds: jax.Array, mask: jax.Array, places: jax.Array | None, rng: jax.Array) -> jax.Array:
            apply = losses.bind(cfg, params, rng)
            both = apply(Virst.hidden_after_prefix, embeds, mask, sizes.prefix, deterministic=False, places=places)
            return sum((jnp.square(x.astype(jnp.float32)).sum() for x in both), jnp.zeros(()))

        return jax.vmap(of_example, spmd_axis_name=sharding.BATCH_AXES)(embeds, mask, places, rngs).mean()

    def step(trained: Any, frozen: Any, embeds: jax.Array, mask: Any, places: Any, key: jax.Array) -> Any:
        rngs = jax.random.split(key, sizes.batch)
        return jax.value_and_grad(loss, argnums=(0, 2))(trained, frozen, embeds, mask, places, rngs)

    rows = sharding.batch_sharding(mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    own = (sizes.batch, sizes.conversations, sizes.own)
    tokens = (sizes.batch, 1, sizes.positions) if sizes.packed else (*own[:2], sizes.prefix + sizes.own)
    given = (
        jax.ShapeDtypeStruct((*tokens, cfg.llm.hidden_size), cfg.compute.dtype, sharding=rows),
        jax.ShapeDtypeStruct(tokens, bool, sharding=rows),
        jax.ShapeDtypeStruct(own, jnp.int32, sharding=rows) if sizes.packed else None,
        jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh)),
    )
    split = jax.tree.map(lambda x: x.sharding, trained)
    # forward, and the gradient of what comes in: the weights are frozen
    flops = 2 * sizes.positions * llm_weights(cfg.llm)
    return step, (trained, frozen, *given), (None, (split, rows)), flops


def head(cfg: VirstConfig, stage: recipe.Stage, layout: StateLayout, mesh: Mesh, sizes: Sizes) -> Part:
    """The output head and its gradients, at the positions of a batch that have a label."""
    trained, rows = {"llm": {"lm_head": layout.abstract.params["llm"]["lm_head"]}}, sharding.batch_sharding(mesh)
    positions = sizes.positions - 1

    def loss(trained: Any, answers: Answers) -> jax.Array:
        return answers_loss(cfg, trained, answers)

    def step(trained: Any, hidden: jax.Array, target: jax.Array, weight: jax.Array) -> Any:
        given: Any = jax.value_and_grad(lambda trained, x: loss(trained, Answers(x, target, weight)), argnums=(0, 1))
        return given(trained, hidden)

    shape = (sizes.batch, positions)
    given = (
        jax.ShapeDtypeStruct((*shape, cfg.llm.hidden_size), cfg.compute.dtype, sharding=rows),
        jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows),
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows),
    )
    split = jax.tree.map(lambda x: x.sharding, trained)
    # of one piece for all samples of a chip
    flops = 3 * piece_size(positions, cfg.llm.vocab_size) * lm_head(cfg.llm) * mesh.size / sizes.batch
    return step, (trained, *given), (None, (split, rows)), flops


def optimizer(cfg: VirstConfig, stage: recipe.Stage, layout: StateLayout, mesh: Mesh, sizes: Sizes) -> Part:
    """The update of all trained parameters, which has no products."""
    update = make_optimizer(stage.optim, stage.groups)

    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = update.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, optax.tree.norm(gradients)

    params, state = layout.abstract.params, layout.abstract.opt_state
    results = (layout.shardings.params, layout.shardings.opt_state, None)
    return step, (params, state, params), results, 0.0


PARTS = {"layers": layers, "head": head, "optimizer": optimizer}


if __name__ == "__main__":
    run(main)
