"""What each benchmark reports: which videos' rows go into which line of its table, and how they become numbers.

All scores lie in 0..1; tables show percent. Where the field has two ways of counting, both are computed and labelled.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from virst_jax.data.datasets.davis import NUM_ANNOTATORS
from virst_jax.data.datasets.mevis import NO_TARGET
from virst_jax.data.datasets.reasonseg import ShapeMasks
from virst_jax.data.datasets.revos import foreground_reader
from virst_jax.data.samples import Video
from virst_jax.errors import UserError
from virst_jax.evaluation.davis import ObjectRow, score_annotators, score_indexed
from virst_jax.evaluation.predictions import MaskReader
from virst_jax.evaluation.scoring import Row, score_expressions
from virst_jax.io.json_files import Json

JF = "J&F"
MAX_CATEGORIES = 8  # more are not told apart
PROTOCOLS = {
    "mevis": "video",
    "mevis_v2": "mevis_v2",
    "ref_youtube_vos": "video",
    "ref_davis17": "ref_davis17",
    "revos": "revos",
    "reasonvos": "video",
    "lvvis": "video",
    "custom": "video",
}  # every other data set: "image", or "video" if it holds videos


class Opened(Protocol):
    """A data set as `open_dataset` gives it, see data/datasets/source.py."""

    @property
    def name(self) -> str: ...
    @property
    def split(self) -> str: ...
    @property
    def root(self) -> str: ...
    @property
    def names(self) -> list[str]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


@dataclass(frozen=True)
class Subset:
    """Some samples of a source, in this order; of an `Opened` it is one itself."""

    whole: Any
    indices: tuple[int, ...]

    @property
    def name(self) -> str:
        return str(self.whole.name)

    @property
    def split(self) -> str:
        return str(self.whole.split)

    @property
    def root(self) -> str:
        return str(self.whole.root)

    @property
    def names(self) -> list[str]:
        every = self.whole.names
        return [every[i] for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.whole[self.indices[index]]


@dataclass(frozen=True)
class VideoScores:
    """All scores of one video."""

    rows: tuple[Row, ...]
    objects: tuple[ObjectRow, ...] = ()  # Ref-DAVIS17's official protocol

    def as_dict(self) -> dict[str, Any]:
        return {"rows": [r.as_dict() for r in self.rows], "objects": [o.as_dict() for o in self.objects]}

    @staticmethod
    def from_json(data: Json) -> "VideoScores":
        """What `as_dict` gave, read from a file. Raises UserError: it is something else."""
        rows = tuple(Row(**_fields(Row, row)) for row in data["rows"].elements())
        return VideoScores(rows, tuple(ObjectRow(**_fields(ObjectRow, row)) for row in data["objects"].elements()))


def _fields(kind: type, row: Json) -> dict[str, Any]:
    """The fields of a dataclass of scores, each of its type."""
    read: dict[type, Callable[[Json], Any]] = {str: Json.text, int: Json.integer, float: Json.number}
    out: dict[str, Any] = {}
    for entry in dataclasses.fields(kind):
        value = row[entry.name]
        optional = entry.default is None
        plain = next(t for t in read if entry.type in (t, t | None))
        out[entry.name] = None if optional and value.value is None else read[plain](value)
    if len(row) > len(out):
        raise row.expected("the scores of this version")
    return out


@dataclass(frozen=True)
class Group:
    """A line of a benchmark's table."""

    name: str
    count: int  # expressions, or objects
    scores: dict[str, float]
    note: str = ""


@dataclass(frozen=True)
class Summary:
    """What a benchmark reports."""

    dataset: str
    split: str
    protocol: str
    headline: tuple[str, str]  # group and measure that papers quote
    groups: tuple[Group, ...]
    notes: tuple[str, ...] = field(default=())

    def value(self, group: str, measure: str) -> float:
        return next(g for g in self.groups if g.name == group).scores[measure]

    @property
    def main(self) -> float:
        """The score that papers quote."""
        return self.value(*self.headline)


