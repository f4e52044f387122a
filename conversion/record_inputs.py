"""Records what reaches the release's network: frames of video files, resized pixels and masks, and token ids.

    python -m conversion.record inputs --release VIRST --out cases --tokenizer DIR [--tokenizer DIR]

Writes the cases `reading`, `sizes` and `tokens`. Runs in the Python environment of the release, with decord,
torchvision and PyAV; JAX is not needed.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from virst_jax.errors import UserError
from virst_jax.io import atomic

from .recording.checkout import Release, open_checkout
from .recording.clips import KINDS, write_clip
from .recording.stubs import require
from .recording.texts import make_texts
from .recording.versions import versions
from .targets import ellipse_masks, scaled_ellipse
from .weights_rule import make_input, make_video

SIDE, VLM_SIDE = 1024, 448
LOW_RES = 64
SIZES = ((5, 4), (2, 300), (37, 53), (211, 97), (301, 1023), (480, 853), (641, 427), (1025, 1023), (1080, 1918))
CHOICES: tuple[dict[str, Any], ...] = (
    {"num_frames": 4, "sample": "middle"},
    {"num_frames": 64, "sample": "middle", "min_num_frames": 4},
    {"num_frames": 8, "sample": "dynamic_fps1", "local_num_frames": 4, "max_num_frames": 8},
)
TEXTS = 3000
HELP = "Record what reaches the release's network: frames of video files, resized pixels and masks, token ids."
EXAMPLES = """examples:
  virst record inputs --release VIRST --out cases --tokenizer VIRST/model/videochat

Runs in the Python environment of the release, with decord, torchvision and PyAV; JAX is not needed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--release", type=Path, required=True, metavar="DIR", help="checkout of the release")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of cases")
    parser.add_argument(
        "--tokenizer", type=Path, action="append", default=[], metavar="DIR", help="folder of a tokenizer; repeat it"
    )


def run(args: argparse.Namespace) -> int:
    """Records the cases and prints their names.

    Raises:
      UserError: a package is missing, or the release fails.
    """
    for folder in args.tokenizer:
        if not (folder / "vocab.json").is_file():
            raise UserError(f"{folder}: holds no vocab.json; give the folder of a Qwen2 tokenizer")
    with contextlib.ExitStack() as stack:
        clips = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        require("av")
        for salt, (name, kind) in enumerate(KINDS.items()):  # before decord, whose FFmpeg would stand in for PyAV's
            write_clip(clips / f"{name}{kind.suffix}", kind, salt)
        require("decord", "torchvision")
        quiet = stack.enter_context(open(os.devnull, "w"))
        printed = sys.stdout
        stack.enter_context(contextlib.redirect_stdout(quiet))
        release = stack.enter_context(open_checkout(args.release.resolve(), lambda line: print(line, file=sys.stderr)))
        todo: dict[str, Callable[[], tuple[dict[str, Any], dict[str, np.ndarray]]]] = {
            "reading": lambda: record_reading(release, clips),
            "sizes": lambda: record_sizes(release),
        }
        if args.tokenizer:
            todo["tokens"] = lambda: record_tokens(args.tokenizer)
        for name, record in todo.items():
            with release.blaming(f"its {name} cannot be recorded"):
                facts, arrays = record()
            _write(args.out, name, facts, arrays)
            print(args.out / f"{name}.json", file=printed)
    return 0


