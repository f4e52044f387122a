"""J&F of a model on held-out synthetic videos, by category; also with every sentence exchanged for another's.

python -m benchmarks.synthetic [--model tiny] [--videos 100] [--expressions 8] [--seed 1000000]

The videos are of a seed that no recipe trains on. With exchanged sentences a network that does not read scores as
before.
"""

import argparse
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import virst_jax
from benchmarks import run
from virst_jax.data.samples import Video
from virst_jax.data.synthetic.videos import SyntheticVideos
from virst_jax.evaluation.held_out import score_videos, summarize
from virst_jax.evaluation.scoring import Row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--videos", type=int, default=100)
    parser.add_argument("--expressions", type=int, default=8)
    parser.add_argument("--seed", type=int, default=10**6)
    options = parser.parse_args()
    model = virst_jax.load(options.model)
    source = SyntheticVideos(options.videos, options.seed, expressions=options.expressions)

    def segment(video: Video, texts: Sequence[str]) -> np.ndarray:
        return model.segment(video, texts).masks

    rounds: list[list[Row]] = []
    for exchange in (False, True):
        found = score_videos(segment, source, exchange=exchange)
        words = "exchanged sentences" if exchange else "videos"
        rounds.append([score for scores in tqdm(found, total=len(source), desc=words) for score in scores])
    said = rounds[0]
    table = Table(title=f"{options.model}: {len(source)} videos of seed {options.seed}, {len(said)} sentences")
    for column in ("category", "sentences", "J", "F", "J&F", "J&F, exchanged"):
        table.add_column(column, justify="left" if column == "category" else "right")
    groups: dict[str, tuple[str, ...]] = {c: (c,) for c in sorted({s.category for s in said})}
    groups |= {"appearance and motion": ("appearance", "motion"), "all": ()}
    for name, members in groups.items():
        ours, theirs = ([s for s in scores if not members or s.category in members] for scores in rounds)
        row = summarize(ours)
        other = f"{100 * summarize(theirs)['j_and_f']:.1f}" if theirs else ""
        table.add_row(name, str(len(ours)), *(f"{100 * row[k]:.1f}" for k in ("j", "f", "j_and_f")), other)
    console = Console()
    console.print(table)
    summary = summarize(said)
    for key in ("no_target_accuracy", "target_accuracy"):
        if key in summary:
            console.print(f"{key.replace('_', ' ')}: {100 * summary[key]:.1f} %")


if __name__ == "__main__":
    run(main)