def protocol_of(dataset: str, is_image: bool) -> str:
    """The protocol of a data set: "video", "mevis_v2", "ref_davis17", "revos" or "image"."""
    return PROTOCOLS.get(dataset, "image" if is_image else "video")


def score_video(source: Opened, video: Video, read_pred: MaskReader) -> VideoScores:
    """All scores of a video that its benchmark asks for.

    Raises:
      UserError: the masks are not public; a mask is missing, damaged or of another size (names its file).
    """
    protocol = protocol_of(source.name, video.is_image)
    foreground = foreground_reader(Path(source.root), video) if protocol == "revos" else None
    ignored = video.read_masks.ignored() if isinstance(video.read_masks, ShapeMasks) else None
    rows = score_expressions(video, read_pred, foreground=foreground, ignored=ignored, boundaries=protocol != "image")
    objects = score_annotators(video, read_pred) if protocol == "ref_davis17" else []
    return VideoScores(tuple(rows), tuple(objects))


def score_davis_indexed(video: Video, folder: Path) -> VideoScores:
    """Scores of a video's palette PNGs, see `davis.score_indexed`: the official protocol alone."""
    return VideoScores((), tuple(score_indexed(video, folder)))


def summarize(dataset: str, split: str, is_image: bool, scores: Sequence[VideoScores]) -> Summary:
    """The benchmark's table.

    Raises:
      UserError: there is nothing to summarize.
    """
    rows = [row for video in scores for row in video.rows]
    objects = [row for video in scores for row in video.objects]
    if not rows and not objects:
        raise UserError(f"{dataset}, split {split!r}: no expression was scored")
    protocol = protocol_of(dataset, is_image)
    build = {
        "video": _video,
        "mevis_v2": _mevis_v2,
        "revos": _revos,
        "image": _image,
        "ref_davis17": lambda every: _ref_davis17(every, objects),
    }[protocol]
    headline, groups, notes = build(rows)
    return Summary(dataset, split, protocol, headline, tuple(groups), tuple(notes))


Built = tuple[tuple[str, str], list[Group], list[str]]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(np.asarray(values, np.float64)))


def _jf(rows: Sequence[Row]) -> dict[str, float]:
    j, f = _mean([r.J for r in rows]), _mean([r.F for r in rows])
    return {"J": j, "F": f, JF: (j + f) / 2}


def _by_category(rows: Sequence[Row]) -> list[Group]:
    categories = sorted({r.category for r in rows})
    if not 1 < len(categories) <= MAX_CATEGORIES:
        return []
    chosen = {name: [r for r in rows if r.category == name] for name in categories}
    return [Group(name or "(no category)", len(part), _jf(part)) for name, part in chosen.items()]


def _video(rows: Sequence[Row]) -> Built:
    groups = [Group("all", len(rows), _jf(rows), "mean over frames, then over expressions"), *_by_category(rows)]
    return ("all", JF), groups, []


def _mevis_v2(rows: Sequence[Row]) -> Built:
    no_target = [r for r in rows if r.category == NO_TARGET or (not r.category and not r.gt_pixels)]
    target = [r for r in rows if not (r.category == NO_TARGET or (not r.category and not r.gt_pixels))]
    scores = _jf(rows)
    if target:
        scores["T-acc"] = _mean([r.pred_pixels > 0 for r in target])
    if no_target:
        scores["N-acc"] = _mean([r.pred_pixels == 0 for r in no_target])
    groups = [Group("all", len(rows), scores, "a frame without target and without prediction counts 1")]
    groups += [
        Group(name, len(part), _jf(part)) for name, part in (("target", target), ("no-target", no_target)) if part
    ]
    notes = [
        "N-acc: share of the no-target expressions without a single pixel predicted in any frame; T-acc: share of the "
        "others with at least one. How the server weighs them into one score is not published; J&F here is the mean "
        "over all expressions.",
    ]
    return ("all", JF), groups, notes