def _write(folder: Path, name: str, facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write_npz(folder / f"{name}.npz", arrays, compressed=True)
    atomic.write_json(folder / f"{name}.json", facts | {"versions": versions()})


def record_reading(release: Release, folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Frames of the files KINDS in `folder`: by decord, which the release reads videos with, and by PyAV, as its
    extraction of frames does, where that differs; and the frames that its reader chooses."""
    import av
    import decord

    reader = release.module("utils.video_utils").read_frames_decord
    rows: list[dict[str, Any]] = []
    arrays: dict[str, np.ndarray] = {}
    for name, kind in KINDS.items():
        path = folder / f"{name}{kind.suffix}"
        arrays[f"{name}.file"] = np.frombuffer(path.read_bytes(), np.uint8)
        opened = decord.VideoReader(str(path), num_threads=1)
        # in order: where a group of frames is open, decord shows wrong frames after it has jumped
        arrays[f"{name}.decord"] = np.stack([opened.next().asnumpy() for _ in range(len(opened))])
        with av.open(str(path)) as container:
            shown = np.stack([np.asarray(frame.to_rgb().to_image()) for frame in container.decode(video=0)])
        if not np.array_equal(shown, arrays[f"{name}.decord"]):
            arrays[f"{name}.av"] = shown
        row: dict[str, Any] = {"name": name, "suffix": kind.suffix, "choices": []}
        for choice in CHOICES:
            _, indices, fps, duration = reader(str(path), **choice)
            row["choices"].append({**choice, "fps": fps, "duration": duration, "indices": [int(i) for i in indices]})
        rows.append(row)
    return {"case": "reading", "videos": rows}, arrays


def record_sizes(release: Release) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Frames and masks of odd sizes as the network takes them, and masks brought back to these sizes."""
    from PIL import Image
    from torch.nn import functional

    import torch

    transforms = release.module("data.transforms")
    processor = release.module("model.videochat.vision_tower_builder").UMTImageProcessor(size=(VLM_SIDE, VLM_SIDE))
    load_image = release.module("model.sam2.utils.misc")._load_img_as_tensor
    arrays: dict[str, np.ndarray] = {}
    ellipse: dict[str, Any] = {"center": [0.5, 0.4], "velocity": [0, 0], "radii": [0.3, 0.35], "absent": []}
    for salt, (height, width) in enumerate(SIZES):
        frame, name = make_video(1, height, width, salt=salt)[0], f"{height}x{width}"
        seen = processor.preprocess(frame[None], return_tensors="pt")["pixel_values"]
        arrays[f"{name}.vlm"] = np.asarray(seen, np.float32)[0, :, ::32, ::32]
        picture = Image.fromarray(frame)
        arrays[f"{name}.sam"] = transforms.SAM2Transform(size=SIDE)(picture)[0].numpy()[:, ::64, ::64]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "frame.png"
            picture.save(path)
            arrays[f"{name}.track"] = load_image(str(path), SIDE)[0].float().numpy()[:, ::64, ::64]
        mask = ellipse_masks(scaled_ellipse(ellipse, height, width), 1, max(height, width))[0, :height, :width]
        arrays[f"{name}.mask"] = np.packbits(transforms.SAM2MaskTransform(SIDE)(mask)[::4, ::4].numpy())
        logits = torch.from_numpy(make_input(f"sizes.{name}", (1, 1, LOW_RES, LOW_RES)))
        back = functional.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)
        arrays[f"{name}.back"] = np.packbits((back[0, 0] > 0).numpy())
    facts = {"case": "sizes", "sizes": [list(size) for size in SIZES], "mask": ellipse}
    return facts | {"side": SIDE, "vlm_side": VLM_SIDE, "low_res": LOW_RES}, arrays


def record_tokens(folders: list[Path]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Ids of many texts by each tokenizer, loaded as the release loads its own."""
    from transformers import AutoTokenizer

    texts = make_texts(TEXTS)
    arrays: dict[str, np.ndarray] = {}
    sizes: dict[str, int] = {}
    for number, folder in enumerate(folders):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), model_max_length=4096, padding_side="right")
        tokenizer.add_tokens(["[SEG]"])
        rows = [tokenizer(text).input_ids for text in texts]
        sizes[str(number)] = len(tokenizer.get_vocab())
        arrays[f"{number}.ids"] = np.concatenate([np.asarray(row, np.int32) for row in rows])
        arrays[f"{number}.lengths"] = np.asarray([len(row) for row in rows], np.int32)
    return {"case": "tokens", "texts": texts, "vocabularies": sizes}, arrays
