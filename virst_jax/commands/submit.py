"""`virst submit`: writes or checks the zip that a benchmark's server takes."""

import argparse
from pathlib import Path

from virst_jax.commands.metrics import add_dataset_arguments
from virst_jax.errors import UserError
from virst_jax.io import atomic

HELP = "write and check the zip for a benchmark's server"
EXAMPLES = """\
PRED_DIR is WORKDIR/DATASET-SPLIT of eval.py, or a folder of VIDEO/EXPRESSION/FRAME.png. The zip is checked before it
appears: all frames of all expressions, sizes, values 0 and 255, nothing else.

  virst submit runs/mevis-valid --dataset mevis --split valid --data-root data/RVOS --out mevis.zip
  virst submit --check theirs.zip --dataset ref_youtube_vos --data-root data/RVOS
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pred_dir", metavar="PRED_DIR", type=Path, nargs="?", help="folder of the masks")
    add_dataset_arguments(parser)
    parser.add_argument("--out", type=Path, metavar="ZIP", help="the zip to write")
    parser.add_argument("--check", type=Path, metavar="ZIP", help="check this zip and write none")


def run(args: argparse.Namespace) -> int:
    """Writes or checks a zip.

    Raises:
      UserError: bad input, or what is wrong with the masks or the zip.
    """
    from virst_jax.data.datasets.registry import open_dataset
    from virst_jax.evaluation.offline_scoring import open_predictions
    from virst_jax.evaluation.submission import archive_root, check_submission, write_submission

    if (args.check is None) == (args.pred_dir is None):
        raise UserError("give either PRED_DIR with --out ZIP, or --check ZIP")
    source = open_dataset(args.dataset, args.data_root, args.split)
    archive_root(source.name)
    if args.check is not None:
        count = check_submission(source, args.check, progress=not args.quiet)
        print(f"{args.check}: complete, {count} masks of {len(source)} videos")
        return 0
    if args.out is None:
        raise UserError("--out ZIP is missing: where shall the zip go?")
    atomic.check_new(args.out, parents=False)
    read_pred = open_predictions(source, args.pred_dir).read_pred
    assert read_pred is not None  # only Ref-DAVIS17 has palette images, and it has no server
    count = write_submission(source, read_pred, args.out, progress=not args.quiet)
    print(f"{args.out}: {count} masks of {len(source)} videos, checked")
    return 0
