"""Mask IoU between exact mode, which resizes segmentation frames as the release does, and the shared features.

python -m benchmarks.exact_mode [--model tiny] [--videos 20] [--height 480] [--width 640]

The videos are synthetic, of a size that has to be resized.
"""

import argparse

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import virst_jax
from benchmarks import run
from virst_jax.data.synthetic.videos import SyntheticVideos


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--videos", type=int, default=20)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=640)
    options = parser.parse_args()
    model = virst_jax.load(options.model)
    source = SyntheticVideos(options.videos, 10**6, size=(options.height, options.width))
    ious, there, pixels = [], [], []
    for index in tqdm(range(len(source)), unit="video"):
        video = source[index]
        texts = [expression.text for expression in video.expressions]
        exact, shared = (model.segment(video, texts, exact=on).masks for on in (True, False))
        union = (exact | shared).sum((2, 3))
        ious.append(((exact & shared).sum((2, 3)) / np.maximum(union, 1))[union > 0])
        there.append((exact.any((2, 3)) == shared.any((2, 3))).mean())
        pixels.append((exact == shared).mean())
    every = np.concatenate(ious)
    table = Table(title=f"{options.model}: exact and shared mode, {len(source)} videos")
    for column in ("masks", "mean IoU", "median IoU", "of 5 in 100 below", "equal pixels", "presence equal"):
        table.add_column(column, justify="right")
    shares = (every.mean(), np.median(every), np.quantile(every, 0.05), np.mean(pixels), np.mean(there))
    table.add_row(str(len(every)), *(f"{100 * x:.2f} %" for x in shares))
    Console().print(table)


if __name__ == "__main__":
    run(main)
