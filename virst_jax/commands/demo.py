"""`virst demo`: the sample clip of the package by several sentences, with the small model of the package."""

import argparse
from pathlib import Path

from virst_jax.commands import _common, segment
from virst_jax.errors import UserError
from virst_jax.io.small_model import CLIP, EXPRESSIONS

HELP = """Segment the sample clip of this package (moving shapes) by several sentences with the small model "tiny".

No download is needed. It was trained on such shapes and knows nothing else."""
EXAMPLES = """examples:
  virst demo
  virst demo --out masks --model virst_7b"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("virst_demo"), help="folder to write (default: %(default)s)")
    _common.add_model_arguments(parser)
    segment.add_output_arguments(parser)
    parser.set_defaults(**_DEFAULTS)


# options of `virst segment` that the clip leaves no choice about
_DEFAULTS: dict[str, object] = {
    "fps": None,
    "allow_damaged": False,
    "seed": 0,
    "exact": False,
    "every": 1,
    "max_frames": None,
}
_DEFAULTS |= {"start": 0, "end": None, "instances": False, "soft": False}


def run(args: argparse.Namespace) -> int:
    if not CLIP.is_file():
        raise UserError(f"{CLIP}: the sample clip is missing; install the package again")
    args.at_home = True  # shapes are what the small model knows
    result = segment.run_segment(args, str(CLIP), EXPRESSIONS)
    segment.report(args, result)
    if not args.json:
        print("look at overlay.mp4 and preview.png in it")
    return 0
