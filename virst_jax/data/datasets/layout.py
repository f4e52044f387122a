"""What the layouts of the video benchmarks have in common: a JSON file with videos, their frames and expressions.

    {"videos": {VIDEO: {"frames": [FRAME], "expressions": {ID: {"exp": text, ...}}}}}

`index_videos` reads it for every reader; a reader says what an expression means. Whatever is wrong with one video or
expression is a problem that leaves out this one alone.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from virst_jax.data.datasets.source import Problem, unknown_keys
from virst_jax.data.samples import Expression
from virst_jax.errors import UserError, printable
from virst_jax.io.json_files import Json, read_json
from virst_jax.io.names import check_name, name_fault, natural_key, repeated, shown


@dataclass(frozen=True)
class VideoRecord:
    """A video and its expressions."""

    name: str
    frames: tuple[str, ...]  # names without suffix, in the order of the file
    expressions: tuple[Expression, ...]
    targets: tuple[Any, ...]  # what each expression means, as the reader has it


@dataclass(frozen=True)
class Layout:
    """How a reader's file differs from others.

    target: the entries of an expression and its video, names and ids -> what the expression means. Raises UserError:
      it cannot be told.
    """

    target: Callable[["Entry"], Any]
    video_keys: frozenset[str]
    expression_keys: frozenset[str]
    text: str = "exp"  # the key of an expression's text
    listed: str = ""  # the key of an expression's id where expressions are a list, not an object by id
    category: Callable[["Entry"], str] = lambda entry: ""
    rewrite: Callable[[str], str] = lambda text: text
    in_order: bool = False  # videos by their names, expressions by their ids as text


@dataclass(frozen=True)
class Entry:
    """An expression as the file has it."""

    video: str
    video_fields: Json
    id: str
    fields: Json


def read_videos(path: Path) -> Json:
    """The object under "videos" of a meta_expressions.json.

    Raises:
      UserError: the file is missing, or has no such object.
    """
    top = read_json(path)
    if not isinstance(top.value, dict) or not isinstance(top.value.get("videos"), dict):
        raise UserError(f'{path}: expected an object with "videos" at its top; check that it is the right file')
    return top["videos"]


def index_videos(videos: Json, layout: Layout, problems: list[Problem]) -> tuple[VideoRecord, ...]:
    """All videos that can be read; the others, and whatever is wrong with them, are added to `problems`.

    Raises:
      UserError: not a single video is in this layout.
    """
    records = []
    misfits: list[UserError] = []
    entries = list(videos.members())
    for name, fields in sorted(entries, key=lambda entry: entry[0]) if layout.in_order else entries:
        where = f"{videos.file}: {name}"
        try:
            record = _video(name, fields, where, layout, problems)
        except UserError as error:
            misfits.append(error)
            problems.append(Problem.of(error, f"video {name}", where))
            continue
        if record is not None:
            records.append(record)
    if misfits and len(misfits) == len(entries):
        raise misfits[0]
    return tuple(records)


def parse_frames(entry: Json, problems: list[Problem], where: str, dropped: str) -> tuple[str, ...] | None:
    """The names of a video's frames, in the order of the file: its masks may be in the same order.

    None, and a problem, if there are none or they cannot be told apart.

    Raises:
      UserError: they are no list of names, or a name leads elsewhere.
    """
    stated = entry["frames"]
    if not isinstance(stated.value, list) or not stated.value:
        problems.append(Problem(where, "lists no frames", dropped))
        return None
    frames = tuple(frame.identifier() for frame in stated.elements())
    fault = next((f"the frame{shown(name)} {name_fault(name)}" for name in frames if name_fault(name)), "")
    twice = repeated(frames)
    if twice is not None:
        fault = f"lists the frame{shown(twice)} twice"
    if fault:
        problems.append(Problem(where, fault, dropped))
        return None
    if list(frames) != sorted(frames, key=natural_key):
        problems.append(Problem(where, "its frames are not in the order of their names; the file's order is kept"))
    return frames


def parse_text(where: str, text: Json, label: str, problems: list[Problem]) -> str | None:
    """An expression's text as it stands, for the release does not trim it; None, and a problem, if it is empty."""
    if text.value is None or (isinstance(text.value, str) and not text.value.strip()):
        problems.append(Problem(where, "the expression is empty", label))
        return None
    try:
        return text.text()
    except UserError as error:
        problems.append(Problem(where, _reason(error, where, text.file), label))
        return None


def _video(name: str, fields: Json, where: str, layout: Layout, problems: list[Problem]) -> VideoRecord | None:
    dropped = f"video {name}"
    check_name(name, f"{where}: the video's name", nested=True)
    if not isinstance(fields.value, dict):
        problems.append(Problem(where, "lists no frames", dropped))
        return None
    frames = parse_frames(fields, problems, where, dropped)
    if frames is None:
        return None
    problems += unknown_keys(fields, layout.video_keys, where)
    expressions: list[Expression] = []
    targets: list[Any] = []
    entries = list(_entries(name, fields, layout))
    misfits: list[UserError] = []
    for entry in entries:
        label, place = f"expression {entry.id} of {name}", f"{where}, expression {entry.id}"
        try:
            if not isinstance(entry.fields.value, dict):
                misfits.append(UserError(f'{place}: expected an object with "{layout.text}"; check the file\'s layout'))
                raise misfits[-1]
            if any(entry.id == e.id for e in expressions):
                raise UserError(f"{place}: the id is there twice")
            fault = name_fault(entry.id)
            if fault:
                raise UserError(f"{place}: the id{shown(entry.id)} {fault}")
            problems += unknown_keys(entry.fields, layout.expression_keys, place)
            text = parse_text(place, entry.fields[layout.text], label, problems)
            if text is None:
                continue
            target = layout.target(entry)
            expressions.append(Expression(layout.rewrite(text), entry.id, layout.category(entry)))
            targets.append(target)
        except UserError as error:
            problems.append(Problem(place, _reason(error, place, fields.file), label))
    if entries and len(misfits) == len(entries):
        raise misfits[0]
    if not expressions:
        problems.append(Problem(where, "no expression is left", dropped))
        return None
    return VideoRecord(name, frames, tuple(expressions), tuple(targets))


def _entries(name: str, fields: Json, layout: Layout) -> Iterator[Entry]:
    stated = fields["expressions"]
    members: Iterable[tuple[str, Json]]
    if layout.listed:
        if not isinstance(stated.value, list):
            raise UserError(f'{fields.file}: video {name} has no list of "expressions"; check the file\'s layout')
        members = ((_listed_id(i, e, layout.listed), e) for i, e in enumerate(stated.elements()))
    else:
        if not isinstance(stated.value, dict):
            raise UserError(f'{fields.file}: video {name} has no "expressions" by id; check the file\'s layout')
        members = sorted(stated.members(), key=lambda m: m[0]) if layout.in_order else stated.members()
    return (Entry(name, fields, exp_id, entry) for exp_id, entry in members)


def _listed_id(number: int, entry: Json, key: str) -> str:
    try:
        return entry[key].identifier() if key in entry else str(number)
    except UserError:
        return str(number)


def _reason(error: UserError, place: str, file: str) -> str:
    """What an error says, without the place, or the file, in front of it."""
    return str(error).removeprefix(f"{printable(place)}: ").removeprefix(f"{file}: ")
