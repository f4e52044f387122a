"""Recipes: what a config file of training says, as typed values. `configs/` holds the files.

A recipe is an ml_collections ConfigDict:

model       {"preset": name of a preset, "init": a model folder to start from ("": random), "tokenizer": its folder
            ("": that of `init`, or of the package's model), "overrides": nested changes of the VirstConfig}
mesh        {"data", "fsdp", "tensor"}; -1: the rest of the devices
seed        of everything that is drawn
stages      names of the stages in order; each is a key of the recipe:
  steps     batches of the stage
  optim     an OptimConfig (total_steps follows from steps)
  groups    ((pattern of parameter paths, factor of the learning rate; 0: frozen), ...)
  frozen    where frozen parameters lie: "split" over fsdp and gathered when they are used, which is also what a stage
            without this key means, or "whole" on every device
  frozen_weights  "float", the compute dtype, or "int8": kernels of the language model as integers with a scale for
            every output channel, beside adapters; the model that the stage leaves has these rounded kernels, as floats
  data      {name: {"weight": share of the batches, "sources": {name: {"kind", "weight", ...}}, a BatchConfig's values}}
eval        {"source": as above, "videos": how many, "every": steps; 0: only at the end of a stage}
checkpoint  {"every": steps, "keep": latest ones}
profile     {"first": steps before it, "steps": how many are traced, "folder": where ("": STAGE/profile)}
xla_flags   {"tpu": {name: value}, "gpu": {name: value}}: flags of the compiler; see parallel.compiler_flags
tracking    {"to": wandb or trackio ("": neither), "project": its name there}
goodput     {"job": a name under which Google's goodput library records the run ("": not)}
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from virst_jax.config import FLOAT, VirstConfig, override
from virst_jax.data.batches import BatchConfig
from virst_jax.errors import UserError
from virst_jax.training.optim import Groups, OptimConfig

FROZEN = ("split", "whole")
FROZEN_WEIGHTS = (FLOAT, "int8")


@dataclass(frozen=True)
class DataConfig:
    """One kind of batch in a stage's mixture."""

    name: str
    weight: float
    batch: BatchConfig
    sources: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int
    optim: OptimConfig
    groups: Groups
    data: tuple[DataConfig, ...]
    frozen: str = "split"  # of FROZEN
    frozen_weights: str = FLOAT  # of FROZEN_WEIGHTS
    in_turn: bool = False  # one batch of each kind after the other, whatever their weights


def stages(config: Mapping[str, Any]) -> list[Stage]:
    """The stages of a recipe.

    Raises:
      UserError: a stage is missing, a key is unknown, or a value has another type.
    """
    names = tuple(config.get("stages", ()))
    if not names:
        raise UserError("the recipe names no stages; see virst_jax/training/recipe.py for its form")
    return [_stage(str(name), config) for name in names]


def _stage(name: str, config: Mapping[str, Any]) -> Stage:
    if name not in config:
        raise UserError(f"the recipe lists the stage {name!r} but does not describe it")
    given = plain(config[name])
    frozen = {"frozen": given.pop("frozen", "split"), "frozen_weights": given.pop("frozen_weights", FLOAT)}
    unknown = set(given) - {"steps", "optim", "groups", "data"}
    if unknown:
        known = "steps, optim, groups, frozen, frozen_weights and data"
        raise UserError(f"{name}: unknown key {sorted(unknown)[0]!r}; a stage has {known}")
    for key, allowed in (("frozen", FROZEN), ("frozen_weights", FROZEN_WEIGHTS)):
        if frozen[key] not in allowed:
            raise UserError(f"{name}.{key}: must be {' or '.join(allowed)}, not {frozen[key]!r}")
    try:
        steps, optim, groups, data = (given[key] for key in ("steps", "optim", "groups", "data"))
    except KeyError as error:
        raise UserError(f"{name}: {error} is missing") from error
    if not isinstance(steps, int) or steps < 1:
        raise UserError(f"{name}: steps must be a positive whole number, not {steps!r}")
    accumulate = max(1, optim.get("accumulate", 1))
    total = {"total_steps": max(1, steps // accumulate)}
    parts = tuple(_data(f"{name}.data.{key}", key, value) for key, value in data.items())
    if not parts or sum(part.weight for part in parts) <= 0:
        raise UserError(f"{name}: no data with a weight above 0")
    return Stage(
        name,
        steps,
        override(OptimConfig(), {**total, **optim}, f"{name}.optim"),
        tuple((str(pattern), float(factor)) for pattern, factor in groups),
        parts,
        **frozen,
    )


def _data(where: str, name: str, given: Mapping[str, Any]) -> DataConfig:
    values = dict(given)
    sources, weight = values.pop("sources", {}), float(values.pop("weight", 1.0))
    if not sources:
        raise UserError(f"{where}: no sources")
    if weight < 0:
        raise UserError(f"{where}: the weight must not be negative, not {weight}")
    return DataConfig(name, weight, override(BatchConfig(), values, where), sources)


def network(base: VirstConfig, config: Mapping[str, Any]) -> VirstConfig:
    """The network that a recipe trains: `base` (a preset, or the config of the model to start from), changed."""
    return override(base, plain(config["model"]).get("overrides", {}), "model.overrides")


def plain(value: Any) -> Any:
    """ConfigDicts as dictionaries, all the way down."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return value
