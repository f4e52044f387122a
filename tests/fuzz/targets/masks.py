"""Run-length codes and polygons."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from fuzz.mutate import ODD
from fuzz.target import Target
from virst_jax.evaluation.rle import pack_codes
from virst_jax.io.masks import decode_mask, encode_mask, read_runs

SIZE = (12, 17)
_rng = np.random.default_rng(0)
CODES = [encode_mask(_rng.random(SIZE) < share) for share in (0, 0.1, 0.5, 1)]

texts = st.one_of(
    st.text(alphabet=st.characters(min_codepoint=40, max_codepoint=120), max_size=60),
    st.tuples(st.sampled_from(CODES), st.integers(0, 80), st.text(max_size=3)).map(lambda t: t[0][: t[1]] + t[2]),
    st.sampled_from(CODES),
)
counts = st.one_of(texts, st.lists(st.integers(-3, 300), max_size=20), st.lists(ODD, max_size=4), ODD)
sizes = st.one_of(st.just(list(SIZE)), st.lists(st.integers(-1, 40), max_size=3), ODD)
numbers = st.one_of(st.floats(-30, 60), st.floats(), st.integers(), st.none())
polygons = st.lists(
    st.one_of(st.lists(st.floats(-30, 60), max_size=12), st.lists(numbers, max_size=12), ODD), max_size=4
)
good = st.sampled_from(CODES).map(lambda text: {"size": list(SIZE), "counts": text})
points = st.tuples(st.floats(-30, 60), st.floats(-30, 60))
drawn = st.lists(
    st.lists(points, min_size=3, max_size=9).map(lambda xy: [v for p in xy for v in p]), min_size=1, max_size=3
)
codes = st.fixed_dictionaries({"size": sizes, "counts": counts})
anything = st.one_of(
    good, drawn, st.lists(good, min_size=1, max_size=3), codes, st.lists(codes, max_size=3), polygons, ODD
)


def decode(code: Any) -> int:
    mask = decode_mask(code, SIZE, "masks.json: x")
    assert (mask.shape, mask.dtype) == (SIZE, bool)
    # what was read before leaves no trace
    np.full(SIZE, 7, np.uint8)
    np.testing.assert_array_equal(decode_mask(code, SIZE, "masks.json: x"), mask)
    return int(mask.sum())


def pack(code: str) -> int:
    return int(pack_codes([code], SIZE).sum()) + len(read_runs(code))


TARGETS = [Target("masks_coco", anything, decode), Target("masks_packed", texts, pack)]
