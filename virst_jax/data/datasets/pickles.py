"""Pickles that hold plain containers: the refs(unc).p of RefCOCO. Nothing in the file is ever called or imported.

The program of a pickle is carried out here, not by Python's own unpickler, which a small file can make take gigabytes
(a number of the memo), run without end (the hash of tuples that share their parts) or crash (tuples a million deep).
Here every step costs what its bytes in the file cost, and a key is a text or a number.
"""

import codecs
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from virst_jax.errors import UserError
from virst_jax.io.regular import read_file

MAX_BYTES = 1 << 30
_MAX_INT_BYTES = 32
_MAX_DIGITS = 80
_SCALARS = (str, int, float, bool, type(None))
_MARK = object()


class _Damaged(Exception):
    """What is wrong with a pickle."""


def read_plain_pickle(path: Path) -> Any:
    """The contents of a pickle of plain containers. Text of Python 2 is taken for UTF-8, else Latin-1.

    Lists that hold themselves, and parts that are shared, stay as they are; keys and members of sets are texts and
    numbers.

    Raises:
      UserError: it is missing, too large, truncated, or holds anything but plain containers.
    """
    content = read_file(path, MAX_BYTES)
    try:
        return _Machine(content).run()
    except (_Damaged, IndexError, ValueError, TypeError, struct.error) as error:
        reason = str(error) if isinstance(error, _Damaged) else "truncated or damaged"
        raise UserError(
            f"{path}: not a pickle of plain lists and dicts ({reason}); nothing of it was run, get the file again"
        ) from error


