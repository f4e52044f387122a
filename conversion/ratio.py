"""Judges a run in low precision by the release's own noise.

    python -m conversion.parity ratio CASE --low LOW_CASE

CASE is recorded in float32 and stands for the truth, LOW_CASE is the same recorded by the release in bfloat16. Our run
in bfloat16 is as far from the truth as the release's, give or take a fifth, if the two differ by nothing but rounding.
`virst parity ratio` is the same.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from virst_jax.config import ROUNDINGS
from virst_jax.errors import UserError
from virst_jax.io import atomic

from .cases.case import Case, load_case
from .cases.network import run_e2e

HELP = "Compare our distance from a float32 run with that of the release's own run in bfloat16."
EXAMPLES = """examples:
  virst parity ratio cases/e2e_dog --low bf16/e2e_dog --checkpoint virst_7b

Exit status: 0 every ratio is at most 1.2; 1 one is larger, or masks are worse; 2 bad arguments."""
RATIO = 1.2  # that two draws of the same noise may differ by
IOU = 0.002  # that the masks' mean IoU may be lower than the release's
HEADER = ("output", "release", "ours", "ratio", "p50", "p99", "max ULP", "")
WIDTHS = (22, 9, 9, 7, 7, 7, 9, 0)


@dataclasses.dataclass(frozen=True)
class Row:
    """One output: relative L2 distances from the truth, and quantiles of our error in units of the last place."""

    output: str
    release: float
    ours: float
    median: float
    p99: float
    largest: float

    @property
    def ratio(self) -> float:
        if self.ours == 0:
            return 0.0
        return self.ours / self.release if self.release else float("inf")

    @property
    def passed(self) -> bool:
        return self.ratio <= RATIO


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("case", type=Path, metavar="CASE", help="an e2e case, recorded in float32")
    parser.add_argument("--low", type=Path, required=True, metavar="CASE", help="the same, recorded in low precision")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="converted checkpoint, for recorded cases")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument(
        "--rounding", default="late", choices=ROUNDINGS, help="of the language model: as late as can be (late)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")


def _open(path: Path, **given: Any) -> Case:
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such directory; give a case as DIR/NAME")
    case = load_case(path.parent, path.name.removesuffix(".json").removesuffix(".npz"), **given)
    if "sam_idx" not in case.meta:
        raise UserError(f"{path}: give a case of the whole network, e2e_*")
    return case


def units(error: np.ndarray, truth: np.ndarray, dtype: str) -> np.ndarray:
    """Errors in units of the last place of the true values in a float type."""
    info = jax.numpy.finfo(dtype)
    spacing = 2.0 ** np.floor(np.log2(np.maximum(np.abs(truth), float(info.tiny)))) * float(info.eps)
    return np.asarray(np.abs(error) / spacing)


def compare(output: str, ours: Any, release: Any, truth: Any, dtype: str) -> Row:
    """An output of three runs; arrays of one shape.

    Raises:
      UserError: they are not.
    """
    ours, release, truth = (np.asarray(x, np.float64) for x in (ours, release, truth))
    if not ours.shape == release.shape == truth.shape:
        raise UserError(f"{output}: shapes {ours.shape}, {release.shape}, {truth.shape}: these are not the same case")
    norm = float(np.linalg.norm(truth)) or 1.0
    steps = units(ours - truth, truth, dtype)
    quantiles = np.quantile(steps, [0.5, 0.99, 1.0]).tolist()
    return Row(
        output, float(np.linalg.norm(release - truth)) / norm, float(np.linalg.norm(ours - truth)) / norm, *quantiles
    )


def run(args: argparse.Namespace) -> int:
    """Runs the case in low precision and prints the table.

    Raises:
      UserError: the cases do not belong together, or something that they need is missing.
    """
    low = _open(args.low)
    case = _open(args.case, dtype=args.dtype, rounding=args.rounding, checkpoint=args.checkpoint)
    if case.meta.get("dtype", "float32") != "float32" or low.meta.get("dtype", "float32") == "float32":
        raise UserError(f"{args.case} has to be recorded in float32 and {args.low} in low precision (record --dtype)")
    if any(case.meta.get(key) != low.meta.get(key) for key in ("input_ids", "sam_idx", "n_frames", "hw")):
        raise UserError(f"{args.low}: not the same inputs as {args.case}; record it with --like {args.case}.json")
    case.kept = {}
    run_e2e(case)
    rows, masks = table(case, low, args.dtype)
    console = Console(highlight=False, soft_wrap=True)
    console.print(_line(*HEADER), style="bold")
    for row in rows:
        cells = (f"{row.release:.1e}", f"{row.ours:.1e}", f"{row.ratio:.2f}", f"{row.median:.1f}", f"{row.p99:.0f}")
        told = "pass" if row.passed else "LARGER"
        line = _line(row.output, *cells, f"{row.largest:.0f}", told)
        console.print(line, style=None if row.passed else "red", markup=False)
    console.print(masks.told)
    if args.json:
        found = [dataclasses.asdict(row) | {"ratio": row.ratio, "passed": row.passed} for row in rows]
        atomic.write_json(args.json, {"outputs": found, "masks": dataclasses.asdict(masks)})
    return 0 if masks.passed and all(row.passed for row in rows) else 1


@dataclasses.dataclass(frozen=True)
class Masks:
    """Mean IoU with the true masks over frames on which the object is there or absent in all three runs alike."""

    release: float
    ours: float
    frames: int
    flips_release: list[int]  # frames on which the object's presence differs from the truth
    flips_ours: list[int]

    @property
    def passed(self) -> bool:
        return self.ours >= self.release - IOU

    @property
    def told(self) -> str:
        flips = f"presence flips: release {self.flips_release or 'none'}, ours {self.flips_ours or 'none'}"
        return f"masks: mean IoU release {self.release:.4f}, ours {self.ours:.4f} over {self.frames} frames; {flips}"


def table(case: Case, low: Case, dtype: str) -> tuple[list[Row], Masks]:
    """The rows of a case that has been run with `kept`."""
    assert case.kept is not None
    ours = case.kept
    steady, flips = _presence(ours["object_score_logits"], low, case)
    rows = []
    for name, value in ours.items():
        if name not in low.outputs or name == "video_mask_bits":
            continue
        select = steady if name in ("low_res_masks", "obj_ptr") else slice(None)
        if len(np.atleast_1d(value)[select]):
            rows.append(compare(name, value[select], low.outputs[name][select], case.outputs[name][select], dtype))
    width = case.meta["hw"][1]
    truth, theirs = (
        np.unpackbits(x.outputs["video_mask_bits"], axis=-1)[..., :width].astype(bool)[steady] for x in (case, low)
    )
    return rows, Masks(_iou(theirs, truth), _iou(ours["video_mask_bits"][steady], truth), len(truth), *flips)


def _presence(scores: np.ndarray, low: Case, case: Case) -> tuple[np.ndarray, tuple[list[int], list[int]]]:
    true, release, ours = (
        np.asarray(x) > 0 for x in (case.outputs["object_score_logits"], low.outputs["object_score_logits"], scores)
    )
    flips = np.flatnonzero(release != true).tolist(), np.flatnonzero(ours != true).tolist()
    return np.flatnonzero((release == true) & (ours == true)), flips


def _iou(masks: np.ndarray, truth: np.ndarray) -> float:
    overlap, union = (masks & truth).sum((1, 2)), (masks | truth).sum((1, 2))
    return float(np.where(union > 0, overlap / np.maximum(union, 1), 1.0).mean()) if len(truth) else 1.0


def _line(*cells: str) -> str:
    padded = (c.rjust(w) if 0 < i < 7 else c.ljust(w) for i, (c, w) in enumerate(zip(cells, WIDTHS, strict=True)))
    return " ".join(padded).rstrip()
