"""Large JSON files read piece by piece: where each member lies is found once, its text is parsed when asked for.

The mask files of the benchmarks hold hundreds of megabytes of run-length codes under a few thousand ids. Parsing one
whole takes gigabytes, in every worker process anew. Here the file is mapped, and a regular expression that knows
strings and nesting steps from member to member; an index is a few numbers an id.
"""

import json
import mmap
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from virst_jax.errors import UserError
from virst_jax.io.json_files import Json
from virst_jax.io.regular import ADVICE, require_file

_BOM = b"\xef\xbb\xbf"
_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_DEPTH = 9  # nesting of one member that is understood; the benchmarks need 5


def _nested(depth: int) -> bytes:
    inner = rb'[^"\[\]{}]++|' + _STRING
    pattern = rb"[\[{](?:" + inner + rb")*+[\]}]"
    for _ in range(depth - 1):
        pattern = rb"[\[{](?:" + inner + rb"|" + pattern + rb")*+[\]}]"
    return pattern


_VALUE = re.compile(rb"\s*+((?:" + _nested(_DEPTH) + rb"|" + _STRING + rb'|[^",\[\]{}\s]++))\s*+', re.DOTALL)
_KEY = re.compile(rb"\s*+(" + _STRING + rb")\s*+:", re.DOTALL)
_NEXT = re.compile(rb"\s*+([,\]}])")
_SPACE = re.compile(rb"\s*+")

Span = tuple[int, int]  # bytes of the file


@dataclass(frozen=True)
class JsonMembers:
    """Members of an object in a JSON file, by key. Picklable."""

    path: str
    spans: dict[str, Span]

    def __contains__(self, key: str) -> bool:
        return key in self.spans

    def __getitem__(self, key: str) -> Json:
        """The member's value and place. The last few are kept; do not change them.

        Raises:
          KeyError: no such member.
          UserError: the file is gone, or its text there is not JSON.
        """
        return Json(read_span(self.path, self.spans[key]).value, self.path, Json(None, self.path), key)


def index_members(path: Path, span: Span | None = None) -> JsonMembers:
    """Finds the members of the object at `span` (the whole file).

    Raises:
      UserError: the file is missing, or not an object of well-formed members.
    """
    with _mapped(path) as data:
        spans: dict[str, Span] = {}
        at, end = _enter(path, data, span, b"{")
        while True:
            key = _KEY.match(data, at, end)
            if key is None:
                if not spans and _closes(data, at, end, b"}"):
                    break
                raise _malformed(path, at)
            value = _VALUE.match(data, key.end(), end)
            if value is None:
                raise _malformed(path, key.end())
            name = _parse(str(path), key[1], key.start(1)).value
            spans[name] = value.span(1)
            at = value.end()
            if _closes(data, at, end, b"}"):
                break
            at = _comma(path, data, at, end)
    return JsonMembers(str(path), spans)


def iterate_elements(path: Path, span: Span | None = None, name: str = "") -> Iterator[tuple[Span, Json]]:
    """Bytes and value of every element of the list at `span` (the whole file), one at a time.

    Args:
      name: of the list, for messages.

    Raises:
      UserError: the file is missing, or not a list of well-formed elements.
    """
    with _mapped(path) as data:
        at, end = _enter(path, data, span, b"[")
        if _closes(data, at, end, b"]"):
            return
        file, number = str(path), 0
        place = Json(None, file, Json(None, file), name) if name else Json(None, file)
        while True:
            value = _VALUE.match(data, at, end)
            if value is None:
                raise _malformed(path, at)
            yield value.span(1), Json(_parse(file, value[1], value.start(1)).value, file, place, number)
            number += 1
            at = value.end()
            if _closes(data, at, end, b"]"):
                return
            at = _comma(path, data, at, end)


def read_span(path: str, span: Span) -> Json:
    """The value at a place of a file. The last few are kept; do not change them.

    Raises:
      UserError: the file is gone, or its text there is not JSON.
    """
    try:
        return _read_span(path, span, os.stat(path).st_mtime_ns)
    except OSError as error:
        raise UserError(f"{path}: not readable any more ({error.strerror}); was the data set moved?") from error


@lru_cache(maxsize=256)  # all annotations of a long video with many expressions
def _read_span(path: str, span: Span, changed: int) -> Json:
    with open(path, "rb") as file:
        file.seek(span[0])
        return _parse(path, file.read(span[1] - span[0]), span[0])


def _parse(path: str, text: bytes, at: int) -> Json:
    try:
        # values within a file are in UTF-8 whatever they begin with
        return Json(json.loads(text.decode("utf-8")), path)
    except (ValueError, RecursionError) as error:
        reason = "too deep" if isinstance(error, RecursionError) else str(error)[:120]
        raise UserError(f"{path}: not valid JSON near byte {at} ({reason}); {ADVICE}") from error


def _mapped(path: Path) -> mmap.mmap:
    if not require_file(path):
        raise UserError(f"{path}: empty; {ADVICE}")
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable ({error}); {ADVICE}") from error


def _enter(path: Path, data: mmap.mmap, span: Span | None, bracket: bytes) -> Span:
    start, end = span or (len(_BOM) if data[: len(_BOM)] == _BOM else 0, len(data))
    space = _SPACE.match(data, start, end)
    at = space.end() if space else start
    if data[at : at + 1] != bracket:
        kind = "an object" if bracket == b"{" else "a list"
        raise UserError(f"{path}: expected {kind} at byte {at}; check that it is the right file")
    return at + 1, end


def _closes(data: mmap.mmap, at: int, end: int, bracket: bytes) -> bool:
    found = _NEXT.match(data, at, end)
    return found is not None and found[1] == bracket


def _comma(path: Path, data: mmap.mmap, at: int, end: int) -> int:
    found = _NEXT.match(data, at, end)
    if found is None or found[1] != b",":
        raise _malformed(path, at)
    return found.end()


def _malformed(path: Path, at: int) -> UserError:
    return UserError(f"{path}: truncated or not valid JSON near byte {at}; get the file again")
