"""What an evaluation is told as: a table, JSON, a CSV of all expressions, a plot, a page of the worst cases.

summary.json      groups and scores, 0..1
table.txt         the same in percent, as printed
expressions.csv   a line an expression (and objects.csv: a line an object and annotator of Ref-DAVIS17)
expressions.png   J&F (IoU for images) of all expressions, sorted, and a histogram
worst.html        the worst expressions with images, in one file
"""

import base64
import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from jinja2 import Environment
from PIL import Image
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from virst_jax.data.samples import Video
from virst_jax.evaluation import bitmask
from virst_jax.evaluation.benchmarks import MAX_CATEGORIES, Opened, Summary, VideoScores
from virst_jax.evaluation.predictions import MaskReader, frame_names
from virst_jax.evaluation.scoring import Row, ratio
from virst_jax.evaluation.workers import reason
from virst_jax.io import atomic, visualize

IMAGES = 3  # frames shown of a bad case
IMAGE_WIDTH = 320  # pixels
_OPACITY = 0.55  # of the tint
COLORS = {"both": (60, 200, 90), "missed": (60, 120, 255), "false": (255, 70, 60)}


def write_report(
    folder: Path,
    summary: Summary,
    scores: Sequence[VideoScores],
    *,
    source: Opened | None = None,
    read_pred: MaskReader | None = None,
    worst: int = 20,
    errors: dict[str, str] | None = None,
    progress: bool = True,
) -> str:
    """Writes all files of a report; gives the table as text.

    Args:
      source, read_pred: frames and masks for the images of the worst cases; None: the page has none.
      worst: how many cases the page shows.
      errors: why videos are missing from the scores, by video.
    """
    errors = errors or {}
    rows = [row for video in scores for row in video.rows]
    objects = [row for video in scores for row in video.objects]
    table = format_table(summary, errors)

    def write(name: str, content: bytes | str) -> None:
        # half of a character in a text, which UTF-8 cannot hold, is written as an escape
        raw = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
        atomic.write_bytes(folder / name, raw, parents=True)

    write("summary.json", json.dumps(as_json(summary, errors), ensure_ascii=False, indent=1) + "\n")
    write("table.txt", table)
    if rows:
        write("expressions.csv", _csv([row.as_dict() for row in rows]))
        write("expressions.png", plot_rows(rows, summary))
        cases = worst_cases(rows, source, read_pred, worst, progress)
        write("worst.html", render_page(summary, cases, table))
    if objects:
        write("objects.csv", _csv([row.as_dict() for row in objects]))
    return table


def as_json(summary: Summary, errors: dict[str, str]) -> dict[str, Any]:
    """The summary as plain values."""
    return {
        "dataset": summary.dataset,
        "split": summary.split,
        "protocol": summary.protocol,
        "headline": {"group": summary.headline[0], "measure": summary.headline[1], "value": summary.main},
        "groups": [{"name": g.name, "count": g.count, "scores": g.scores, "note": g.note} for g in summary.groups],
        "notes": list(summary.notes),
        "complete": not errors,
        "errors": dict(sorted(errors.items())),
    }


def format_table(summary: Summary, errors: dict[str, str] | None = None) -> str:
    """The table as text, in percent."""
    measures = list(dict.fromkeys(m for group in summary.groups for m in group.scores))
    title = f"{summary.dataset} {summary.split}".strip()
    if errors:
        title += f" - INCOMPLETE: {len(errors)} videos failed"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("n", justify="right")
    for measure in measures:
        table.add_column(measure, justify="right")
    for group in summary.groups:
        cells = [f"{100 * group.scores[m]:.2f}" if m in group.scores else "" for m in measures]
        table.add_row(group.name, str(group.count), *cells)
    text = io.StringIO()
    console = Console(file=text, width=max(100, 24 + 20 * len(measures)), color_system=None, legacy_windows=False)
    console.print(table)
    lines = [f"{g.name}: {g.note}" for g in summary.groups if g.note] + list(summary.notes)
    lines += [f"failed: {name}: {error}" for name, error in sorted((errors or {}).items())]
    shown = [line.rstrip() for line in text.getvalue().splitlines()] + lines
    return "".join(line + "\n" for line in shown)


