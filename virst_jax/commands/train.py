"""`virst train`: training by a recipe. train.py, beside this package or in it, does the work."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from virst_jax import programs
from virst_jax.commands import config_file
from virst_jax.commands.parser import path_or_bucket
from virst_jax.errors import UserError
from virst_jax.io import buckets
from virst_jax.io.address import local

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from virst_jax.io.buckets import Place

HELP = """Train a model by a recipe. The same command goes on where an earlier run stopped, or was killed.

A recipe is one of the package (synthetic, stage1, stage2, stage3, finetune, clicks) or a Python file of your own; every
value of it can be changed: --config.seed=3, --config.stage1.optim.learning_rate=1e-4."""
EXAMPLES = """examples:
  virst train --config=synthetic --workdir=runs/synthetic
  virst train --config=synthetic --dry-run                 does all of it run?
  virst train --config=finetune --workdir=runs/mine --config.model.init=virst_7b --config.data_root=my_videos
  virst train --config=clicks --workdir=runs/clicks --config.model.init=sam2_large --config.data_root=my_videos
  virst train --config=stage1 --compile-only --topology=v5e:4x4
  virst train --config=stage1 --compile-only --topology=v5e:4x4 --effort=full     and how long will it take?"""


STEPS = "--config.steps="


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config_file.add_arguments(parser, "the recipe: a name, or a Python file (configs/ of a checkout holds examples)")
    parser.add_argument(
        "--workdir",
        type=path_or_bucket,
        metavar="DIR",
        help="where checkpoints, logs and the trained model go (runs/NAME), or gs://BUCKET/DIR, s3://BUCKET/DIR",
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="at most N steps of every stage; in a dry run, N of every kind of batch",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="do everything once in a folder that is removed, and report on it"
    )
    parser.add_argument("--compile-only", action="store_true", help="compile for --topology and print what it needs")
    parser.add_argument("--topology", default="", help="hardware to compile for: v5e:4x4, v5p:2x2x2, h100:8, cpu:8")
    parser.add_argument(
        "--effort",
        choices=("quick", "full"),
        default="quick",
        help="quick: does it fit? full: takes 5 to 20 minutes a step, and predicts a step's time and the stage's cost",
    )
    parser.add_argument("--slices", type=int, default=1, help="how many such TPU slices to compile for (1)")


def config_of(args: argparse.Namespace) -> ConfigDict:
    """The recipe that the arguments name, with their changes.

    Raises:
      UserError: there is none, or a change does not fit it.
    """
    if not args.config:
        raise UserError(f"--config is missing: name a recipe ({', '.join(config_file.recipes())}) or a Python file")
    config = config_file.load(args.config, _steps_apart(args))
    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps {args.steps}: give 1 or more")
    return config if args.steps is None or args.dry_run else limit_steps(config, args.steps)


def _steps_apart(args: argparse.Namespace) -> list[str]:
    """The settings without --config.steps=N, which says the same as --steps=N: recipes have steps in stages only."""
    given: list[str] = []
    rest: list[str] = []
    for setting in args.settings:
        (given if setting.startswith(STEPS) else rest).append(setting)
    if given:
        try:
            args.steps = int(given[-1].removeprefix(STEPS))
        except ValueError as error:
            raise UserError(f"{given[-1]}: give a whole number") from error
    return rest


def limit_steps(config: ConfigDict, steps: int) -> ConfigDict:
    """The recipe with at most `steps` steps of every stage, and no longer a warm-up than that."""
    for name in config.get("stages", ()):
        stage = config.get(name, {})
        if isinstance(stage.get("steps"), int):
            stage.steps = min(stage.steps, steps)
        optim = stage.get("optim", {})
        if isinstance(optim.get("warmup_steps"), int):
            optim.warmup_steps = min(optim.warmup_steps, steps)
    return config


def check_start(config: ConfigDict) -> None:
    """Raises UserError: a recipe of a large network that names no model to start from, and no tokenizer."""
    model = config.get("model", {})
    if model.get("preset", "tiny") == "tiny" or model.get("init") or model.get("tokenizer"):
        return
    raise UserError(
        f"config.model.init is missing: {model.preset} starts from a model, as `virst convert` writes it; give "
        "--config.model.init=MODEL, or --config.model.tokenizer=DIR to train from random parameters"
    )


def workdir_of(args: argparse.Namespace) -> Place:
    """--workdir, or runs/NAME; a run that --steps cut short has a folder of its own, since its models are no models.

    Raises:
      UserError: an address of a kind that training cannot write to.
    """
    name = Path(args.config.partition(":")[0]).stem
    if args.workdir:
        return buckets.place(args.workdir) if buckets.is_bucket(args.workdir) else local(args.workdir, "--workdir")
    cut = args.steps is not None and not args.dry_run
    return Path("runs") / (f"{name}-{args.steps}-steps" if cut else name)


def run(args: argparse.Namespace) -> int:
    return programs.load("train").main(args)
