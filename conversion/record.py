"""Records a parity case with the PyTorch release: the numbers that the converted network has to give.

    python -m conversion.record --release VIRST --checkpoint VIRST/checkpoints \
        --video dog.mp4 --expression "the dog that jumps" --out cases

Runs in the Python environment of the release (torch, no JAX) and needs a checkout of it; docs/recording.md tells how.
"""

import argparse
import contextlib
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from virst_jax import cli
from virst_jax.errors import UserError

from .recording.blocks import SUFFIX, Blocks, write_blocks
from .recording.case import PREFIX, check_place, differences, write_case
from .recording.checkout import TINY, Network, Release, build_network, load_tokenizer, open_checkout
from .recording.inputs import Inputs, Like, from_like, from_video, read_frames, read_like
from .recording.run import Record, prepare, run_release
from .recording.state import Files, Rule
from .recording.stubs import require

SAM2 = "sam2.1_hiera_large.pt"
INPUTS = (
    "frames: npz 'frames' uint8 [T, H, W, 3] RGB when video.from is 'npz', "
    "else make_video(n_frames, *hw, salt=video.salt); "
    "tracked frames: every frame, PIL BICUBIC resize to image_size, /255, ImageNet normalise; "
    "images_sam: frames sam_idx, PIL BILINEAR resize to image_size, /255, ImageNet normalise; "
    "images_clip: frames vlm_idx, PIL BICUBIC resize to the vision size, /255, ImageNet normalise, "
    "when clip.from is 'frames', else make_input(clip.name, (1, t_vlm, 3, size, size), clip.salt), already normalised; "
    "in a bfloat16 run images_sam and images_clip are cast to bfloat16"
)


WITHIN = {
    "training": "conversion.record_training",
    "inputs": "conversion.record_inputs",
    "chat": "conversion.record_chat",
    "sam2": "conversion.record_sam2",
}
HELP = "Record a parity case with the PyTorch release: the numbers that the converted network has to give."
EXAMPLES = """examples:
  virst record --release VIRST --checkpoint VIRST/checkpoints --video dog.mp4 --expression "the dog" --out cases
  virst record training tests/data/parity/train_loss.json --release VIRST --out cases      # gradients

Runs in the Python environment of the release (torch; JAX is not needed)."""


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--release", type=Path, required=True, metavar="DIR", help="checkout of the release")
    state = p.add_argument_group("parameters: a checkpoint, or the rule")
    state.add_argument("--checkpoint", type=Path, metavar="DIR", help="videochat/, sam2.1_hiera_large.pt and the .pt")
    state.add_argument("--videochat", type=Path, metavar="DIR", help="folder of VideoChat-Flash-Qwen2-7B")
    state.add_argument("--sam2", type=Path, metavar="FILE", help="sam2.1_hiera_large.pt")
    state.add_argument("--virst", type=Path, metavar="FILE", help="the release's .pt")
    state.add_argument("--trust-checkpoint", action="store_true", help="unpickle the .pt whatever it holds")
    state.add_argument("--rule-weights", type=int, metavar="SALT", help="make them by rule; needs a small network")
    state.add_argument("--tiny", action="store_true", help="the sizes of the small parity cases")
    inputs = p.add_argument_group("inputs: a video and an expression, or an earlier case")
    inputs.add_argument("--video", type=Path, metavar="PATH", help="video file, or folder of JPEG frames")
    inputs.add_argument("--expression", metavar="TEXT", help="the referring expression")
    inputs.add_argument("--max-frames", type=int, metavar="N", help="use the first N frames only")
    inputs.add_argument("--seed", type=int, default=42, help="of the choice of frames and prompt (42)")
    inputs.add_argument("--like", type=Path, metavar="CASE.json", help="take sizes, video and tokens from a case")
    run_of = p.add_argument_group("the run")
    run_of.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    run_of.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    run_of.add_argument("--attention", choices=("eager", "sdpa"), help="of the LLM (eager; sdpa in bfloat16)")
    run_of.add_argument("--initial-fusion", action="store_true", help="enable it (the release's evaluation does not)")
    run_of.add_argument("--encode-batch", type=int, default=4, metavar="N", help="frames encoded at a time, 0: all (4)")
    run_of.add_argument(
        "--blocks",
        action="store_true",
        help="also write what every block gives, for `virst parity bisect`: NAME.blocks.npz, about 2 GB and 70 MB a "
        "frame for the full network",
    )
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of cases; NAME.json and NAME.npz")
    p.add_argument("--name", help="of the case: e2e_... (from the video's name)")


