"""`virst eval`: masks, scores and a report of a model on a benchmark. eval.py does the work."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from virst_jax import programs
from virst_jax.commands import config_file
from virst_jax.commands.parser import path_or_bucket

if TYPE_CHECKING:
    from ml_collections import ConfigDict

HELP = """Evaluate a model on a benchmark: masks, scores, a report. Interrupted, the same command goes on.

Every setting can be given as --config.key=value: split, seed, exact, dtype, predictor, limit, process_index,
process_count, distributed, workers, png, worst, overwrite, progress."""
EXAMPLES = """examples:
  virst eval --model=virst_7b --dataset=mevis --data-root=RVOS_ROOT --workdir=runs/eval
  virst eval --model=virst_7b --dataset=revos --data-root=RVOS_ROOT --config.workers=4 --config.png=True

Exit status: 0, 1 if a video failed (it is named, the others are done), 2 for bad input."""
SHORT = ("model", "dataset", "data_root", "split")  # options of their own


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config_file.add_arguments(parser, "settings: a name, or a Python file (default: eval)", "eval")
    parser.add_argument("--model", help='model folder, or "tiny", which is in the package')
    parser.add_argument("--dataset", metavar="NAME", help="as `virst data --help` lists them")
    parser.add_argument("--data-root", metavar="DIR", help="the data set's folder, or the one above it")
    parser.add_argument("--split", help="default: the one that is scored")
    parser.add_argument(
        "--workdir",
        type=path_or_bucket,
        default=Path("runs/eval"),
        metavar="DIR",
        help="where results go (%(default)s), or an address of gs:// or s3://",
    )


def config_of(args: argparse.Namespace) -> ConfigDict:
    """The settings that the arguments name, with their changes.

    Raises:
      UserError: there are none, or a change does not fit them.
    """
    short = [f"--config.{name}={getattr(args, name)}" for name in SHORT if getattr(args, name) is not None]
    return config_file.load(args.config, [*args.settings, *short])


def run(args: argparse.Namespace) -> int:
    return programs.load("eval").main(args)
