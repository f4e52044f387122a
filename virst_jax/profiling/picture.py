"""Where the time of compiled steps goes, as a picture."""

import importlib
import io
from collections.abc import Mapping
from pathlib import Path

from virst_jax.errors import UserError
from virst_jax.profiling.schedule import CATEGORIES, Spent

FORMATS = ("png", "svg", "pdf")
COLORS = ("#4477aa", "#228833", "#ccbb44", "#66ccee", "#ee6677", "#aa3377", "#bbbbbb")  # for the colour-blind, too


def check_format(path: Path) -> str:
    """The format that a file's name asks for; called before the long work whose outcome is drawn.

    Raises:
      UserError: none of FORMATS.
      ModuleNotFoundError: matplotlib is not installed.
    """
    importlib.import_module("matplotlib")

    kind = path.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise UserError(f"{path}: pictures end in {', '.join('.' + name for name in FORMATS)}")
    return kind


def draw(steps: Mapping[str, tuple[Spent, Spent]], title: str, kind: str) -> bytes:
    """A bar for every step, in milliseconds of a call, by what they go to.

    Args:
      steps: by name, with the upper figure, whose categories are drawn, and the lower one, which is marked.
      kind: of FORMATS.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2 + 0.5 * len(steps)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = list(steps)[::-1]  # the first one above
    starts = [0.0] * len(names)
    for category, color in zip(CATEGORIES, COLORS, strict=True):
        lengths = [1e3 * steps[name][0].category(category) for name in names]
        if not any(lengths):
            continue
        axes.barh(names, lengths, left=starts, color=color, label=category)
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]
    lower = [1e3 * steps[name][1].seconds for name in names]
    if any(abs(low - high) > 1e-9 for low, high in zip(lower, starts, strict=True)):
        axes.plot(lower, names, "k|", markersize=14, label="moves at the memory's bandwidth")
    for name, end in zip(names, starts, strict=True):
        axes.annotate(
            f"{end:.2f}", (end, name), xytext=(4, 0), textcoords="offset points", va="center", fontsize="small"
        )
    axes.set(xlabel="ms of a call, not measured", title=title)
    axes.margins(x=0.1)
    figure.legend(fontsize="small", loc="outside lower center", ncols=len(CATEGORIES) + 1)
    content = io.BytesIO()
    figure.savefig(content, format=kind)
    return content.getvalue()
