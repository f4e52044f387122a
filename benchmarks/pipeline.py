"""Samples a second that the training pipeline makes, for a network's sizes, from videos on disk.

python -m benchmarks.pipeline [--config virst_7b] [--threads 2] [--samples 8]

The videos are made up, 480 x 854 JPEG in MeViS layout, so decoding, resizing, masks and prompts are all there.
"""

import argparse
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.mevis_folder import write_folder
from virst_jax.config import get_preset
from virst_jax.data.batches import BatchConfig, SegmentationMaker
from virst_jax.data.pipeline import batches
from virst_jax.data.prompts import load_tokenizer
from virst_jax.data.sources import make_source

TOKENIZER = Path(__file__).parents[1] / "virst_jax" / "assets" / "tiny" / "tokenizer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="virst_7b")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=8)
    options = parser.parse_args()
    cfg, tokenizer = get_preset(options.config), load_tokenizer(TOKENIZER)
    kinds = {
        "stage 1 size: one frame of a video": BatchConfig(kind="video", vlm_frames=4, seg_frames=1, text_length=512),
        "stage 2: 12 frames, 3 anchors": BatchConfig(kind="video", vlm_frames=12, seg_frames=12, text_length=512),
        "stage 3: propagation": BatchConfig(
            kind="video", vlm_frames=12, seg_frames=12, text_length=512, propagate=True
        ),
    }
    table = Table(title=f"{options.config}, {options.threads} threads")
    table.add_column("samples")
    table.add_column("a second", justify="right")
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), num_videos=4, size=(480, 854), num_frames=24)
        source = make_source("custom", root=folder, split="")
        for name, batch in kinds.items():
            stream = batches(source, SegmentationMaker(cfg, tokenizer, batch), seed=0, threads=options.threads)
            for _ in range(2 * options.threads + 1):  # what was read ahead does not count
                next(stream)
            start = time.perf_counter()
            for _ in range(options.samples):
                next(stream)
            table.add_row(name, f"{options.samples / (time.perf_counter() - start):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
