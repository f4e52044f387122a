"""`virst demo`: the sample clip of the package by several sentences, with the small model of the package.

The clip was made by data.synthetic: 32 frames of 256 x 256 pixels, 8 a second.
"""

import argparse
from pathlib import Path

from virst_jax.commands.segment import run_segment
from virst_jax.errors import UserError

HELP = """Segment the sample clip of this package (moving shapes) by several sentences with the small model "tiny".

No download is needed. It was trained on such shapes and knows nothing else."""
EXAMPLES = """examples:
  virst demo
  virst demo --out masks --model virst_7b"""

CLIP = Path(__file__).parents[1] / "assets" / "demo.mp4"
EXPRESSIONS = (
    "the cyan cross",  # how it looks
    "the shape that stays still",  # how it moves
    "the one that appears last",  # when it is there
    "what will leave the frame first?",  # a question
    "the cyan shapes",  # several
    "the green circle",  # nothing: there is none
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("virst_demo"), help="folder to write (default: %(default)s)")
    parser.add_argument("--model", default="tiny", help="(default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with what an interrupted run has left in OUT")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    if not CLIP.is_file():
        raise UserError(f"{CLIP}: the sample clip is missing; install the package again")
    run_segment(str(CLIP), EXPRESSIONS, args.out, model=args.model, resume=args.resume, quiet=args.quiet)
    print(f"wrote {args.out}: look at overlay.mp4 and preview.png")
    return 0
