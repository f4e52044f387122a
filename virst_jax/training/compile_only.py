"""The steps of a recipe compiled for hardware that need not be there."""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from virst_jax.config import VirstConfig
from virst_jax.errors import UserError
from virst_jax.parallel import compiler_flags, sharding
from virst_jax.profiling import aot, prediction
from virst_jax.profiling.interconnect import CHIPS, SWITCHED
from virst_jax.profiling.roofline import GPUS_OF_A_MACHINE
from virst_jax.training import recipe
from virst_jax.training.start import StateLayout
from virst_jax.training.step import TrainState, make_train_step
from virst_jax.training.tasks import check_kind, get_task, visual_tokens
from virst_jax.types import PyTree

PREFIX_TOKENS = 16  # of the prompt before the video, where no tokenizer tells


def compile_only(
    config: ConfigDict, cfg: VirstConfig, topology: str, slices: int = 1, *, predict: bool = False
) -> None:
    """Compiles the step of every stage and kind of batch, and prints what a device needs.

    Args:
      config: the recipe.
      cfg: the network.
      topology, slices: of aot.topology_devices.
      predict: compiles with full effort, and prints how long a step and the stage will take.

    Raises:
      UserError: a step does not fit, or its time cannot be predicted for this hardware.
    """
    if predict and not prediction.timed(topology):
        raise UserError(
            f"--effort=full: times are predicted for TPUs ({', '.join(CHIPS)}) and for up to {GPUS_OF_A_MACHINE} GPUs "
            f"of one machine ({', '.join(SWITCHED)}), not for {topology}"
        )
    mesh = sharding.make_mesh(**recipe.plain(config.mesh), devices=aot.topology_devices(topology, slices))
    sharding.check_mesh(cfg, mesh)
    if predict and (fault := compiler_flags.known_fault(mesh.devices.flat[0].device_kind)):
        print(fault, file=sys.stderr, flush=True)
    flags = recipe.plain(config.get("xla_flags") or {})
    compiler_flags.check(flags)
    names = {"tpu": compiler_flags.TPU, "cuda": compiler_flags.GPU, "gpu": compiler_flags.GPU}
    platform = names.get(mesh.devices.flat[0].platform, "")
    options = compiler_flags.as_options(flags.get(platform, {}), platform)
    known: dict[tuple[Any, ...], aot.Report] = {}
    for stage in recipe.stages(config):
        layout = StateLayout.of(cfg, stage, mesh)
        reports = []
        for data in stage.data:
            sharding.check_batch(data.batch.batch_size, mesh)
            check_kind(cfg, data.batch.kind)
            # stages share kinds of batch
            key = (stage.groups, stage.optim, stage.frozen, stage.frozen_weights, data.batch)
            if key not in known:
                known[key] = _compile(cfg, stage, data, layout, topology, slices, mesh, predict, options)
            reports.append((data, known[key]))
            print(f"{stage.name}, batches of kind {data.name}: {data.batch.batch_size} samples", flush=True)
            aot.print_report(known[key])
            if (step := known[key].prediction) is not None:
                prediction.print_prediction(step, data.batch.batch_size)
        if predict:
            _print_costs(stage, layout, mesh, reports)


def _compile(
    cfg: VirstConfig,
    stage: recipe.Stage,
    data: recipe.DataConfig,
    layout: StateLayout,
    topology: str,
    slices: int,
    mesh: Mesh,
    predict: bool,
    options: Mapping[str, str | bool],
) -> aot.Report:
    task = get_task(data.batch.kind)
    prefix_len = visual_tokens(cfg, data.batch) + PREFIX_TOKENS
    shapes = task.shapes(cfg, data.batch, prefix_len)
    batch = task.batch({name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}, prefix_len)
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    counted = task.count_flops(cfg, batch, layout.trained).shared_by(devices, data.batch.batch_size)
    with sharding.use_mesh(mesh):
        return aot.compile_report(
            make_train_step(cfg, stage.optim, stage.groups, task.loss, mesh_axes=sharding.BATCH_AXES),
            layout.abstract,
            batch,
            layout.shardings,
            sharding.batch_sharding(mesh),
            topology if slices == 1 else f"{topology} x {slices} slices",
            parts=_parts,
            flops=counted.model,
            quick=not predict,
            options=options,
        )


def _print_costs(
    stage: recipe.Stage,
    layout: StateLayout,
    mesh: Mesh,
    reports: Sequence[tuple[recipe.DataConfig, aot.Report]],
) -> None:
    """What the stage costs, and how it scales."""
    kinds = [(data.weight, data.batch.batch_size, report) for data, report in reports if data.weight > 0]
    steps = [(weight, samples, report.prediction) for weight, samples, report in kinds if report.prediction]
    cost = prediction.StageCost.of(stage.steps, steps)
    print(f"{stage.name}, {cost.line()}")
    if steps[0][2].is_roofline or mesh.shape["data"] > 1 or mesh.shape["tensor"] > 1:
        return  # the formula is one of TPUs, and goes from a slice whose chips share one copy of the parameters
    gradients = 4.0 * sum(math.prod(x.shape) for x in jax.tree.leaves(layout.abstract.params))
    scaled = []
    for weight, _, report in kinds:
        assert report.prediction is not None
        payload = {kind: traffic.payload for kind, traffic in report.traffic.items()}
        scaled.append((weight, prediction.weak_scaling(report.prediction, payload, mesh.shape["fsdp"], gradients)))
    prediction.print_scaling(prediction.mean_scaling(scaled), cost.samples / cost.chips)


def _parts(state: TrainState) -> dict[str, PyTree]:
    parts = {"trained parameters": state.params, "frozen parameters": state.frozen, "optimizer": state.opt_state}
    return parts if state.ema is None else {**parts, "averaged parameters": state.ema}
