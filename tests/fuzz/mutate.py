"""Changes to good files: to the values of JSON, and to bytes."""

import copy
from typing import Any

from hypothesis import strategies as st

_INTEGERS = [0, 1, -1, 2, 255, 256, 65536, 2**31, 2**53, 2**63, -(2**63), 10**30, 10**400]
_FLOATS = [0.5, -1.0, 1e30, 1e300, float("nan"), float("inf"), -float("inf"), 3.0]
_TEXTS = ["", " ", "0", "-1", "../../x", "/etc/passwd", "a\\b", "\ud800", "\x00", "con", "é", "x" * 300, "<image>"]
_TEXTS += ["NaN", "train", "²", "٣", "9" * 5000, "a/b", ".", "..", "\u2028"]
_OTHERS = [None, True, False, [], {}, [[]], [None], [0], ["0"], {"": None}, [[0, 0] * 3], [[1e300] * 6], [[None] * 6]]
_OTHERS += [
    {"size": size, "counts": counts} for size, counts in (([48, 64], ""), ([48, 64], [1, 2]), ([10**9] * 2, "0"))
]

ODD = st.one_of(
    st.sampled_from(_INTEGERS),
    st.sampled_from(_FLOATS),
    st.sampled_from(_TEXTS),
    st.sampled_from(_OTHERS),
    st.integers(-300, 300),
    st.text(max_size=8),
)

KINDS = ("replace", "remove", "repeat", "rename", "wrap", "deepen", "swap")
json_edits = st.lists(
    st.tuples(st.lists(st.integers(0, 9), max_size=9), st.sampled_from(KINDS), ODD), min_size=1, max_size=3
)


def edit_json(value: Any, edits: list[tuple[list[int], str, Any]]) -> Any:
    """A copy of a JSON value with changes: each is the way to a place, what is done there, and a value for it."""
    holder = [copy.deepcopy(value)]
    for way, kind, odd in edits:
        _edit(holder, way, kind, odd)
    return holder[0]


def _edit(at: Any, way: list[int], kind: str, odd: Any) -> None:
    key: Any = 0
    for step in way:
        below = at[key]
        if not isinstance(below, list | dict) or not below:
            break
        at, key = below, (step % len(below) if isinstance(below, list) else list(below)[step % len(below)])
    if kind == "replace":
        at[key] = copy.deepcopy(odd)
    elif (kind == "remove" and isinstance(at, dict)) or (kind == "remove" and len(at) > 1):
        del at[key]
    elif kind == "repeat" and isinstance(at, list):
        at.append(at[key])
    elif kind == "rename" and isinstance(at, dict):
        at[odd if isinstance(odd, str) else str(odd)[:400]] = at.pop(key)
    elif kind == "wrap":
        at[key] = [at[key]]
    elif kind == "deepen":
        for _ in range(50):
            at[key] = [at[key]]
    elif kind == "swap" and len(at) > 1:
        other = (key + 1) % len(at) if isinstance(at, list) else next(k for k in at if k != key)
        at[key], at[other] = at[other], at[key]


_BYTES = st.sampled_from(("set", "set", "cut", "insert", "remove", "large"))
byte_edits = st.lists(st.tuples(st.floats(0, 1), _BYTES, st.binary(min_size=1, max_size=8)), min_size=1, max_size=4)


def edit_bytes(content: bytes, edits: list[tuple[float, str, bytes]]) -> bytes:
    """A copy of a file's bytes with changes: each is a place as a part of the whole, what is done, and bytes for it."""
    data = bytearray(content)
    for place, kind, new in edits:
        at = int(place * len(data))
        if kind == "set":
            data[at : at + len(new)] = new
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = new
        elif kind == "remove":
            del data[at : at + len(new)]
        else:
            data[at : at + 4] = b"\xff\xff\xff\x7f"
    return bytes(data)