def plot_rows(rows: Sequence[Row], summary: Summary) -> bytes:
    """A PNG of every expression's score: sorted, and as a histogram."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measure = "IoU" if summary.protocol == "image" else "J&F"
    figure = Figure(figsize=(11, 4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(2, 1), sharey=True)
    categories = sorted({row.category for row in rows})
    several = 1 < len(categories) <= MAX_CATEGORIES
    for category in categories if several else [""]:
        values = np.sort([100 * row.JF for row in rows if not several or row.category == category])[::-1]
        label = f"{category or ('none' if several else 'all')} ({len(values)}, mean {values.mean():.1f})"
        left.step(np.linspace(0, 100, len(values) + 1), np.append(values, values[-1]), where="post", label=label)
    left.set(xlabel="expressions, best first (%)", ylabel=measure, ylim=(-2, 102), xlim=(0, 100))
    left.legend(loc="lower left", fontsize="small")
    left.grid(alpha=0.3)
    right.hist([100 * row.JF for row in rows], bins=np.linspace(0, 100, 21), orientation="horizontal")
    right.set(xlabel="expressions")
    figure.suptitle(f"{summary.dataset} {summary.split}: {measure} by expression".replace(" :", ":"))
    content = io.BytesIO()
    canvas.print_png(content, metadata={"Software": None})
    return content.getvalue()


@dataclass(frozen=True)
class Case:
    """An expression on the page of the worst, with images as data URIs and their captions."""

    row: Row
    images: tuple[tuple[str, str], ...]


def worst_cases(
    rows: Sequence[Row], source: Opened | None, read_pred: MaskReader | None, count: int, progress: bool = True
) -> list[Case]:
    """The expressions of the lowest scores, worst first, with images of their worst frames."""
    chosen = sorted(rows, key=lambda row: (row.JF, row.video, row.expression))[:count]
    if source is None or read_pred is None:
        return [Case(row, ()) for row in chosen]
    index = {name: i for i, name in enumerate(source.names)}
    cases = []
    for row in tqdm(chosen, desc="images", unit="case", disable=None if progress else True, leave=False):
        try:
            video = cast(Video, source[index[row.video]])
            position = next(i for i, e in enumerate(video.expressions) if e.id == row.expression)
            cases.append(Case(row, tuple(_images(video, position, read_pred))))
        except Exception as error:  # the page is there without these images
            cases.append(Case(row, (("", f"no images: {reason(error)}"),)))
    return cases


def tint(frame: np.ndarray, pred: np.ndarray, gt: np.ndarray) -> np.ndarray:
    """A frame in which pixels are tinted by COLORS: rightly set, missed, falsely set.

    Args:
      frame: uint8[H, W, 3].
      pred, gt: bool[H, W].

    Returns:
      uint8[H, W, 3].
    """
    masks = {"both": pred & gt, "missed": gt & ~pred, "false": pred & ~gt}
    colors = [COLORS[name] for name in masks]
    return visualize.overlay(frame, list(masks.values()), _OPACITY, colors=colors, outlined=False)


def _images(video: Video, position: int, read_pred: MaskReader) -> list[tuple[str, str]]:
    assert video.read_masks is not None
    # a frame in each third of the video: the worst of some
    names = frame_names(video)
    shown = []
    for third in np.array_split(np.arange(video.num_frames), min(IMAGES, video.num_frames)):
        some = third[np.linspace(0, len(third) - 1, min(len(third), 8)).astype(int)].tolist()
        gt = bitmask.pack(video.read_masks(position, some))
        pred = read_pred(video, position, some)
        j = ratio(bitmask.count(pred & gt), bitmask.count(pred | gt))
        worst = int(np.argmin(j))
        width = video.size[1]
        image = tint(
            video.read_frames([some[worst]])[0], bitmask.unpack(pred[worst], width), bitmask.unpack(gt[worst], width)
        )
        shown.append((_data_uri(image), f"frame {names[some[worst]]}: J {100 * j[worst]:.0f}"))
    return shown


def _data_uri(pixels: np.ndarray) -> str:
    image = Image.fromarray(pixels)
    width = min(IMAGE_WIDTH, image.width)
    image = image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.BILINEAR)
    content = io.BytesIO()
    image.save(content, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}: worst cases</title>
<style>
body { font: 15px/1.4 sans-serif; margin: 2em auto; max-width: 1080px; padding: 0 1em; }
pre { overflow-x: auto; } figure { display: inline-block; margin: 0 .5em .5em 0; }
figcaption, .id { color: #666; font-size: 13px; } h2 { font-size: 17px; margin: 1.6em 0 .3em; }
.key { display: inline-block; width: .9em; height: .9em; margin: 0 .3em 0 1em; vertical-align: -.1em; }
</style></head><body>
<h1>{{ title }}: worst cases</h1>
<pre>{{ table }}</pre>
<p>{% for name, color in colors %}<span class="key" style="background: rgb{{ color }}"></span>{{ name }}{% endfor %}</p>
{% for case in cases %}
<h2>{{ loop.index }}. {{ case.row.text }}</h2>
<div class="id">{{ case.row.video }}, expression {{ case.row.expression }}
{%- if case.row.category %}, {{ case.row.category }}{% endif %}: {{ case.scores }}</div>
{% for uri, caption in case.images %}<figure>{% if uri %}<img src="{{ uri }}" alt="{{ caption }}">{% endif %}
<figcaption>{{ caption }}</figcaption></figure>{% endfor %}
{% endfor %}
</body></html>
"""


def render_page(summary: Summary, cases: Sequence[Case], table: str) -> str:
    """The page of the worst cases; texts are escaped."""
    still = summary.protocol == "image"

    def scores(row: Row) -> str:
        if still:
            return f"IoU {100 * row.J:.1f}"
        return f"J&F {100 * row.JF:.1f}, J {100 * row.J:.1f}, F {100 * row.F:.1f}"

    page = Environment(autoescape=True).from_string(_PAGE)
    return page.render(
        title=f"{summary.dataset} {summary.split}".strip(),
        table=table,
        colors=[({"both": "right", "missed": "missed", "false": "false"}[k], v) for k, v in COLORS.items()],
        cases=[{"row": c.row, "images": c.images, "scores": scores(c.row)} for c in cases],
    )


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    columns = [c for c in rows[0] if any(row[c] is not None for row in rows)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
