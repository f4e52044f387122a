"""JSON from files, read with types: a value knows its place, and whatever is wrong with it is said with the place.

`read_json(path)["videos"]["v1"]["frames"][3].text()` gives a str, or raises a UserError such as
"meta.json: videos.v1.frames[3]: expected text, found a number; get the file again".
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from virst_jax.errors import UserError, kind_of, printable
from virst_jax.io.regular import ADVICE, read_file

MAX_BYTES = 1 << 29
_LARGEST = 1 << 53  # of a whole number: what a float64 tells from its neighbours
_SURROGATES = ("\ud800", "\udfff")


class Json:
    """A value in a JSON file, or none where the file has none, and its place. The methods check what it is."""

    __slots__ = ("_key", "_parent", "file", "value")

    def __init__(self, value: Any, file: str, parent: "Json | None" = None, key: str | int | None = None):
        self.value, self.file, self._parent, self._key = value, file, parent, key

    @property
    def where(self) -> str:
        """FILE: the keys that lead here."""
        path = ""
        at: Json | None = self
        while at is not None and at._key is not None:
            path = (f"[{at._key}]" if isinstance(at._key, int) else f".{_short(at._key)}") + path
            at = at._parent
        return f"{self.file}: {path.removeprefix('.')}" if path else self.file

    def error(self, what: str, advice: str = ADVICE) -> UserError:
        """An error that names the place."""
        return UserError(f"{self.where}: {what}; {advice}")

    def expected(self, what: str) -> UserError:
        """An error that names the place and what stands there in place of what was expected."""
        return self.error(f"expected {what}, found {kind_of(self.value)}")

    def __contains__(self, key: str) -> bool:
        """Whether this is an object with a member `key`."""
        return isinstance(self.value, dict) and key in self.value

    def __getitem__(self, key: str | int) -> "Json":
        """The member or element, which holds None where there is none.

        Raises UserError: this is no object (for a text) or no list (for a number).
        """
        if isinstance(key, str):
            if not isinstance(self.value, dict):
                raise self.expected("an object")
            return Json(self.value.get(key), self.file, self, key)
        if not isinstance(self.value, list):
            raise self.expected("a list")
        return Json(self.value[key] if key < len(self.value) else None, self.file, self, key)

    def members(self) -> Iterator[tuple[str, "Json"]]:
        """Keys and values. Raises UserError: this is no object."""
        if not isinstance(self.value, dict):
            raise self.expected("an object")
        return ((key, Json(value, self.file, self, key)) for key, value in self.value.items())

    def elements(self) -> Iterator["Json"]:
        """The elements. Raises UserError: this is no list."""
        if not isinstance(self.value, list):
            raise self.expected("a list")
        return (Json(value, self.file, self, i) for i, value in enumerate(self.value))

    def __len__(self) -> int:
        """Elements of a list, members of an object. Raises UserError: this is neither."""
        if not isinstance(self.value, list | dict):
            raise self.expected("a list")
        return len(self.value)

    def __bool__(self) -> bool:
        raise TypeError("a place in a file is neither true nor false; ask for .value or a type")

    def object(self) -> dict[str, Any]:
        """Raises UserError: this is no object."""
        if not isinstance(self.value, dict):
            raise self.expected("an object")
        return self.value

    def text(self) -> str:
        """Raises UserError: this is no text, or holds half of a character."""
        if not isinstance(self.value, str):
            raise self.expected("text")
        if not is_whole(self.value):
            raise self.error("holds half of a character (a lone surrogate)")
        return self.value

    def integer(self, low: int = -_LARGEST, high: int = _LARGEST) -> int:
        """A whole number. Raises UserError: this is none, or out of range."""
        value = self.value
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # 3.0, as some programs write
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.expected("a whole number")
        if not low <= value <= high:
            bounds = f"of {low} or more" if high == _LARGEST else f"from {low} to {high}"
            raise self.error(f"expected a whole number {bounds}")
        return value

    def number(self) -> float:
        """A finite number. Raises UserError: this is none."""
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise self.expected("a number")
        try:
            value = float(self.value)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            raise self.error("expected a finite number")
        return value

    def boolean(self) -> bool:
        """true or false, or 1 or 0. Raises UserError: this is neither."""
        if self.value not in (True, False):
            raise self.expected("true or false")
        return bool(self.value)

    def identifier(self) -> str:
        """A number or text that names something, as text. Raises UserError: this is neither."""
        return self.text() if isinstance(self.value, str) else str(self.integer())

    def identifiers(self) -> tuple[str, ...]:
        """A list of numbers or texts, or one alone; nothing for null. Raises UserError: this is something else."""
        if self.value is None:
            return ()
        if isinstance(self.value, list):
            return tuple(element.identifier() for element in self.elements())
        return (self.identifier(),)


def read_json(
    path: str | Path, encoding: str = "utf-8", limit: int = MAX_BYTES, *, advice: str = "check the data set's folder"
) -> Json:
    """The contents of a JSON file. A byte order mark before it is passed over.

    Args:
      advice: what to do if there is no file.

    Raises:
      UserError: it is missing, larger than `limit` bytes, unreadable or no JSON. Its cause is a UnicodeDecodeError
        where the file is not in this encoding.
    """
    return parse_json(read_file(path, limit, advice), str(path), encoding)


def parse_json(content: bytes, where: str, encoding: str = "utf-8") -> Json:
    """The value of JSON text, which messages call `where`.

    Raises:
      UserError: it is no JSON.
    """
    if encoding == "utf-8" and (content[:4].count(0) or content[:2] in (b"\xff\xfe", b"\xfe\xff")):
        encoding = json.detect_encoding(content)  # Windows' UTF-16
    try:
        return Json(json.loads(content.decode("utf-8-sig" if encoding == "utf-8" else encoding)), where)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not readable ({error}); {ADVICE}") from error
    except RecursionError:
        raise UserError(f"{where}: not valid JSON (lists within lists without end); {ADVICE}") from None
    except ValueError as error:  # a JSONDecodeError, or a number of thousands of digits
        raise UserError(f"{where}: not valid JSON ({str(error)[:120]}); {ADVICE}") from error


def is_whole(text: str) -> bool:
    """Whether no half of a character (a lone surrogate) is in a text, so that it can be written in UTF-8."""
    return text.isascii() or not any(_SURROGATES[0] <= c <= _SURROGATES[1] for c in text)


def _short(key: str) -> str:
    return printable(key if len(key) <= 60 else key[:60] + "...")
