"""`virst data`: look at data sets, check them, build them."""

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from virst_jax.errors import UserError
from virst_jax.io import atomic

HELP = "check a data set, show some of it, build it for training"

_EXAMPLES = """examples:
  virst data check my_videos                                 your own videos (docs/datasets.md)
  virst data check RVOS_ROOT --dataset mevis --split valid_u
  virst data show RVOS_ROOT --dataset revos --out sheet.png
  virst data build LISA --dataset refcoco --split train val --out built
"""
_MOST_SHOWN = 20  # problems printed; the report file holds all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `virst data`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    actions = parser.add_subparsers(dest="action", required=True, metavar="check|show|build")

    check = actions.add_parser(
        "check", help="read everything and report what is wrong; 1 if something must be left out"
    )
    _common(check)
    check.add_argument("--quick", action="store_true", help="only see that the frames are there; decode nothing")
    check.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="threads that read")
    check.add_argument("--report", type=Path, help="JSON file for the whole report")

    show = actions.add_parser("show", help="draw a contact sheet with masks")
    _common(show)
    show.add_argument("--out", type=Path, default=Path("sheet.png"), help="the image to write (sheet.png)")
    show.add_argument("--count", type=int, default=4, help="samples, evenly spaced over the data set (4)")
    show.add_argument("--frames", type=int, default=4, help="frames of a sample (4)")
    show.add_argument("--expressions", type=int, default=3, help="expressions of a sample (3)")

    build = actions.add_parser("build", help="validate and write ArrayRecord files")
    _common(build)
    build.add_argument("--out", type=Path, required=True, help="folder of built data sets")


def run(args: argparse.Namespace) -> int:
    """Runs `virst data`; 0, or 1 if a check found something that must be left out.

    Raises:
      UserError: bad input.
    """
    from virst_jax.data.datasets.registry import guess_name

    args.dataset = args.dataset or guess_name(args.folder)
    return {"check": _check, "show": _show, "build": _build}[args.action](args)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="the data set's folder, or the one above it")
    parser.add_argument(
        "--dataset", default="", help="its name (docs/datasets.md); guessed from the folder if left out"
    )
    parser.add_argument(
        "--split", nargs="+", default=[], help="one or several; check and build take all that are there"
    )


def _check(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table
    from tqdm import tqdm

    from virst_jax.data.datasets.validate import Report, check, summarize

    if args.report is not None:
        atomic.check_place(args.report)
    reports: list[Report] = []
    for source in _sources(args):
        with tqdm(total=len(source), desc=f"{source.name} {source.split}".strip(), unit="sample") as bar:
            reports.append(check(source, quick=args.quick, workers=args.workers, progress=bar.update))
    table = Table("data set", "split", "samples", "kept", "expressions", "kept", "problems")
    for report in reports:
        counts = (report.num_samples, report.kept_samples, report.num_expressions, report.kept_expressions)
        table.add_row(report.name, report.split, *map(str, counts), str(len(report.problems)))
    console = Console(highlight=False)
    console.print(table)
    problems = [problem for report in reports for problem in report.problems]
    for problem in problems[:_MOST_SHOWN]:
        console.print(str(problem), markup=False, soft_wrap=True)
    if len(problems) > _MOST_SHOWN:
        console.print(f"... and {len(problems) - _MOST_SHOWN} more, by kind:")
        for kind, count in summarize(problems)[:8]:
            console.print(f"  {count} x {kind}", markup=False, soft_wrap=True)
        if args.report is None:
            console.print("--report FILE.json writes all of them")
    if args.report is not None:
        _write_reports(args.report, reports)
    return int(any(report.dropped for report in reports))


def _show(args: argparse.Namespace) -> int:
    from PIL import Image

    from virst_jax.data.datasets.contact_sheet import ContactSheetConfig, contact_sheet
    from virst_jax.data.datasets.registry import open_dataset
    from virst_jax.io import visualize

    for name in ("count", "frames", "expressions"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"{args.out}: write to a .png or .jpg file")
    if len(args.split) > 1:
        raise UserError(f"show takes one split, not {' '.join(args.split)}")
    atomic.check_place(args.out)
    source = open_dataset(args.dataset, args.folder, *args.split)
    count = min(args.count, len(source))
    config = ContactSheetConfig(args.frames, args.expressions)
    sheets = []
    for i in range(count):
        index = i * (len(source) - 1) // max(1, count - 1)
        try:
            sheets.append(contact_sheet([source[index]], config))
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
    if not sheets:
        raise UserError(f"{source.root}: no sample can be shown; run virst data check")
    with atomic.new_file(args.out) as file:
        image = Image.fromarray(visualize.stack(sheets))
        image.save(file, "PNG" if args.out.suffix.lower() == ".png" else "JPEG")
    print(f"{args.out}: {len(sheets)} of {len(source)} samples")
    return 0


def _build(args: argparse.Namespace) -> int:
    import logging

    from virst_jax.data.builders.builder import build

    logging.getLogger("absl").setLevel(logging.ERROR)  # TFDS tells much that says nothing here
    for source in _sources(args):
        with contextlib.redirect_stdout(sys.stderr):
            folder, report = build(args.dataset, args.folder, args.out, source.split)
        if report is None:
            print(f"{folder}: was built before")
            continue
        print(f"{folder}: {report.kept_samples} samples, {report.kept_expressions} expressions")
        left_out = report.num_samples - report.kept_samples
        if left_out or report.dropped:
            print(f"  {left_out} samples left out, {len(report.problems)} problems: report.json tells which")
    return 0


def _sources(args: argparse.Namespace) -> list:
    """The splits asked for, or all that are in the folder."""
    from virst_jax.data.datasets.registry import ALIASES, DATASETS, open_dataset, resolve

    if args.split or ALIASES.get(args.dataset, ("", ""))[1]:
        return [open_dataset(args.dataset, args.folder, split) for split in args.split or [""]]
    sources: list[Any] = []
    errors: list[UserError] = []
    for split in DATASETS[resolve(args.dataset)[0]].splits:
        try:
            source = open_dataset(args.dataset, args.folder, split)
            if source.split not in [other.split for other in sources]:  # a folder without splits is that of training
                sources.append(source)
        except UserError as error:
            errors.append(error)
    if not sources:
        raise errors[0]
    return sources


def _write_reports(path: Path, reports: list) -> None:
    from dataclasses import asdict

    atomic.write_json(path, [asdict(report) for report in reports])
