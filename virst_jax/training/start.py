"""The state that a stage's training starts from, or goes on with, on the mesh."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh

from virst_jax.config import TrackerConfig, VirstConfig
from virst_jax.io import model_folder
from virst_jax.models.lora import add_lora
from virst_jax.parallel import sharding
from virst_jax.training import folders
from virst_jax.training.optim import flatten
from virst_jax.training.recipe import Stage
from virst_jax.training.step import TrainState, init_state
from virst_jax.types import PyTree

Initialize = Callable[[jax.Array], PyTree]  # a random key -> the parameters of a Virst; to be traced


@dataclass(frozen=True)
class StateLayout:
    """Shapes of a stage's TrainState, and where its arrays lie."""

    abstract: TrainState  # of ShapeDtypeStructs with shardings
    shardings: TrainState  # of NamedShardings

    @classmethod
    def of(cls, cfg: VirstConfig, stage: Stage, mesh: Mesh) -> "StateLayout":
        folders.check_trainable(cfg, "the recipe's model")
        shapes = model_folder.parameter_shapes(cfg)
        parameters = sharding.parameter_shardings(cfg, mesh)
        begin = lambda params: init_state(cfg, stage.optim, stage.groups, params, stage.frozen_weights)  # noqa: E731
        state = jax.eval_shape(begin, shapes)
        shardings = sharding.state_shardings(state, parameters, shapes, mesh)
        if stage.frozen == "whole":
            shardings = shardings.replace(frozen=sharding.whole_over(shardings.frozen, "fsdp"))
        place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)  # noqa: E731
        return cls(jax.tree.map(place, state, shardings), shardings)

    @property
    def trained(self) -> tuple[str, ...]:
        """Paths of the trained parameters."""
        return tuple(flatten(self.abstract.params))


@dataclass(frozen=True)
class Start:
    """Where a stage's training begins.

    folder: the model folder to start from; None: random parameters.
    seed: of random parameters, and of adapters that the model folder lacks.
    initialize: makes random parameters.
    """

    cfg: VirstConfig
    stage: Stage
    layout: StateLayout
    mesh: Mesh
    folder: Path | None
    seed: int
    initialize: Initialize

    def state(self) -> TrainState:
        """The state before the first step."""
        made: TrainState = self._make(lambda state: state)
        return made

    def frozen(self) -> PyTree:
        """The frozen parameters alone: checkpoints hold the rest."""
        return self._make(lambda state: state.frozen)

    def _make(self, part: Callable[[TrainState], PyTree]) -> PyTree:
        def begin(params: PyTree) -> PyTree:
            stage = self.stage
            return part(init_state(self.cfg, stage.optim, stage.groups, params, stage.frozen_weights))

        out_shardings = part(self.layout.shardings)
        if self.folder is None:
            make = jax.jit(lambda key: begin(self.initialize(key)), out_shardings=out_shardings)
            return make(jax.random.key(self.seed))
        shardings = sharding.parameter_shardings(folders.read_config(self.folder), self.mesh)
        stored, params = folders.load(self.folder, shardings)
        if not isinstance(stored, TrackerConfig):
            params = add_lora(params, stored.llm.lora, self.cfg.llm.lora, self.seed)
        with warnings.catch_warnings():
            # parameters that are cast, or not asked for, cannot be reused; they are freed all the same
            warnings.filterwarnings("ignore", "Some donated buffers were not usable")
            return jax.jit(begin, out_shardings=out_shardings, donate_argnums=0)(params)