def sources(args: argparse.Namespace) -> Rule | Files:
    """Where the parameters come from.

    Raises:
      UserError: nothing or too much is named, or a file is not there.
    """
    named: dict[str, Any] = {"--videochat": args.videochat, "--sam2": args.sam2, "--virst": args.virst}
    if args.rule_weights is not None:
        if args.checkpoint or any(named.values()):
            raise UserError("--rule-weights makes all parameters: leave out the options that name a checkpoint")
        return Rule(args.rule_weights)
    if args.checkpoint:
        if not args.checkpoint.is_dir():
            raise UserError(f"{args.checkpoint}: no such folder; give the release's checkpoints as --checkpoint")
        named["--videochat"] = args.videochat or args.checkpoint / "videochat"
        named["--sam2"] = args.sam2 or args.checkpoint / SAM2
        named["--virst"] = args.virst or _only_pt(args.checkpoint)
    missing = [option for option, path in named.items() if path is None]
    if missing:
        raise UserError(f"no parameters: give --checkpoint DIR, or {', '.join(missing)} too, or --rule-weights SALT")
    for option, path in named.items():
        if not (path.is_dir() if option == "--videochat" else path.is_file()):
            kind = "folder" if option == "--videochat" else "file"
            raise UserError(f"{path}: no such {kind}; give it as {option}")
    return Files(named["--videochat"], named["--sam2"], named["--virst"], args.trust_checkpoint)


def _only_pt(folder: Path) -> Path:
    found = sorted(p for p in folder.glob("*.pt") if p.name != SAM2)
    if len(found) != 1:
        have = ", ".join(p.name for p in found) or "none"
        raise UserError(f"{folder}: which .pt is the release's checkpoint (found: {have})? give it as --virst")
    return found[0]


def record(args: argparse.Namespace) -> tuple[Path, ...]:
    """Records the case that the command line asks for; returns its files.

    Raises:
      UserError: bad arguments, a file that is missing or damaged, a package that is missing, a run that fails.
    """
    origin = sources(args)
    _check(args)
    like = read_like(args.like) if args.like else None
    tiny = _small_sizes(args, like)
    if isinstance(origin, Rule) and tiny is None:
        raise UserError("--rule-weights fills a small network: add --tiny, or --like a small case")
    name = args.name or _name(args, like)
    check_place(args.out, name)
    _check_device(args.device)
    frames = read_frames(args.video, args.max_frames) if like is None else None
    attention = args.attention or ("eager" if args.dtype == "float32" else "sdpa")
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="record-")))
        quiet = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(quiet))  # the release prints much
        release = stack.enter_context(open_checkout(args.release.resolve(), warn=_warn))
        if args.dtype == "float32" or args.device == "cpu":
            vision = release.module("model.videochat.vision_tower_builder")
            vision.use_flash_attn = False  # it knows half precision on GPUs only
        tokenizer = load_tokenizer(release) if like is None else None
        network = build_network(
            release,
            origin,
            tiny=tiny,
            initial_fusion=args.initial_fusion or bool(like and like.facts["config"].get("initial_seg_fusion")),
            attention=attention,
            **vocabulary(tokenizer, like),
        )
        processor = network.virst.get_vision_tower().image_processor
        if frames is not None:
            with release.blaming("its data set fails"):
                inputs = from_video(release, tokenizer, processor, frames, args.expression, args.seed, root)
        else:
            assert like is not None
            inputs = from_like(release, processor, like, root)
        prepare(network.virst, args.device, args.dtype)
        blocks = Blocks() if args.blocks else None
        with release.blaming("its forward pass fails"):
            done = run_release(
                network.virst,
                inputs,
                device=args.device,
                dtype=args.dtype,
                encode_batch=args.encode_batch,
                blocks=blocks,
            )
        facts = _facts(args, name, release, network, inputs, done)
        arrays = dict(done.arrays)
        if inputs.video["from"] == "npz":
            arrays["frames"] = inputs.frames
        paths: tuple[Path, ...] = write_case(args.out, name, facts, arrays)
        if blocks:
            beside = args.out / (name + SUFFIX)
            write_blocks(beside, blocks.arrays, _warn)
            paths += (beside,)
    if like is not None and isinstance(origin, Rule) and like.facts.get("salt") == origin.salt:
        _print_differences(like, done)
    return paths


