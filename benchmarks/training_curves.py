"""Curves of a training run: an image, and a small CSV with means over some steps.

python -m benchmarks.training_curves RUN --out PATH [--bin 25]

RUN is the work folder of a training run, or a PATH.csv of earlier, which is drawn again. PATH.png and PATH.csv are
written. Stages come in the order in which they ended.
"""

import argparse
import csv
from collections import defaultdict
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks import run
from virst_jax.errors import UserError

PANELS = {
    "patch_recall": "caption words of patches, recall",
    "cell_recall": "caption words of cells, recall",
    "ce_loss": "cross-entropy of tokens",
    "mean_iou": "IoU",
}


def read_stages(run: Path, size: int) -> list[dict[str, str | float]]:
    """Means over `size` steps: stage, step, minutes since the start, and every metric of PANELS by kind of batch.

    Raises:
      UserError: no metrics there.
    """
    files = sorted(run.glob("*/metrics.csv"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise UserError(f"{run}: no STAGE/metrics.csv in it; name the --workdir of a training run")
    rows: list[dict[str, str | float]] = []
    seconds = 0.0
    for file in files:
        bins: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        ends: dict[int, float] = {}
        with file.open(newline="") as f:
            for line in csv.DictReader(f):
                at = (int(line["step"]) - 1) // size
                for name, value in line.items():
                    if value and name.endswith("/seconds"):
                        seconds += float(value)
                    elif value and name.split("/")[-1] in PANELS:
                        bins[at][name].append(float(value))
                ends[at] = seconds / 60
        for at, values in bins.items():
            means = {name: round(sum(found) / len(found), 4) for name, found in sorted(values.items())}
            place: dict[str, str | float] = {
                "stage": file.parent.name,
                "step": (at + 1) * size,
                "minutes": round(ends[at], 2),
            }
            rows.append({**place, **means})
    return rows


def read_means(file: Path) -> list[dict[str, str | float]]:
    """Rows as `read_stages` gives them, from the CSV file that they were written to."""
    with file.open(newline="") as f:
        return [
            {name: value if name == "stage" else float(value) for name, value in row.items() if value}
            for row in csv.DictReader(f)
        ]


def draw(rows: list[dict[str, str | float]], path: Path) -> None:
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(name for row in rows for name in row))
    starts = {row["stage"]: row["minutes"] for row in reversed(rows)}
    for axes, (metric, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items()):
        for name in names:
            if name.endswith(f"/{metric}"):
                found = [(row["minutes"], row[name]) for row in rows if name in row]
                axes.plot(*zip(*found), ".", markersize=3, label=name.split("/")[0])
        for stage, at in starts.items():
            axes.axvline(at, color="0.85", zorder=0)
            axes.text(at, 1.01, stage, transform=axes.get_xaxis_transform(), fontsize=6, rotation=45)
        axes.set_xlabel("minutes")
        axes.set_ylabel(title)
        axes.legend(fontsize=7)
        axes.set_ylim(0, 3 if metric == "ce_loss" else 1)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bin", type=int, default=25)
    options = parser.parse_args()
    rows = read_means(options.run) if options.run.suffix == ".csv" else read_stages(options.run, options.bin)
    with options.out.with_suffix(".csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, options.out.with_suffix(".png"))


if __name__ == "__main__":
    run(main)
