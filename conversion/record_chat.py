"""Records how the release answers in text about the video of an end-to-end case.

    python -m conversion.record chat CASE.json --release VIRST [--checkpoint DIR --question TEXT] --out cases

Writes a case chat_NAME: the answer's tokens and their logits. Runs in the Python environment of the release.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from virst_jax.errors import UserError
from virst_jax.io import atomic

from .record import sources, vocabulary
from .recording.chat import before_answer, question_ids, run_answer
from .recording.checkout import build_network, load_tokenizer, open_checkout
from .recording.inputs import from_like, read_like
from .recording.run import prepare
from .recording.state import Rule
from .recording.versions import versions

ENDS = (151645, 151643)  # <|im_end|>, <|endoftext|>
TAKEN = ("config", "n_frames", "sam_idx", "hw", "t_vlm", "manifest", "video", "clip", "vlm_idx", "video_salt", "labels")
HELP = "Record how the release answers in text about the video of an end-to-end case."
EXAMPLES = """examples:
  virst record chat cases/e2e_dog.json --release VIRST --checkpoint checkpoints --question "what happens?" --out cases

Runs in the Python environment of the release (torch; JAX is not needed)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("case", type=Path, metavar="CASE.json", help="a case e2e_*, whose video is asked about")
    parser.add_argument("--release", type=Path, required=True, metavar="DIR", help="checkout of the release")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="videochat/, sam2.1_hiera_large.pt and the .pt")
    for name in ("videochat", "sam2", "virst"):
        parser.add_argument(f"--{name}", type=Path, metavar="PATH", help="instead of --checkpoint, one by one")
    parser.add_argument("--trust-checkpoint", action="store_true", help="unpickle the .pt whatever it holds")
    parser.add_argument("--question", metavar="TEXT", help="asked in VideoChat-Flash's words (default: as in the case)")
    parser.add_argument("--tokens", type=int, default=16, metavar="N", help="of the answer, at most (16)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of cases")


def run(args: argparse.Namespace) -> int:
    """Records and prints the name of the case.

    Raises:
      UserError: no such case or checkpoint, or a run that fails.
    """
    if args.tokens < 1:
        raise UserError(f"--tokens {args.tokens}: give 1 or more")
    like = read_like(args.case)
    args.rule_weights = like.facts.get("salt")
    origin = sources(args)
    sizes = like.facts["config"].get("tiny")
    if isinstance(origin, Rule) and args.question:
        raise UserError("--question needs a network that knows the tokenizer's words: give a case of a checkpoint")
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="record-")))
        printed = sys.stdout
        stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        release = stack.enter_context(open_checkout(args.release.resolve(), lambda line: print(line, file=sys.stderr)))
        if args.dtype == "float32" or args.device == "cpu":
            release.module("model.videochat.vision_tower_builder").use_flash_attn = False
        network = build_network(
            release,
            origin,
            tiny={key: value for key, value in sizes.items() if key != "vocab_size"} if sizes else None,
            initial_fusion=False,
            attention="eager" if args.dtype == "float32" else "sdpa",
            **vocabulary(None, like),
        )
        inputs = from_like(release, network.virst.get_vision_tower().image_processor, like, root)
        prepare(network.virst, args.device, args.dtype)
        prompt, tokenizer = before_answer(inputs.input_ids, inputs.labels), None
        if args.question:
            tokenizer = load_tokenizer(release)
            prompt = question_ids(release, tokenizer, args.question)
        with release.blaming("it does not answer"):
            answer = run_answer(network.virst, inputs.images_clip, prompt, args.tokens, ENDS, args.device)
    name = f"chat_{args.case.stem.removeprefix('e2e_')}"
    facts: dict[str, Any] = {key: like.facts[key] for key in TAKEN if key in like.facts}
    facts |= {
        "case": name,
        "salt": like.facts.get("salt"),
        "state": network.state,
        "dtype": args.dtype,
        "versions": versions(),
    }
    # the rule's clip is named by the case that it was made for
    facts["clip"] = inputs.clip
    facts |= {"prompt_ids": prompt, "answer_ids": answer.tokens, "question": args.question}
    if tokenizer is not None:
        facts["answer"] = tokenizer.decode(answer.tokens)
    arrays = {"ids": answer.ids, "logits": answer.logits, "rest": answer.rest}
    if inputs.video["from"] == "npz":
        arrays["frames"] = inputs.frames
    args.out.mkdir(parents=True, exist_ok=True)
    atomic.write_npz(args.out / f"{name}.npz", {k: np.asarray(v) for k, v in arrays.items()}, compressed=True)
    atomic.write_json(args.out / f"{name}.json", facts)
    print(args.out / f"{name}.json", file=printed)
    return 0