def _revos(rows: Sequence[Row]) -> Built:
    def percent(values: Sequence[float | None]) -> float:
        # the script rounds every expression's percentage to two decimals
        return _mean([round(100 * float(v or 0.0), 2) for v in values]) / 100

    def scores(part: Sequence[Row]) -> dict[str, float]:
        j, f = percent([r.J for r in part]), percent([r.F for r in part])
        return {
            "J": j,
            "F": f,
            JF: (j + f) / 2,
            "A": percent([r.A for r in part]),
            "R": percent([r.R for r in part]),
            "A (0/255 script)": percent([r.A_script for r in part]),
            "R (0/255 script)": percent([r.R_script for r in part]),
        }

    parts = {name: [r for r in rows if r.category == name] for name in ("referring", "reasoning")}
    groups = [Group(name, len(part), scores(part)) for name, part in parts.items() if part]
    if not groups:
        return ("all", JF), [Group("all", len(rows), scores(rows), "no expression is referring or reasoning")], []
    overall = {m: _mean([g.scores[m] for g in groups]) for m in groups[0].scores}
    counted = sum(g.count for g in groups)
    groups.append(Group("overall", counted, overall, "plain mean of referring and reasoning"))
    notes = [
        "A and R: on masks of 0 and 1. A and R (0/255 script): what the release's eval_revos.py computes in 8-bit "
        "arithmetic on files of 0 and 255; there a perfect prediction does not reach 1.",
    ]
    left_out = len(rows) - counted
    if left_out:
        notes.append(f"{left_out} expressions of type 2 take no part, as in the script.")
    return ("overall", JF), groups, notes


def _image(rows: Sequence[Row]) -> Built:
    def ious(part: Sequence[Row]) -> dict[str, float]:
        union = sum(r.union for r in part)
        return {"gIoU": _mean([r.J for r in part]), "cIoU": sum(r.intersection for r in part) / union if union else 1.0}

    groups = [Group("all", len(rows), ious(rows))]
    categories = sorted({r.category for r in rows})
    if 1 < len(categories) <= MAX_CATEGORIES:
        groups += [
            Group(name or "(no category)", len(part), ious(part))
            for name, part in ((c, [r for r in rows if r.category == c]) for c in categories)
        ]
    notes = [
        "gIoU: mean of every expression's IoU, 1 if both masks are empty. cIoU: all intersections over all unions."
    ]
    if any(r.J_unignored is not None for r in rows):
        union = sum(r.union_unignored or 0 for r in rows)
        scores = {
            "gIoU": _mean([r.J_unignored or 0.0 for r in rows]),
            "cIoU": sum(r.intersection_unignored or 0 for r in rows) / union if union else 1.0,
        }
        groups.append(Group("ignore as background", len(rows), scores, "as the release takes `ignore` shapes"))
        notes.append("all: pixels of `ignore` shapes are left out, as LISA does.")
    return ("all", "gIoU"), groups, notes


def _ref_davis17(rows: Sequence[Row], objects: Sequence[ObjectRow]) -> Built:
    groups: list[Group] = []
    headline = ("per expression" if rows else "official", JF)
    if rows:
        groups.append(Group("per expression", len(rows), _jf(rows), "binary masks, as the release and others report"))
    if objects:
        annotators = []
        for annotator in range(NUM_ANNOTATORS):
            part = [o for o in objects if o.annotator == annotator]
            j, f = _mean([o.J for o in part]), _mean([o.F for o in part])
            annotators.append(Group(f"annotator {annotator}", len(part), {"J": j, "F": f, JF: (j + f) / 2}))
        mean = {m: _mean([g.scores[m] for g in annotators]) for m in ("J", "F", JF)}
        note = "four annotators, argmax over objects, mean over objects"
        groups += [Group("official", len(objects), mean, note), *annotators]
    return headline, groups, ["Published tables mix both ways of counting; compare like with like."]
