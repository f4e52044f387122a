"""Masks that are kept as run lengths read as the array that they were made of."""

import numpy as np
import pytest

from virst_jax.errors import UserError
from virst_jax.io.run_length_masks import RunLengthMasks

N, T, H, W = 3, 5, 6, 7


@pytest.fixture(scope="module")
def dense():
    masks = np.random.default_rng(0).random((N, T, H, W)) > 0.6
    masks[1, 2] = False
    return masks


@pytest.fixture(scope="module")
def lazy(dense):
    return RunLengthMasks.of_frames((dense[:, t] for t in range(T)), N, (H, W))


@pytest.mark.parametrize(
    "index",
    [
        0,
        -1,
        slice(1, None),
        (slice(None), 2),
        (1, 3),
        (slice(None), slice(None, None, 2)),
        (0, 1, 2),
        (0, 1, slice(2, 5), slice(None, 3)),
        (slice(None), 1, slice(1, 3)),
        (..., slice(2, 4)),
        (0, ...),
        ([2, 0],),
        (slice(None), [4, 1, 1]),
        (slice(3, None),),
    ],
)
def test_it_reads_as_the_array(lazy, dense, index):
    found = lazy[index]
    assert found.dtype == bool
    np.testing.assert_array_equal(found, dense[index])


def test_as_a_whole(lazy, dense):
    assert lazy.shape == dense.shape
    assert (lazy.ndim, lazy.dtype, len(lazy)) == (4, bool, N)
    np.testing.assert_array_equal(np.asarray(lazy), dense)
    np.testing.assert_array_equal(lazy.areas(), dense.sum((2, 3)))
    np.testing.assert_array_equal(lazy.frame(3), dense[:, 3])
    assert (lazy == dense).all()
    assert np.array_equal(lazy, dense)
    assert 0 < lazy.nbytes < 5 * dense.nbytes
    assert "bool[3, 5, 6, 7]" in repr(lazy)
    empty = RunLengthMasks([], T, (H, W))
    assert empty.frame(0).shape == (0, H, W)
    assert np.asarray(empty).shape == (0, T, H, W)


@pytest.mark.parametrize("index", [3, (0, 5), (None, 0), (0, 0, 0, 0, 0), (0, 0, 9)])
def test_bad_indices(lazy, index):
    with pytest.raises(IndexError):
        lazy[index]


def test_it_is_small():
    masks = np.zeros((1, 40, 240, 320), bool)
    masks[:, :, 50:90, 60:200] = True
    lazy = RunLengthMasks.of_frames((masks[:, t] for t in range(40)), 1, (240, 320))
    assert lazy.nbytes < masks.nbytes / 50


def test_damage_is_told_when_it_is_read():
    lazy = RunLengthMasks(
        [[{"size": [2, 2], "counts": "4"}, {"size": [2, 2], "counts": "9"}]], 2, (2, 2), "file {}".format
    )
    assert not lazy[0, 0].any()
    with pytest.raises(UserError, match="file 0: damaged"):
        lazy[0, 1]
