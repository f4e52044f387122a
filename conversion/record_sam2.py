"""Records what the original SAM 2.1 (PyPI sam2 1.1.0) gives: images, videos with corrections, blocks at full width.

    python -m conversion.record sam2 --out cases [--size tiny ...]

Needs torch, torchvision and sam2 (`SAM2_BUILD_CUDA=0 pip install sam2==1.1.0`), and no JAX.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from virst_jax.io import atomic

from .recording.sam2 import BLOCK_GRID, CONFIGS, IMAGE_SIZE, build, run_blocks, run_images, run_video, video_of
from .recording.stubs import require
from .recording.versions import versions

SALT = 1
BLOCKS = {"tiny": [3, 5], "small": [3, 7], "base_plus": [5, 12], "large": [8, 23]}  # the third stage's first; a global
PROMPTS: list[dict[str, Any]] = [
    {"points": [[40, 50]], "labels": [1], "several": True},
    {"points": [[40, 50]], "labels": [1], "several": False},
    {"points": [[40, 50], [100, 90], [20, 110]], "labels": [1, 0, 1], "several": False},
    {"box": [20, 30, 90, 100], "several": False},
    {"box": [20, 30, 90, 100], "points": [[60, 70]], "labels": [0], "several": True},
    {"points": [[44, 52]], "labels": [0], "several": False, "previous": 0},
]
VIDEO: dict[str, Any] = {"n_frames": 8, "hw": [90, 122]}
OPERATIONS: list[dict[str, Any]] = [
    {"do": "points", "object": 1, "frame": 0, "points": [[40, 45]], "labels": [1]},
    {"do": "points", "object": 2, "frame": 0, "points": [[70, 30], [100, 80]], "labels": [1, 0]},
    {"do": "points", "object": 3, "frame": 2, "box": [20, 20, 80, 70]},
    {"do": "points", "object": 1, "frame": 0, "points": [[50, 20]], "labels": [0], "replace": False},
    {"do": "mask", "object": 4, "frame": 0, "ellipse": [45, 60, 20, 30]},
    {"do": "track", "start": 0},
    {"do": "points", "object": 1, "frame": 4, "points": [[50, 50], [90, 20]], "labels": [1, 0]},
    {"do": "points", "object": 3, "frame": 5, "box": [30, 10, 90, 60], "points": [[60, 40]], "labels": [1]},
    {"do": "mask", "object": 2, "frame": 6, "ellipse": [30, 70, 15, 25]},
    {"do": "mask", "object": 4, "frame": 5, "ellipse": [0, 0, 0, 0]},
    {"do": "track", "start": 4},
    {"do": "track", "start": 6, "backward": True},
    {"do": "points", "object": 2, "frame": 3, "points": [[30, 60]], "labels": [1]},
    {"do": "track", "start": 3, "backward": True},
]
SHORT = [*OPERATIONS[:2], {"do": "track", "start": 0}]
HELP = "Record what the original SAM 2.1 gives: images, videos with corrections, blocks at full width."
EXAMPLES = """examples:
  SAM2_BUILD_CUDA=0 pip install sam2==1.1.0
  virst record sam2 --out cases

Needs torch and torchvision; JAX is not needed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of cases")
    parser.add_argument("--size", nargs="+", choices=list(CONFIGS), default=list(CONFIGS), help="all, if left out")


def run(args: argparse.Namespace) -> int:
    """Records the cases and prints their names.

    Raises:
      UserError: a package is missing.
    """
    require("torchvision", "sam2")
    args.out.mkdir(parents=True, exist_ok=True)
    common: dict[str, Any] = {"salt": SALT, "versions": versions()}
    for size in args.size:
        predictor, manifest = build(size, SALT)
        sized: dict[str, Any] = common | {"size": size, "image_size": IMAGE_SIZE, "manifest": manifest}
        video = sized | VIDEO | {"operations": OPERATIONS if size == "tiny" else SHORT}
        _write(args.out, f"sam2_video_{size}", video, run_video(predictor, video_of(video), video["operations"]))
        image = sized | {
            "n_frames": 1,
            "hw": [IMAGE_SIZE, IMAGE_SIZE],
            "prompts": PROMPTS if size == "tiny" else PROMPTS[:1],
        }
        pictures = run_images(predictor, video_of(image)[0], image["prompts"])
        _write(args.out, f"sam2_image_{size}", image, pictures)
    blocks = {size: BLOCKS[size] for size in args.size}
    manifest, arrays = run_blocks(blocks, SALT)
    _write(args.out, "sam2_blocks", common | {"manifest": manifest, "blocks": blocks, "grid": BLOCK_GRID}, arrays)
    return 0


def _write(folder: Path, name: str, facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    atomic.write_npz(folder / f"{name}.npz", arrays, compressed=True)
    atomic.write_json(folder / f"{name}.json", {"case": name} | facts)
    print(folder / f"{name}.json", file=sys.stdout)
