"""Which videos a command is to go through: those of a folder, of a pattern, or of a list with their sentences."""

import glob
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from virst_jax.commands.segment_run import slug
from virst_jax.data.prompts import normalize_expression
from virst_jax.errors import UserError
from virst_jax.io.images import SUFFIXES
from virst_jax.io.json_files import parse_json
from virst_jax.io.names import natural_key, same_name
from virst_jax.io.regular import read_text
from virst_jax.io.tables import read_table

MEDIA = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".gif", ".wmv", ".flv")
TABLES, LINES = (".csv", ".tsv"), (".jsonl", ".ndjson")
COLUMNS = ("video", "sentence", "name")
_NEEDED = COLUMNS[:2]
RESERVED = ("results.csv", "results.json")


@dataclass(frozen=True)
class Item:
    """A video that is to be segmented, and what in it.

    Attributes:
      video: its path.
      sentences: as they were given.
      name: that a list gives it; empty: that of the file.
    """

    video: str
    sentences: tuple[str, ...]
    name: str = ""


def find_items(given: str, sentences: Sequence[str]) -> list[Item] | None:
    """The videos that one argument stands for; None: it is a single video.

    Args:
      given: a folder of videos or of folders of frames, a pattern with * or ?, or a list (.csv, .tsv, .jsonl).
      sentences: for all of them. A list has its own.

    Raises:
      UserError: nothing is there, sentences that are missing or too many, or a list that cannot be read.
    """
    suffix = Path(given).suffix.lower()
    if suffix in (*TABLES, *LINES) and not os.path.isdir(given):
        if sentences:
            raise UserError(f"{given}: a list has a sentence for each video; leave {sentences[0]!r} out")
        return _of_list(Path(given), _lines(Path(given)) if suffix in LINES else _rows(Path(given)))
    found = _of_folder(Path(given)) if os.path.isdir(given) else _of_pattern(given)
    if not sentences:
        raise UserError("no sentence was given: describe at least one object in words")
    for text in sentences:
        normalize_expression(text)  # raises for what cannot be read
    return None if found is None else [Item(path, tuple(sentences)) for path in found]


def _of_folder(folder: Path) -> list[str] | None:
    try:
        entries = sorted((e for e in folder.iterdir() if not e.name.startswith(".")), key=lambda e: natural_key(e.name))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from error
    if any(e.suffix.lower() in SUFFIXES for e in entries):
        return None  # frames of one video
    videos = [str(e) for e in entries if (e.suffix.lower() in MEDIA if e.is_file() else _holds_images(e))]
    if not videos:
        raise UserError(f"{folder}: holds neither frames nor videos ({', '.join(MEDIA)}); give another folder")
    return videos


def _holds_images(folder: Path) -> bool:
    try:
        return any(entry.suffix.lower() in SUFFIXES for entry in folder.iterdir())
    except OSError:
        return os.path.isdir(folder)  # reading it says why it cannot be read


def _of_pattern(given: str) -> list[str] | None:
    if not glob.has_magic(given) or os.path.lexists(given) or "://" in given:
        return None
    found = sorted(glob.glob(given, recursive=True), key=natural_key)
    if not found:
        raise UserError(f"{given}: no file has such a name; check the pattern")
    return found


def _rows(file: Path) -> Iterator[tuple[str, Mapping[str, str]]]:
    for line, row in read_table(file, COLUMNS, _NEEDED):
        yield f"{file}, line {line}", row


def _lines(file: Path) -> Iterator[tuple[str, Mapping[str, str]]]:
    text = read_text(file, f"save it with an object of {', '.join(COLUMNS)} on each line")
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        row = parse_json(line.encode(), where)
        row.object()
        missing = [key for key in _NEEDED if key not in row]
        if missing:
            raise UserError(f"{where}: has no {missing[0]!r}; give {' and '.join(map(json.dumps, _NEEDED))}")
        yield where, {key: row[key].text() for key in COLUMNS if key in row}


def _of_list(file: Path, rows: Iterator[tuple[str, Mapping[str, str]]]) -> list[Item]:
    """Lines of one video and name are one item of several sentences; paths are those from the list's folder."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for where, row in rows:
        if not row["video"]:
            raise UserError(f"{where}: names no video; give its path")
        try:
            normalize_expression(row["sentence"])
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        path = os.path.normpath(file.parent / row["video"])
        found.setdefault((path, row.get("name", "")), {})[row["sentence"]] = None
    if not found:
        raise UserError(f"{file}: lists no video; give one on each line")
    return [Item(path, tuple(sentences), name) for (path, name), sentences in found.items()]


def folder_names(items: Sequence[Item], known: Mapping[str, str]) -> list[str]:
    """A folder's name for each item, no two of which are the same on any disk.

    Videos of one name are told apart by the folders that they lie in, else by numbers.

    Args:
      known: names that an earlier run has chosen, by `key`: they stay.
    """
    taken = {_plain(name) for name in (*known.values(), *RESERVED)}
    short = [slug(item.name or Path(item.video).stem) for item in items]
    counts: dict[str, int] = {}
    for name in short:
        counts[_plain(name)] = counts.get(_plain(name), 0) + 1
    names = []
    for item, name in zip(items, short):
        if key(item) in known:
            names.append(known[key(item)])
            continue
        parent = Path(os.path.abspath(item.video)).parent.name
        if counts[_plain(name)] > 1 and not item.name and parent:
            name = f"{slug(parent)}-{name}"
        unique, number = name, 2
        while _plain(unique) in taken:
            unique, number = f"{name}-{number}", number + 1
        taken.add(_plain(unique))
        names.append(unique)
    return names


def key(item: Item) -> str:
    """What tells an item from the others of a run, and is the same in the next run."""
    return f"{os.path.abspath(item.video)}\n{item.name}"


def _plain(name: str) -> str:
    return same_name(name).casefold()


def looks_like_video(text: str) -> bool:
    """Whether a sentence is likely a file's name, such as of a shell's pattern."""
    named = text.lower().endswith((*MEDIA, *SUFFIXES))
    return named and (os.path.exists(text) or not re.search(r"\s", text))
