"""`virst chat`: an answer in text."""

import argparse
import json

from virst_jax.commands import _common
from virst_jax.errors import UserError
from virst_jax.io import small_model

HELP = """Ask a question about a video; the answer is printed.

It needs a converted model: the small one of this package segments, and was not taught to answer."""
EXAMPLES = """examples:
  virst chat dog.mp4 "what happens in the video?" --model virst_7b
  virst chat dog.mp4 "what does the dog chase?" --model virst_7b --max-new-tokens 64"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", help=_common.VIDEO_HELP)
    parser.add_argument("question")
    _common.add_model_arguments(parser)
    _common.add_video_arguments(parser)
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--max-frames", type=int, metavar="N", help="frames to read at most (default: the model's)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most probable answer (default)")
    parser.add_argument("--seed", type=int, default=0, help="of a temperature above 0 (default: 0)")
    parser.add_argument("--json", action="store_true", help="print question and answer as JSON")


def run(args: argparse.Namespace) -> int:
    from virst_jax.io.video import open_video

    if small_model.is_small(args.model):  # before anything is loaded
        raise UserError(small_model.NO_ANSWERS)
    # before the model, which takes longer
    video = open_video(args.video, fps=args.fps, allow_damaged=args.allow_damaged)
    model = _common.load_model(args)
    answer = model.chat(
        video,
        args.question,
        max_new_tokens=args.max_new_tokens,
        max_frames=args.max_frames,
        temperature=args.temperature,
        seed=args.seed,
    )
    if args.json:
        print(json.dumps({"video": args.video, "question": args.question, "answer": answer}, ensure_ascii=False))
    else:
        print(answer)
    return 0