class _Machine:
    """The machine that a pickle is the program of: a stack, the memo, and a place in the program."""

    def __init__(self, content: bytes):
        self.content, self.at = content, 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        content, steps = self.content, _STEPS
        while True:
            if self.at >= len(content):
                raise _Damaged("it ends early")
            code = content[self.at]
            self.at += 1
            if code == 0x2E:  # STOP
                value = self.stack.pop()
                if value is _MARK:
                    raise _Damaged("it ends within a list")
                return value
            step = steps[code]
            if step is None:
                raise _Damaged(_why_not(code, content[self.at : self.at + 120]))
            step(self)

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.content):
            raise _Damaged("it ends early")
        part = self.content[self.at : end]
        self.at = end
        return part

    def number(self, count: int) -> int:
        return int.from_bytes(self.take(count), "little")

    def line(self) -> bytes:
        end = self.content.find(b"\n", self.at)
        if end < 0:
            raise _Damaged("it ends early")
        part = self.content[self.at : end]
        self.at = end + 1
        return part

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise _Damaged("a list begins in the wrong place")
        return value

    def pop_to_mark(self) -> list[Any]:
        stack = self.stack
        at = len(stack) - 1
        while stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise _Damaged("a list has no beginning")
        items = stack[at + 1 :]
        del stack[at:]
        return items

    def top(self, kind: type) -> Any:
        value = self.stack[-1]
        if type(value) is not kind:
            raise _Damaged("a value is put into what is no container for it")
        return value

    def put(self, index: int) -> None:
        if self.stack[-1] is _MARK:
            raise _Damaged("a list begins in the wrong place")
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise _Damaged("it refers to what was not there")
        self.stack.append(self.memo[index])

    def fill(self, target: dict[Any, Any], items: list[Any]) -> None:
        if len(items) % 2:
            raise _Damaged("a key has no value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value


def _key(value: Any) -> Any:
    if not isinstance(value, _SCALARS):
        raise _Damaged("a key is neither text nor number")
    return value


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _quoted(raw: bytes) -> str:
    raw = raw.strip()
    if len(raw) < 2 or raw[:1] not in b"'\"" or raw[-1:] != raw[:1]:
        raise _Damaged("a text has no quotes")
    return _text(codecs.escape_decode(raw[1:-1])[0])


def _decimal(raw: bytes) -> int:
    raw = raw.strip().removesuffix(b"L")
    if len(raw) > _MAX_DIGITS:
        raise _Damaged("a number is too long")
    return int(raw)


def _int(raw: bytes) -> int | bool:
    return {b"00": False, b"01": True}[raw] if raw in (b"00", b"01") else _decimal(raw)


def _long(m: _Machine, count: int) -> int:
    if count > _MAX_INT_BYTES:
        raise _Damaged("a number is too long")
    return int.from_bytes(m.take(count), "little", signed=True)


def _string(m: _Machine, count: int) -> str:
    return _text(m.take(count))


def _push(value: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    return lambda m: m.stack.append(value(m))


def _tuple(count: int) -> Callable[[_Machine], None]:
    def step(m: _Machine) -> None:
        items = [m.pop() for _ in range(count)]
        m.stack.append(tuple(items[::-1]))

    return step


def _append(m: _Machine) -> None:
    value = m.pop()
    m.top(list).append(value)


def _appends(m: _Machine) -> None:
    items = m.pop_to_mark()
    m.top(list).extend(items)


def _set_item(m: _Machine) -> None:
    value, key = m.pop(), m.pop()
    m.top(dict)[_key(key)] = value


def _set_items(m: _Machine) -> None:
    items = m.pop_to_mark()
    m.fill(m.top(dict), items)


def _dict(m: _Machine) -> None:
    made: dict[Any, Any] = {}
    m.fill(made, m.pop_to_mark())
    m.stack.append(made)


def _add_items(m: _Machine) -> None:
    items = m.pop_to_mark()
    m.top(set).update(_key(item) for item in items)


def _why_not(code: int, following: bytes) -> str:
    """What a step that is not carried out would have done."""
    if code in b"ci":
        module, name = (following + b"\n\n").split(b"\n")[:2]
        return f"refers to {ascii(_text(module + b'.' + name))[1:-1][:80]}"
    if code in b"\x93\x82\x83\x84":
        return "refers to something by its name"
    if code in b"PQ\x97":
        return "refers to an object outside of the file"
    if code in b"Rbo\x81\x92":
        return "would make an object"
    return f"holds the byte {code}, which is no step of a plain pickle"


_TABLE: dict[str, Callable[[_Machine], Any]] = {
    "\x80": lambda m: m.take(1),  # PROTO
    "\x95": lambda m: m.take(8),  # FRAME: the length of what follows
    "(": lambda m: m.stack.append(_MARK),
    "0": lambda m: m.stack.pop(),
    "1": lambda m: m.pop_to_mark(),
    "2": lambda m: m.stack.append(m.stack[-1]),
    "N": _push(lambda m: None),
    "\x88": _push(lambda m: True),
    "\x89": _push(lambda m: False),
    "I": _push(lambda m: _int(m.line())),
    "L": _push(lambda m: _decimal(m.line())),
    "J": _push(lambda m: int.from_bytes(m.take(4), "little", signed=True)),
    "K": _push(lambda m: m.number(1)),
    "M": _push(lambda m: m.number(2)),
    "\x8a": _push(lambda m: _long(m, m.number(1))),
    "\x8b": _push(lambda m: _long(m, m.number(4))),
    "F": _push(lambda m: float(m.line()[:_MAX_DIGITS])),
    "G": _push(lambda m: struct.unpack(">d", m.take(8))[0]),
    "S": _push(lambda m: _quoted(m.line())),
    "T": _push(lambda m: _string(m, m.number(4))),
    "U": _push(lambda m: _string(m, m.number(1))),
    "V": _push(lambda m: m.line().decode("raw-unicode-escape")),
    "X": _push(lambda m: m.take(m.number(4)).decode("utf-8", "surrogatepass")),
    "\x8c": _push(lambda m: m.take(m.number(1)).decode("utf-8", "surrogatepass")),
    "\x8d": _push(lambda m: m.take(m.number(8)).decode("utf-8", "surrogatepass")),
    "B": _push(lambda m: m.take(m.number(4))),
    "C": _push(lambda m: m.take(m.number(1))),
    "\x8e": _push(lambda m: m.take(m.number(8))),
    "]": _push(lambda m: []),
    "l": _push(lambda m: m.pop_to_mark()),
    "a": _append,
    "e": _appends,
    "}": _push(lambda m: {}),
    "d": _dict,
    "s": _set_item,
    "u": _set_items,
    ")": _push(lambda m: ()),
    "t": _push(lambda m: tuple(m.pop_to_mark())),
    "\x85": _tuple(1),
    "\x86": _tuple(2),
    "\x87": _tuple(3),
    "\x8f": _push(lambda m: set()),
    "\x90": _add_items,
    "\x91": _push(lambda m: frozenset(_key(item) for item in m.pop_to_mark())),
    "g": lambda m: m.get(_decimal(m.line())),
    "h": lambda m: m.get(m.number(1)),
    "j": lambda m: m.get(m.number(4)),
    "p": lambda m: m.put(_decimal(m.line())),
    "q": lambda m: m.put(m.number(1)),
    "r": lambda m: m.put(m.number(4)),
    "\x94": lambda m: m.put(len(m.memo)),
}
_STEPS: list[Callable[[_Machine], Any] | None] = [_TABLE.get(chr(code)) for code in range(256)]
