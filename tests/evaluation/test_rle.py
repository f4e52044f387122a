"""Run-length codes against pycocotools."""

import numpy as np
import pytest
from pycocotools import mask as coco

from virst_jax.errors import UserError
from virst_jax.evaluation import bitmask
from virst_jax.evaluation.rle import pack_codes
from virst_jax.io.masks import encode_mask, read_runs

SIZES = [(1, 1), (1, 70), (70, 1), (5, 64), (40, 65), (33, 130), (64, 64), (300, 200)]


def masks_of(size):
    """Noise, empty, full, stripes, single pixels, a box."""
    rng = np.random.default_rng(size[0])
    masks = rng.random((9, *size)) > np.array([0.5, 0.01, 0.99, 1, 1, 1, 1, 1, 1]).reshape(-1, 1, 1)
    masks[4] = True
    masks[5, :, ::2] = True
    masks[6, ::2] = True
    masks[7, 0, 0] = masks[7, -1, -1] = True
    masks[8, size[0] // 4 : size[0] // 2 + 1, size[1] // 3 :] = True
    return masks


@pytest.mark.parametrize("size", SIZES)
def test_codes_become_the_packed_masks(size):
    masks = masks_of(size)
    codes = [encode_mask(mask) for mask in masks]
    np.testing.assert_array_equal(pack_codes(codes, size), bitmask.pack(masks))


@pytest.mark.parametrize("size", SIZES)
def test_runs_are_those_of_pycocotools(size):
    for mask in masks_of(size):
        flat = mask.T.reshape(-1)
        changes = np.flatnonzero(np.diff(flat.astype(int))) + 1
        runs = np.diff(np.concatenate([[0], changes, [len(flat)]]))
        expected = [0, *runs] if flat[0] else list(runs)
        assert read_runs(encode_mask(mask)).tolist() == expected


def test_runs_of_no_length_are_understood():
    """A code that another program wrote: 2 out, 0 in, 1 out, 3 in, 0 out, 2 in, 1 out."""
    runs = [2, 0, 1, 3, 0, 2, 1]
    code = coco.frPyObjects({"size": [3, 3], "counts": runs}, 3, 3)
    assert read_runs(code["counts"].decode()).tolist() == runs
    expected = np.repeat([0, 1] * 4, [*runs, 0]).reshape(3, 3).T.astype(bool)
    np.testing.assert_array_equal(bitmask.unpack(pack_codes([code["counts"].decode()], (3, 3)), 3)[0], expected)


@pytest.mark.parametrize("code", ["\u00e9abc", "", "abc", "zzzz", "~~~", "1", "R", "O" * 3, "P" * 14 + "1"])
def test_damaged_codes_are_refused(code):
    with pytest.raises(UserError, match="damaged"):
        pack_codes([code], (5, 5))


def test_a_code_of_another_size_is_refused():
    with pytest.raises(UserError, match="30 pixels, a frame has 25"):
        pack_codes([encode_mask(np.ones((6, 5), bool))], (5, 5))
