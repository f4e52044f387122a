import numpy as np
import pytest
from pycocotools import mask as coco

from virst_jax.errors import UserError
from virst_jax.io.masks import decode_mask, draw_polygons, encode_mask

SIZE = (48, 64)
FAR = [[0, 0, 10, 0, 10, 10]]


def code(counts, size=SIZE):
    return {"size": list(size), "counts": counts}


def test_codes_are_those_of_pycocotools():
    rng = np.random.default_rng(0)
    for share in (0.0, 0.1, 0.5, 1.0):
        mask = rng.random(SIZE) < share
        text = encode_mask(mask)
        runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[2], mask.T.reshape(-1), [2]]))))
        listed = [int(n) for n in runs] if not mask[0, 0] else [0, *map(int, runs)]
        for given in (code(text), code(text.encode()), [code(text)], code(listed)):
            np.testing.assert_array_equal(decode_mask(given, SIZE, "x"), mask)


@pytest.mark.parametrize("counts", ["", [], [100, 50], [0], "R;;U1", [48 * 64, 1], [2**62, 2**62], [48 * 64 + 1, -1]])
def test_codes_that_do_not_cover_the_frame(counts):
    """Case 04: they decoded to what memory held before."""
    with pytest.raises(UserError, match=r"f\.json: a: .*(pixels, a frame has 3072|not a mask|large)"):
        decode_mask(code(counts), SIZE, "f.json: a")


def test_a_code_that_is_cut():
    text = encode_mask(np.eye(*SIZE, dtype=bool))
    for cut in range(1, 12):
        with pytest.raises(UserError, match="damaged run-length code"):
            decode_mask(code(text[:-cut]), SIZE, "x")


@pytest.mark.parametrize(
    "given",
    [
        *(None, "", "x", 3, [], {}, [{}], [None], [3], [code(None)], code("é"), code([1.5]), code([True]), code({})),
        *({"size": 3, "counts": ""}, {"size": [48, 64, 1], "counts": ""}, {"size": ["48", 64], "counts": ""}),
        *(code([3072], (64, 48)), code([3072], (10**30, 1)), [code([3072]), 3], code("~" * 9), code("o" * 99 + "0")),
        *([[1, 2, None, 4, 5, 6]], [[float("nan")] * 6], [[float("inf")] * 6], [[1e300] * 6], [[10**400] * 6]),
        *([[1, 2, 3, 4, 5]], [[1, 2]], [[[1, 2]] * 3], ["abcdef"], [[True] * 6], [[0, 0, 1e9, 1e9, 5, 5]]),
        [[0, 0, 500, 500] * 100000],
    ],
    ids=str,
)
def test_what_is_no_mask(given):
    with pytest.raises(UserError, match=r"^f\.json: a: ") as error:
        decode_mask(given, SIZE, "f.json: a")
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, -1), (10**9, 10**9)])
def test_frames_that_are_none(size):
    with pytest.raises(UserError, match="x: a frame of"):
        decode_mask({"size": list(size), "counts": []}, size, "x")


def test_polygons_are_those_of_pycocotools():
    rng = np.random.default_rng(1)
    for _ in range(20):
        polygons = [(rng.random(2 * n) * 80 - 10).round(2).tolist() for n in (3, 7)]
        expected = coco.decode(coco.merge(coco.frPyObjects(polygons, *SIZE))).astype(bool)
        np.testing.assert_array_equal(draw_polygons([*polygons, [1, 2]], SIZE, "x"), expected)
