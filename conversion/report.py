"""One HTML page, without outside links, of what `virst parity` or `virst parity bisect` has found.

It is written anew after every case, so that a run that ends early leaves the page of what was computed.
"""

import base64
import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jinja2 import Environment
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from virst_jax.commands import _common
from virst_jax.io import atomic

from .bisection.walk import Row
from .cases.case import Case, Check, Detail

MASK_WIDTH = 280  # pixels
SAME, OURS, THEIRS = (235, 235, 235), (255, 70, 60), (60, 120, 255)


@dataclass(frozen=True)
class Illustration:
    """An image as a data URI, with what it shows."""

    uri: str
    caption: str


@dataclass
class Section:
    """A case on the page."""

    title: str
    facts: list[tuple[str, str]]
    header: Sequence[str] = ()
    rows: list[tuple[Sequence[str], bool]] = field(default_factory=list)  # cells, and whether they pass
    conclusion: str = ""
    illustrations: list[Illustration] = field(default_factory=list)


def case_section(case: Case, checks: Iterable[Check], seconds: float) -> Section:
    """A case's table, with histograms of errors, errors along the frames, and masks where there are some."""
    number = lambda x: "" if x is None else f"{x:.1e}"  # noqa: E731
    section = Section(case.name, [*facts_of(case), ("seconds", f"{seconds:.0f}")])
    section.header = ("output", "max abs", "rel L2", "IoU", "", "note")
    for check in checks:
        iou = "" if check.iou is None else f"{check.iou:.4f}"
        cells = (check.output, number(check.max_abs), number(check.relative), iou)
        section.rows.append(((*cells, "pass" if check.passed else "FAIL", check.note), check.passed))
    details = [detail for detail in case.details if detail.histogram is not None]
    if details:
        section.illustrations.append(
            Illustration(_histograms(details), "error of every element, relative to the output's RMS")
        )
    frames = [detail for detail in case.details if detail.frames is not None]
    if frames:
        step = "token" if case.name.startswith("chat_") else "frame"
        section.illustrations.append(Illustration(_along_frames(frames, step), f"error along the {step}s"))
    for detail in case.details:
        section.illustrations += [
            Illustration(
                _masks(ours, theirs), f"frame {t}: ours, recorded, difference ({int((ours != theirs).sum())} pixels)"
            )
            for t, ours, theirs in detail.masks
        ]
    return section


def bisect_section(case: Case, rows: Sequence[Row], conclusion: str) -> Section:
    """The table of a bisection, with the growth of errors along the operations."""
    number = lambda x: "" if x is None else f"{x:.1e}"  # noqa: E731
    section = Section(case.name, facts_of(case), conclusion=conclusion)
    section.header = ("operation", "output", "accumulated", "alone", "explained", "condition", "")
    for row in rows:
        numbers = (row.accumulated, row.alone, row.explained, row.conditioning)
        told = "" if row.alone is None else "rounding" if row.passed else "DIFFERS"
        section.rows.append(((row.operation, row.output, *map(number, numbers), told), row.passed))
    if any(row.accumulated is not None or row.alone is not None for row in rows):
        section.illustrations.append(
            Illustration(_growth(rows), "error along the operations, in the order of computation")
        )
    return section


def facts_of(case: Case) -> list[tuple[str, str]]:
    """How a case was recorded, and how we compute it."""
    meta = case.meta
    told = [("our dtype", case.dtype)]
    told += [(f"recorded: {key}", str(meta[key])) for key in ("dtype", "device", "attention") if meta.get(key)]
    told += [(f"recorded: {key}", str(value)) for key, value in (meta.get("versions") or {}).items()]
    if meta.get("release"):
        told.append(("release", str(meta["release"].get("commit", ""))))
    if meta.get("expression"):
        told.append(("expression", str(meta["expression"])))
    files = (case.folder / f"{case.name}{suffix}" for suffix in (".json", ".npz")) if case.folder else ()
    for path in files:
        if path.is_file():
            with path.open("rb") as file:
                told.append((f"SHA-256 of {path.name}", hashlib.file_digest(file, "sha256").hexdigest()))
    return told


def write_page(path: Path, title: str, sections: Sequence[Section], conclusion: str) -> None:
    """Writes the page whole."""
    import jax

    machine = [*_common.versions().items(), *((str(d), d.device_kind) for d in jax.devices())]
    page = Environment(autoescape=True).from_string(_PAGE)
    is_number = re.compile(r"[\d.]+(e[+-]\d+)?|inf").fullmatch
    text = page.render(title=title, sections=sections, machine=machine, conclusion=conclusion, is_number=is_number)
    atomic.write_bytes(path, text.encode("utf-8", "backslashreplace"), parents=True)


