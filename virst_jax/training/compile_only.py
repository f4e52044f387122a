"""The steps of a recipe compiled for hardware that need not be there."""

import jax
from ml_collections import ConfigDict

from virst_jax.config import VirstConfig
from virst_jax.parallel import sharding
from virst_jax.profiling import aot
from virst_jax.training import recipe
from virst_jax.training.start import StateLayout
from virst_jax.training.step import TrainState, make_train_step
from virst_jax.training.tasks import get_task, visual_tokens
from virst_jax.types import PyTree

PREFIX_TOKENS = 16  # of the prompt before the video, where no tokenizer tells


def compile_only(config: ConfigDict, cfg: VirstConfig, topology: str, slices: int = 1) -> None:
    """Compiles the step of every stage and kind of batch, and prints what a device needs.

    Args:
      config: the recipe.
      cfg: the network.
      topology, slices: of aot.topology_devices.
    """
    mesh = sharding.make_mesh(**recipe.plain(config.mesh), devices=aot.topology_devices(topology, slices))
    sharding.check_mesh(cfg, mesh)
    for stage in recipe.stages(config):
        layout = StateLayout.of(cfg, stage, mesh)
        for data in stage.data:
            sharding.check_batch(data.batch.batch_size, mesh)
            task = get_task(data.batch.kind)
            prefix_len = visual_tokens(cfg, data.batch) + PREFIX_TOKENS
            shapes = task.shapes(cfg, data.batch, prefix_len)
            batch = task.batch({name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}, prefix_len)
            with sharding.use_mesh(mesh):
                report = aot.compile_report(
                    make_train_step(cfg, stage.optim, stage.groups, task.loss, mesh_axes=sharding.BATCH_AXES),
                    layout.abstract,
                    batch,
                    layout.shardings,
                    sharding.batch_sharding(mesh),
                    topology if slices == 1 else f"{topology} x {slices} slices",
                    parts=_parts,
                    flops=task.count_flops(cfg, batch, layout.trained).model,
                )
            print(f"{stage.name}, batches of kind {data.name}: {data.batch.batch_size} samples")
            aot.print_report(report)


def _parts(state: TrainState) -> dict[str, PyTree]:
    parts = {"trained parameters": state.params, "frozen parameters": state.frozen, "optimizer": state.opt_state}
    return parts if state.ema is None else {**parts, "averaged parameters": state.ema}
