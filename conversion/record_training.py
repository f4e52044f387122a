"""Records how the PyTorch release trains: gradients and losses of a case, or a run of training.

    python -m conversion.record training CASE.json --release VIRST --out cases

Runs in the Python environment of the release (torch, no JAX). The parameters are those of the case's rule.
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from virst_jax.errors import UserError
from virst_jax.io import atomic
from virst_jax.io.json_files import read_json

from .recording.checkout import Release, build_network, open_checkout
from .recording.state import Rule
from .recording.training import run_batch, run_curve, run_training
from .recording.versions import versions
from .targets import KEPT, ellipse_masks

GRADIENTS = ".gradients.npz"  # behind the name of a train_loss case
HELP = "Record how the PyTorch release trains: a case train_loss*, train_batch* or loss_curve*."
EXAMPLES = """examples:
  virst record training tests/data/parity/train_loss.json --release VIRST --out cases
  virst record training tests/data/parity/loss_curve.json --release VIRST --out cases

Runs in the Python environment of the release (torch; JAX is not needed)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("case", type=Path, metavar="CASE.json", help="a case train_loss*, train_batch* or loss_curve*")
    parser.add_argument("--release", type=Path, required=True, metavar="DIR", help="checkout of the release")
    parser.add_argument(
        "--values", type=int, default=KEPT, metavar="N", help=f"of a gradient, evenly spaced, at most ({KEPT})"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of cases")


def run(args: argparse.Namespace) -> int:
    """Records and prints the names of the files.

    Raises:
      UserError: no such case, a case of another kind, or a run that fails.
    """
    if args.values < 1:
        raise UserError(f"--values {args.values}: give 1 or more")
    facts = _read(args.case)
    name = args.case.stem
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise atomic.cannot_write(args.out, error) from error
    with contextlib.ExitStack() as stack:
        quiet = stack.enter_context(open(os.devnull, "w"))
        printed = sys.stdout
        stack.enter_context(contextlib.redirect_stdout(quiet))  # the release prints much
        release = stack.enter_context(open_checkout(args.release.resolve(), lambda line: print(line, file=sys.stderr)))
        virst = _network(release, facts)
        if name.startswith("train_loss"):
            targets = ellipse_masks(facts["ellipse"], facts["n_frames"], int(facts["image_size"]))
            with release.blaming("its training fails"):
                done = run_training(release, virst, facts, targets, args.values)
            for key, value in done.losses.items():
                print(f"{key:16} {value:.7g}  recorded {facts['losses'].get(key, float('nan')):.7g}", file=printed)
            path = args.out / f"{name}{GRADIENTS}"
            atomic.write_npz(path, {**done.values, "kept": np.asarray(args.values)}, compressed=True)
        elif name.startswith("train_batch"):
            with release.blaming("its training fails"):
                losses = run_batch(release, virst, facts)
            path = args.out / args.case.name
            atomic.write_json(path, facts | {"losses": losses, "versions": versions()})
        else:
            with release.blaming("its training fails"):
                curve = run_curve(virst, facts)
            arrays = {"losses": curve.losses, "rates": np.asarray(curve.rates)}
            for step, parameters in curve.parameters.items():
                arrays |= {f"{step}/{key}": value for key, value in parameters.items()}
            path = args.out / f"{name}.npz"
            atomic.write_npz(path, arrays, compressed=True)
            atomic.write_json(args.out / args.case.name, facts | {"versions": versions()})
        print(path, file=printed)
    return 0


def _read(path: Path) -> dict[str, Any]:
    facts = read_json(path, advice="give the JSON of a case").value
    kinds = {
        "train_loss": ("losses", "cond_frames", "ellipse"),
        "train_batch": ("conversations", "cond_frames", "n_frames"),
        "loss_curve": ("optim", "batches", "groups"),
    }
    needed = next((keys for kind, keys in kinds.items() if path.stem.startswith(kind)), None)
    if needed is None:
        raise UserError(f"{path}: give a case whose name begins with {', '.join(kinds)}")
    missing = [key for key in (*needed, "config", "salt") if not isinstance(facts, dict) or key not in facts]
    if missing:
        raise UserError(f"{path}: {missing[0]!r} is missing; copy the case again")
    return facts


def _network(release: Release, facts: dict[str, Any]) -> Any:
    """The release's network with the case's sizes and parameters by the rule."""
    sizes = facts["config"]["tiny"]
    release.module(
        "model.videochat.vision_tower_builder"
    ).use_flash_attn = False  # it knows half precision on GPUs only
    rows = int(sizes["vocab_size"])
    fusion = bool(facts["config"].get("initial_seg_fusion"))
    network = build_network(
        release,
        Rule(int(facts["salt"])),
        tiny={key: value for key, value in sizes.items() if key != "vocab_size"},
        vocab_size=rows,
        seg_token_id=int(facts["config"].get("seg_token_id", rows - 1)),
        initial_fusion=fusion,
        attention="eager",
    )
    return network.virst
