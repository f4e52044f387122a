"""`virst metrics`: scores masks that lie in a folder, of any system, by a benchmark's protocol."""

import argparse
import os
import sys
from pathlib import Path

from virst_jax.errors import UserError
from virst_jax.io import atomic

HELP = "score a folder of masks (PNG) by a benchmark's protocol"
EXAMPLES = """\
PRED_DIR holds VIDEO/EXPRESSION/FRAME.png of 0 and 255 (or 0 and 1), of the video's size, under Annotations/ or not;
for Ref-DAVIS17 also anno_0 to anno_3 with VIDEO/FRAME.png, palette images of all objects; or results of eval.py.

  virst metrics results/mevis --dataset mevis --data-root data/RVOS --split valid_u --out scores
  virst metrics results/davis --dataset ref_davis17 --data-root data/RVOS
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pred_dir", metavar="PRED_DIR", type=Path, help="folder of the masks")
    add_dataset_arguments(parser)
    parser.add_argument("--out", type=Path, help="folder for the report: table, JSON, CSV, plot, worst cases")
    parser.add_argument("--worst", type=int, default=20, metavar="N", help="cases on the page of the worst")
    parser.add_argument(
        "--workers", type=int, default=min(8, os.cpu_count() or 1), metavar="N", help="processes; 0: none besides this"
    )


def add_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    """--dataset, --data-root, --split and --quiet."""
    parser.add_argument("--dataset", required=True, metavar="NAME", help="as `virst data --help` lists them")
    parser.add_argument("--data-root", required=True, type=Path, metavar="DIR", help="the data set's folder")
    parser.add_argument("--split", default="", help="default: the one that is scored")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Prints the table; status 1 if a video could not be scored (it is named, and the table says INCOMPLETE).

    Raises:
      UserError: bad input, or no video could be scored.
    """
    from virst_jax.data.datasets.registry import open_dataset
    from virst_jax.evaluation.benchmarks import summarize
    from virst_jax.evaluation.offline_scoring import open_predictions, score_existing
    from virst_jax.evaluation.report import format_table, write_report

    if args.out is not None:
        atomic.check_writable(args.out)
    source = open_dataset(args.dataset, args.data_root, args.split)
    scoring = open_predictions(source, args.pred_dir)
    scores, errors = score_existing(source, scoring, workers=args.workers, progress=not args.quiet)
    if not scores:
        first = next(iter(sorted(errors.values())), f"{args.data_root}: holds no video")
        raise UserError(f"no video could be scored; the first: {first}")
    is_image = all(row.frames == 1 for video in scores for row in video.rows)
    summary = summarize(source.name, source.split, is_image, scores)
    if args.out is not None:
        table = write_report(
            args.out,
            summary,
            scores,
            source=source,
            read_pred=scoring.read_pred,
            worst=args.worst,
            errors=errors,
            progress=not args.quiet,
        )
    else:
        table = format_table(summary, errors)
    print(table, end="")
    if errors:
        print(f"{len(errors)} of {len(source)} videos could not be scored", file=sys.stderr)
    return 1 if errors else 0