def _print_differences(like: Like, done: Record) -> None:
    """How far a recording is from the case whose inputs and parameters it repeats."""
    if not like.arrays.is_file():
        return
    theirs = differences(done.arrays, done.strides, like.arrays, like.facts.get("strides") or {})
    for key, value in theirs.items():
        print(f"{key:24s} {value:.2e}  against {like.path.stem}")


def _check_device(device: str) -> None:
    require("torch")
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; give --device cpu")


def _check(args: argparse.Namespace) -> None:
    if args.like is None and (args.video is None or not args.expression or not args.expression.strip()):
        raise UserError("no inputs: give --video and --expression, or --like CASE.json")
    if args.like is not None and (args.video or args.expression or args.max_frames):
        raise UserError("--like takes its inputs from a case: leave out --video, --expression and --max-frames")
    if args.max_frames is not None and args.max_frames < 1:
        raise UserError(f"--max-frames {args.max_frames}: give 1 or more")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed {args.seed}: give a number from 0 to 4294967295")
    if args.encode_batch < 0:
        raise UserError(f"--encode-batch {args.encode_batch}: give 1 or more, or 0 for all at once")


def _small_sizes(args: argparse.Namespace, like: Like | None) -> dict[str, Any] | None:
    tiny = like.facts["config"].get("tiny") if like else None
    return {k: v for k, v in tiny.items() if k != "vocab_size"} if tiny else TINY if args.tiny else None


def vocabulary(tokenizer: Any, like: Like | None) -> dict[str, int]:
    """Rows of the token table, and the id of `[SEG]`: of a tokenizer, or as an earlier case has them."""
    if tokenizer is not None:
        return {"vocab_size": len(tokenizer), "seg_token_id": tokenizer.convert_tokens_to_ids("[SEG]")}
    assert like is not None
    config, table = like.facts["config"], (like.facts.get("manifest") or {}).get("model.embed_tokens.weight")
    rows = (config.get("tiny") or {}).get("vocab_size") or (table[0] if table else int(config["seg_token_id"]) + 1)
    return {"vocab_size": int(rows), "seg_token_id": int(config["seg_token_id"])}


def _name(args: argparse.Namespace, like: Like | None) -> str:
    if like is not None:
        return str(like.facts["case"])
    stem = "".join(c if c.isascii() and c.isalnum() else "_" for c in args.video.resolve().stem)
    return f"{PREFIX}{stem}"


def _facts(
    args: argparse.Namespace,
    name: str,
    release: Release,
    network: Network,
    inputs: Inputs,
    done: Record,
) -> dict[str, Any]:
    import numpy
    import PIL
    import transformers

    import torch

    facts: dict[str, Any] = {
        "case": name,
        "salt": network.state.get("salt"),
        "config": network.config,
        "n_frames": len(inputs.frames),
        "sam_idx": inputs.sam_idx,
        "hw": list(inputs.frames.shape[1:3]),
        "input_ids": inputs.input_ids,
        "labels": inputs.labels,
        "t_vlm": len(inputs.images_clip),
        "cond_frames": sorted(set(done.anchors)),
        "manifest": network.manifest,
        "inputs": INPUTS,
        "video": inputs.video,
        "clip": inputs.clip,
        "vlm_idx": inputs.vlm_idx,
        "anchors": done.anchors,
        "expression": inputs.expression,
        "prompt": inputs.prompt,
        "state": network.state,
        "strides": done.strides,
        "dtype": args.dtype,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "attention": network.attention,
        "seed": args.seed if args.like is None else None,
        "like": args.like.stem if args.like else None,
        "release": {"commit": release.commit, "stubs": release.stubs},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": numpy.__version__,
            "pillow": PIL.__version__,
        },
    }
    if inputs.video["from"] == "make_video":
        facts["video_salt"] = inputs.video["salt"]
    return facts


def _warn(line: str) -> None:
    print(line, file=sys.stderr)


def run(args: argparse.Namespace) -> int:
    """Records and prints the names of the files.

    Raises:
      UserError: see `record`.
    """
    for path in record(args):
        print(path)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return cli.call(sys.modules[__name__], argv, "python -m conversion.record")


if __name__ == "__main__":
    sys.exit(main())
