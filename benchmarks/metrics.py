"""J and F against the algorithm as it was published, on the same masks in the same run.

    python -m benchmarks.metrics [--frames 12] [--repeats 5] [--json FILE]

The published one works on whole frames: outlines by shifted copies, dilation with a disk by OpenCV, sums over pixels.
It needs OpenCV (pip install opencv-python-headless), which nothing else here does. Both use one thread. Times are the
least of the repeats, which take turns, so that what else the machine does meets both. Exit status 1 if a score differs
by more than 1e-12 or the total is less than four times as fast.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco
from rich.console import Console
from rich.table import Table

from virst_jax.evaluation import bitmask
from virst_jax.evaluation.rle import pack_codes
from virst_jax.io.masks import encode_mask

SIZES = ((480, 854), (720, 1280), (1080, 1920))
SHARES = {"small": 0.06, "medium": 0.2, "large": 0.4, "whole frame": 0.7}  # radius of the object, of the height
TOLERATED, WANTED = 1e-12, 4.0


def blob(rng: np.random.Generator, size: tuple[int, int], radius: float, centre: tuple[float, float]) -> np.ndarray:
    """An object with a wavy outline: bool[H, W]."""
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    y, x = y - centre[0], (x - centre[1]) / 1.4
    angle, waves = np.arctan2(y, x), rng.integers(3, 12)
    return np.hypot(y, x) < radius * (1 + 0.12 * np.sin(waves * angle + rng.random()) + 0.03 * np.sin(31 * angle))


def make_pairs(size: tuple[int, int], share: float, frames: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Predictions and annotations of frames: mostly near each other, some far apart, some empty."""
    rng = np.random.default_rng(round(1000 * share) + size[0])
    pairs = []
    for i in range(frames):
        centre = tuple(np.array(size) * rng.uniform(0.35, 0.65, 2))
        radius = share * size[0]
        gt = blob(rng, size, radius, centre)
        shift = rng.normal(0, (0.02 if i % 4 else 0.3) * radius, 2)
        pred = blob(rng, size, radius * rng.uniform(0.95, 1.05), (centre[0] + shift[0], centre[1] + shift[1]))
        pairs.append((pred & (i % 8 != 7), gt & (i % 8 != 6)))
    return pairs


def published() -> Callable[[np.ndarray, np.ndarray], tuple[float, float]]:
    """J and F of a frame, uint8[H, W] of 0 and 1 each, by the published algorithm."""
    try:
        import cv2
    except ImportError:
        sys.exit("the published algorithm needs OpenCV: pip install opencv-python-headless")
    cv2.setNumThreads(1)

    def outline(mask: np.ndarray) -> np.ndarray:
        east, south, south_east = (np.zeros_like(mask) for _ in range(3))
        east[:, :-1], south[:-1], south_east[:-1, :-1] = mask[:, 1:], mask[1:], mask[1:, 1:]
        lines = (mask ^ east) | (mask ^ south) | (mask ^ south_east)
        lines[-1], lines[:, -1] = mask[-1] ^ east[-1], mask[:, -1] ^ south[:, -1]
        lines[-1, -1] = False
        return lines

    def scores(pred: np.ndarray, gt: np.ndarray) -> tuple[float, float]:
        pred, gt = pred.astype(bool), gt.astype(bool)
        union = np.sum(pred | gt)
        j = float(np.sum(pred & gt) / union) if union else 1.0
        radius = math.ceil(bitmask.BOUNDARY_TOLERANCE * np.linalg.norm(pred.shape))
        y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
        disk = (x * x + y * y <= radius * radius).astype(np.uint8)
        lines = [outline(pred), outline(gt)]
        near = [cv2.dilate(line.astype(np.uint8), disk) for line in lines]
        counts = [np.sum(line) for line in lines]
        if not all(counts):
            return j, float(counts[0] == counts[1])
        precision, recall = np.sum(lines[0] * near[1]) / counts[0], np.sum(lines[1] * near[0]) / counts[1]
        return j, float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0

    return scores


def ours(pred: np.ndarray, gt: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """J and F of packed frames uint64[T, H, D]."""
    counts = bitmask.count_frames(pred, gt, size[1], bitmask.boundary_radius(*size))
    return np.where(counts.union == 0, 1.0, counts.intersection / np.maximum(counts.union, 1)), counts.boundary


def take_turns(functions: list[Callable[[], object]], repeats: int) -> list[float]:
    """Least seconds of each."""
    least = [math.inf] * len(functions)
    for _ in range(repeats):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            least[i] = min(least[i], time.perf_counter() - start)
    return least


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=12, help="of each size and kind")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    plain = published()
    rows: list[dict[str, Any]] = []
    for size in SIZES:
        for kind, share in SHARES.items():
            pairs = make_pairs(size, share, args.frames)
            arrays = [(p.astype(np.uint8), g.astype(np.uint8)) for p, g in pairs]
            pred, gt = (np.stack(masks) for masks in zip(*pairs, strict=True))
            codes = [[encode_mask(mask) for mask in masks] for masks in (pred, gt)]

            def decoded(texts: list[str], size: tuple[int, int] = size) -> list[np.ndarray]:
                return [coco.decode({"size": list(size), "counts": text.encode()}) for text in texts]

            expected = np.array([plain(p, g) for p, g in arrays])
            got = np.stack(ours(bitmask.pack(pred), bitmask.pack(gt), size), axis=1)
            worst = float(np.abs(got - expected).max())
            seconds = take_turns(
                [
                    lambda arrays=arrays: [plain(p, g) for p, g in arrays],  # type: ignore[misc]
                    lambda pred=pred, gt=gt, size=size: ours(bitmask.pack(pred), bitmask.pack(gt), size),  # type: ignore[misc]
                    lambda codes=codes: [plain(p, g) for p, g in zip(*map(decoded, codes), strict=True)],  # type: ignore[misc]
                    lambda codes=codes, size=size: ours(pack_codes(codes[0], size), pack_codes(codes[1], size), size),  # type: ignore[misc]
                ],
                args.repeats,
            )
            times = [1000 * s / args.frames for s in seconds]
            rows.append({"size": list(size), "object": kind, "milliseconds": times, "difference": worst})

    table = Table(title="J and F of a frame, milliseconds")
    for column in (
        "frame",
        "object",
        "published",
        "ours",
        "ratio",
        "published, RLE",
        "ours, RLE",
        "ratio",
        "differ",
    ):
        table.add_column(column, justify="left" if column in ("frame", "object") else "right")
    for row in rows:
        a, b, c, d = row["milliseconds"]
        figures = [f"{a:.2f}", f"{b:.2f}", f"{a / b:.1f}", f"{c:.2f}", f"{d:.2f}", f"{c / d:.1f}"]
        table.add_row("x".join(map(str, row["size"])), row["object"], *figures, f"{row['difference']:.0e}")
    Console(width=110).print(table)
    totals = np.sum([row["milliseconds"] for row in rows], axis=0)
    ratios = [float(totals[0] / totals[1]), float(totals[2] / totals[3])]
    least = min(row["milliseconds"][0] / row["milliseconds"][1] for row in rows)
    print(f"in all {ratios[0]:.1f} times as fast, from run-length codes {ratios[1]:.1f}; least ratio {least:.1f}")
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "ratios": ratios}, indent=1) + "\n")
    good = ratios[0] >= WANTED and all(row["difference"] <= TOLERATED for row in rows)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