def _png(figure: Figure) -> str:
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content, metadata={"Software": None})
    return _uri(content.getvalue())


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _histograms(details: Sequence[Detail]) -> str:
    columns = min(3, len(details))
    rows = -(-len(details) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.2 * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns, sharex=True)).ravel()
    for axis, detail in zip(axes, details):
        assert detail.histogram is not None
        axis.stairs(detail.histogram, Detail.edges(), fill=True)
        axis.set_title(detail.output, fontsize=9)
        axis.set_yscale("symlog")
    for axis in axes[len(details) :]:
        axis.set_visible(False)
    figure.supxlabel("log10 of the error; leftmost: equal", fontsize=9)
    return _png(figure)


def _along_frames(details: Sequence[Detail], step: str) -> str:
    figure = Figure(figsize=(9, 3), layout="constrained")
    axis = figure.subplots()
    for detail in details:
        assert detail.frames is not None
        axis.plot(np.maximum(detail.frames, 1e-9), marker=".", label=detail.output)
    axis.set(yscale="log", xlabel=step, ylabel="relative L2 error")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(fontsize="small")
    axis.grid(alpha=0.3)
    return _png(figure)


def _growth(rows: Sequence[Row]) -> str:
    figure = Figure(figsize=(max(9, len(rows) / 9), 4.5), layout="constrained")
    axis = figure.subplots()
    places = np.arange(len(rows))
    for name, values, style in (
        ("accumulated", [row.accumulated for row in rows], "-"),
        ("this operation alone", [row.alone for row in rows], "."),
        ("explained by rounding", [row.explained for row in rows], "_"),
    ):
        known = [i for i, value in enumerate(values) if value is not None and np.isfinite(value)]
        axis.plot(places[known], [max(float(values[i] or 0), 1e-9) for i in known], style, label=name)
    wrong = [i for i, row in enumerate(rows) if not row.passed]
    if wrong:
        axis.axvline(wrong[0], color="red", lw=0.8, label=f"first difference: {rows[wrong[0]].operation}")
    step = max(1, len(rows) // 60)
    axis.set_xticks(places[::step], [row.operation for row in rows[::step]], rotation=90, fontsize=6)
    axis.set(yscale="log", ylabel="relative L2 error", xlim=(-0.5, len(rows) - 0.5))
    axis.legend(fontsize="small")
    axis.grid(alpha=0.3)
    return _png(figure)


def _masks(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Three images side by side: bool[H, W] of both, and where only one of them is set."""
    both = [np.where(mask[..., None], 255, 30).repeat(3, -1).astype(np.uint8) for mask in (ours, theirs)]
    difference = np.full((*ours.shape, 3), 30, np.uint8)
    difference[ours & theirs] = SAME
    difference[ours & ~theirs] = OURS
    difference[theirs & ~ours] = THEIRS
    gap = np.full((ours.shape[0], max(2, ours.shape[1] // 40), 3), 255, np.uint8)
    image = Image.fromarray(np.concatenate([both[0], gap, both[1], gap, difference], axis=1))
    height = max(1, round(image.height * 3 * MASK_WIDTH / image.width))
    content = io.BytesIO()
    image.resize((3 * MASK_WIDTH, height), Image.Resampling.NEAREST).save(content, "PNG")
    return _uri(content.getvalue())


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 15px/1.4 sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em; }
table { border-collapse: collapse; font-size: 13px; margin: .5em 0; } th { text-align: left; }
td, th { padding: .1em .8em .1em 0; vertical-align: top; } td:last-child { overflow-wrap: anywhere; }
tr.wrong { color: #c00; font-weight: bold; }
td.number { text-align: right; font-family: monospace; white-space: nowrap; }
figure { margin: .8em 0; } img { max-width: 100%; } figcaption, .facts { color: #666; font-size: 13px; }
h2 { margin: 1.6em 0 .2em; font-size: 19px; }
</style></head><body>
<h1>{{ title }}</h1>
<p><strong>{{ conclusion }}</strong></p>
<table>{% for name, value in machine %}<tr><th>{{ name }}</th><td>{{ value }}</td></tr>{% endfor %}</table>
{% for section in sections %}
<h2>{{ section.title }}</h2>
<p class="facts">{% for name, value in section.facts %}{{ name }}: {{ value }}{{ "; " if not loop.last }}
{%- endfor %}</p>
{% if section.conclusion %}<p><strong>{{ section.conclusion }}</strong></p>{% endif %}
<table><tr>{% for name in section.header %}<th>{{ name }}</th>{% endfor %}</tr>
{% for cells, passed in section.rows %}<tr{% if not passed %} class="wrong"{% endif %}>
{%- for cell in cells %}<td{% if is_number(cell) %} class="number"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% for shown in section.illustrations %}<figure><img src="{{ shown.uri }}" alt="{{ shown.caption }}">
<figcaption>{{ shown.caption }}</figcaption></figure>{% endfor %}
{% endfor %}
</body></html>
"""
