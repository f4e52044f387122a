"""`virst chat`: an answer in text."""

import argparse

from virst_jax.commands.segment import add_model_arguments, load_model

HELP = "Ask a question about a video; the answer is printed."
EXAMPLES = """examples:
  virst chat dog.mp4 "what happens in the video?" --model virst_7b
  virst chat dog.mp4 "what does the dog chase?" --model virst_7b --max-new-tokens 64"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", help="a video file, a folder of frames, or a picture")
    parser.add_argument("question")
    add_model_arguments(parser)
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--max-frames", type=int, metavar="N", help="frames to read at most (default: the model's)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most probable answer (default)")
    parser.add_argument("--seed", type=int, default=0, help="of a temperature above 0 (default: 0)")


def run(args: argparse.Namespace) -> int:
    from virst_jax.io.video import open_video

    video = open_video(args.video)  # before the model, which takes longer
    model = load_model(args.model, args.dtype)
    answer = model.chat(
        video,
        args.question,
        max_new_tokens=args.max_new_tokens,
        max_frames=args.max_frames,
        temperature=args.temperature,
        seed=args.seed,
    )
    print(answer)
    return 0
