"""Finds the first operation that differs from a recorded run, and whether rounding explains the difference.

    python -m conversion.parity bisect CASE [--checkpoint DIR] [--blocks FILE]

Exit status: 0 rounding explains every operation; 1 an operation differs; 2 bad arguments. `virst parity bisect` is the
same. docs/parity.md tells how to read the table.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from virst_jax.errors import UserError
from virst_jax.io import atomic
from virst_jax.io.npz import read_npz

from .bisection.operation import epsilon
from .bisection.walk import Row, Walk, operations
from .cases.case import BLOCKS, Case, load_case
from .cases.network import open_network

MAX_BLOCKS = 1 << 36  # bytes; the full network gives 2 GB and 70 MB a frame
HELP = "Find the first operation of the network that differs from a recorded run."
EXAMPLES = """examples:
  virst parity bisect cases/e2e_dog --checkpoint virst_7b
  virst parity bisect cases/e2e_dog --checkpoint virst_7b --save here.blocks.npz     # on another machine:
  virst parity bisect cases/e2e_dog --checkpoint virst_7b --blocks here.blocks.npz

Exit status: 0 rounding explains every operation; 1 an operation differs; 2 bad arguments."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("case", type=Path, metavar="CASE", help="an e2e case: CASE.json and CASE.npz")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="converted checkpoint, for recorded cases")
    parser.add_argument(
        "--blocks", type=Path, metavar="FILE", help="tensors to compare with (default: CASE.blocks.npz beside the case)"
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--first", action="store_true", help="stop at the first operation that differs")
    parser.add_argument(
        "--thorough", action="store_true", help="estimate explained errors and conditioning of all operations"
    )
    parser.add_argument("--save", type=Path, metavar="FILE", help="also write our own tensors, for --blocks elsewhere")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--report", type=Path, metavar="FILE", help="also write a page here, one HTML file")


HEADER = ("operation", "output", "accumulated", "alone", "explained", "condition", "")
WIDTHS = (34, 22, 11, 9, 9, 9, 0)


def _line(*cells: str) -> str:
    numbers = (False, False, True, True, True, True, False)
    padded = (c.rjust(w) if right else c.ljust(w) for c, w, right in zip(cells, WIDTHS, numbers, strict=True))
    return " ".join(padded).rstrip()


def line_of(row: Row) -> str:
    """A row of the table."""
    numbers = (row.accumulated, row.alone, row.explained, row.conditioning)
    told = "" if row.alone is None else "rounding" if row.passed else "DIFFERS"
    return _line(row.operation, row.output, *("" if x is None else f"{x:.1e}" for x in numbers), told)


def load_blocks(path: Path) -> dict[str, np.ndarray]:
    """Tensors by name.

    Raises:
      UserError: no such file, or it is damaged.
    """
    return read_npz(path, "record the case with --blocks, or name a file that --save wrote", MAX_BLOCKS)


def recorded_tensors(case: Case, blocks: Path | None, folder: Path) -> dict[str, np.ndarray]:
    """What was recorded for a case: its blocks, or else those of its outputs that are complete.

    Raises:
      UserError: the file of blocks is missing or damaged.
    """
    beside = folder / f"{case.name}{BLOCKS}"
    if blocks or beside.is_file():
        return load_blocks(blocks or beside)
    out, thinned = case.outputs, case.meta.get("strides", {})
    names = {"seg_hidden": "seg_hidden", "prompts": "prompts", "frame_scores": "frame_scores"}
    if "inputs_embeds" not in thinned and "inputs_embeds" in out:
        names["llm.embeds"] = "inputs_embeds"
    found = {ours: out[theirs] for ours, theirs in names.items() if theirs in out}
    for part, theirs in (("pointer", "obj_ptr"), ("score", "object_score_logits")):
        found |= {f"frame{t}.{part}": value for t, value in enumerate(out.get(theirs, ()))}
    return found


def run(args: argparse.Namespace) -> int:
    """Walks the operations and prints the table; 1 if one differs.

    Raises:
      UserError: the case is not one of the whole network, or something that it needs is missing.
    """
    folder, name = args.case.parent, args.case.name.removesuffix(".json").removesuffix(".npz")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such directory; give a case as DIR/NAME")
    case = load_case(folder, name, dtype=args.dtype, checkpoint=args.checkpoint)
    if "sam_idx" not in case.meta:
        raise UserError(f"{args.case}: bisect walks cases of the whole network, e2e_*; run `virst parity` on this one")
    recorded = recorded_tensors(case, args.blocks, folder)
    console = Console(highlight=False, soft_wrap=True)
    if "image.embed" not in recorded:
        console.print("no tensors of blocks were recorded (virst record --blocks): only accumulated errors are shown")
    rows = _walk(args, case, recorded, console)
    wrong = next((row for row in rows if not row.passed), None)
    conclusion = _conclusion(rows, wrong)
    console.print(conclusion)
    if args.report:
        from . import report as page  # its packages belong to an extra

        page.write_page(args.report, f"First difference in {name}", [page.bisect_section(case, rows, "")], conclusion)
    return 0 if wrong is None else 1


def _conclusion(rows: list[Row], wrong: Row | None) -> str:
    if wrong is not None:
        return (
            f"first difference: {wrong.operation} ({wrong.output}): relative error {wrong.alone:.1e} on recorded "
            f"inputs, where rounding explains {wrong.explained:.1e}"
        )
    compared = sum(row.alone is not None for row in rows)
    return f"{len(rows)} operations, {compared} of them on recorded inputs: rounding explains every error"


def _walk(args: argparse.Namespace, case: Case, recorded: dict[str, np.ndarray], console: Console) -> list[Row]:
    rows: list[Row] = []
    with jax.default_matmul_precision("highest"):
        network = open_network(case)
        eps = epsilon(args.dtype, case.meta.get("dtype", "float32"))
        walk = Walk(recorded, eps, thorough=args.thorough, keep=args.save is not None)
        console.print(_line(*HEADER), style="bold")
        for row in walk.rows(operations(case, network, recorded.get("anchors"))):
            console.print(line_of(row), style=None if row.passed else "red", markup=False)
            rows.append(row)
            if args.json:
                atomic.write_json(args.json, as_json(case, eps, rows))
            if args.first and not row.passed:
                return rows
        if args.save:
            atomic.write_npz(args.save, {name: plain(value) for name, value in walk.own.items()})
    return rows


def as_json(case: Case, eps: float, rows: list[Row]) -> dict[str, Any]:
    """The results as JSON takes them."""
    return {
        "case": case.name,
        "epsilon": eps,
        "operations": [dataclasses.asdict(r) | {"passed": r.passed} for r in rows],
    }


def plain(value: np.ndarray) -> np.ndarray:
    """A tensor of a type that files of arrays know."""
    known = value.dtype.kind in "biuf" and value.dtype.name != "bfloat16"
    return value if known else value.astype(np.float32)
