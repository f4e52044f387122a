"""Memory while a long video is segmented as a stream: it must not grow with the number of frames.

python -m benchmarks.long_video [--model tiny] [--frames 2000] [--height 480] [--width 854] [--every 200]
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import virst_jax
from benchmarks import run
from virst_jax.io.video import VideoWriter


def write_clip(path: Path, frames: int, height: int, width: int) -> None:
    """A red disc that circles over a grey slope."""
    y, x = np.mgrid[:height, :width]
    slope = np.repeat((60 + 120 * x / width).astype(np.uint8)[..., None], 3, axis=2)
    with VideoWriter(path, (height, width), 25) as writer:
        for t in range(frames):
            angle = 2 * np.pi * t / 200
            at = height * (0.5 + 0.25 * np.sin(angle)), width * (0.5 + 0.25 * np.cos(angle))
            disc = (y - at[0]) ** 2 + (x - at[1]) ** 2 < (height / 8) ** 2
            writer.write(np.where(disc[..., None], np.array([220, 30, 30], np.uint8), slope))


def resident() -> float:
    """MB of this process that lie in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--frames", type=int, default=2000)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=854)
    parser.add_argument("--every", type=int, default=200)
    options = parser.parse_args()
    model = virst_jax.load(options.model)
    table = Table(title=f"{options.model}, {options.height} x {options.width}, two expressions")
    for column in ("frames", "host MB", "arrays on the device, MB", "seconds a frame"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        write_clip(clip, options.frames, options.height, options.width)
        start, before = time.perf_counter(), 0
        stream = model.segment_stream(str(clip), ["the red circle", "the blue square"])
        for count, _ in enumerate(tqdm(stream, total=options.frames, unit="frame"), 1):
            if count % options.every == 0 or count == options.frames:
                seconds = (time.perf_counter() - start) / (count - before)
                held = sum(x.nbytes for x in jax.live_arrays()) / 1e6
                table.add_row(str(count), f"{resident():.0f}", f"{held:.0f}", f"{seconds:.3f}")
                start, before = time.perf_counter(), count
    Console().print(table)


if __name__ == "__main__":
    run(main)
