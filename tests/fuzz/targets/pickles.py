"""Pickles of plain containers: changed files, and programs of random steps."""

import pickle
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from fuzz.mutate import ODD, byte_edits, edit_bytes
from fuzz.target import Target
from virst_jax.data.datasets.pickles import _TABLE, read_plain_pickle

SENTENCE = {"sent_id": 0, "sent": "the café", "tokens": ["a"]}
REFS = [{"ref_id": 1, "ann_id": 2, "split": "train", "sentences": [SENTENCE]}] * 2
# older protocols make sets by a call
PROGRAMS = [pickle.dumps([REFS, (1.5, None, 2**70, b"x"), {1, 2}][: 3 if p >= 4 else 1], p) for p in range(6)]
STEPS = [step.encode("latin-1") for step in _TABLE] + [b".", b"c", b"R", b"P", b"\x82", b"\x93"]
FREQUENT = [b"K\x01", b"]", b"}", b"(", b"\x85", b"2", b"q\x00", b"h\x00"]
step = st.one_of(st.sampled_from(STEPS), st.sampled_from(FREQUENT), st.binary(max_size=3))
# tuples within tuples, doubled, used as keys; lists in themselves
BEGINNINGS = [b"", b")", b"]", b"}", b"K\x01", b"(", b"]q\x00"]
REPEATED = [b"\x85", b"2\x86", b"2\x87", b"(", b"2", b"q\x002\x86", b"\x85q\x00h\x00\x86", b"h\x00a", b"(l", b"(h\x00t"]
programs = st.lists(step, max_size=40).map(lambda steps: b"".join(steps) + b".")


def read(content: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".p") as file:
        file.write(content)
        file.flush()
        return type(read_plain_pickle(Path(file.name))).__name__


def deep(case: tuple[int, bytes, bytes]) -> str:
    count, first, again = case
    return read(first + again * count + b".")


def changed(case: tuple[int, Any]) -> str:
    return read(edit_bytes(PROGRAMS[case[0]], case[1]))


values = st.recursive(ODD, lambda inner: st.lists(inner, max_size=3), max_leaves=9)
deeply = st.tuples(st.integers(0, 100000), st.sampled_from(BEGINNINGS), st.sampled_from(REPEATED))
TARGETS = [
    Target("pickle_changed", st.tuples(st.integers(0, 5), byte_edits), changed),
    Target("pickle_programs", programs, read),
    Target("pickle_deep", deeply, deep, cost=2),
    Target("pickle_plain", values, lambda value: read(pickle.dumps(value, 4))),
]
