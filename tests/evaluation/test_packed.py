"""Bits of masks, and F on them against the published algorithm on whole frames of arrays."""

import numpy as np
import pytest
from scipy import ndimage

from helpers.evaluation_cases import whole_frame_f
from virst_jax.errors import UserError
from virst_jax.evaluation import bitmask

WIDTHS = (1, 7, 63, 64, 65, 100, 128, 129, 200)


def smooth_masks(rng, shape, scale=4.0):
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), (0, scale, scale))
    return noise > rng.normal(0, 0.6 / scale, (shape[0], 1, 1))


@pytest.mark.parametrize("width", WIDTHS)
def test_packing_keeps_every_pixel(width):
    masks = np.random.default_rng(width).random((2, 3, 5, width)) > 0.6
    words = bitmask.pack(masks)
    assert words.shape == (2, 3, 5, -(-width // 64))
    assert words.dtype == np.uint64
    np.testing.assert_array_equal(bitmask.unpack(words, width), masks)
    np.testing.assert_array_equal(bitmask.count(words), masks.sum((-2, -1)))
    np.testing.assert_array_equal(bitmask.pack(masks.astype(np.uint8) * 255), words)


def test_bits_lie_where_they_are_documented():
    mask = np.zeros((1, 130), bool)
    mask[0, [0, 65, 129]] = True
    np.testing.assert_array_equal(bitmask.pack(mask), [[1, 2, 2]])


@pytest.mark.parametrize("radius", [0, 1, 1.5, 2, 3, 5, 8, 12, 18, 30, 70])
def test_dilation_is_that_by_a_disk(radius):
    rng = np.random.default_rng(int(10 * radius))
    for shape in ((3, 1), (40, 64), (37, 90), (90, 200)):
        masks = rng.random((2, *shape)) > 0.995
        masks[0, 0, 0] = masks[1, -1, -1] = True
        got = bitmask.unpack(bitmask.dilate(bitmask.pack(masks), radius), shape[1])
        within = [ndimage.distance_transform_edt(~mask) ** 2 < radius * radius + 1e-6 for mask in masks]
        np.testing.assert_array_equal(got, within)


@pytest.mark.parametrize("width", WIDTHS)
def test_f_is_that_of_the_whole_frame(width):
    rng = np.random.default_rng(width)
    seen = []
    for _ in range(25):
        height = int(rng.integers(1, 150))
        pred, gt = smooth_masks(rng, (2, height, width))
        expected = whole_frame_f(pred, gt)
        radius = bitmask.boundary_radius(height, width)
        for one, other in ((pred, gt), (gt, pred)):
            got = bitmask.boundary_f(bitmask.pack(one), bitmask.pack(other), width, radius)
            assert got == pytest.approx(expected, abs=1e-12)
        # a transposed frame, as run-length codes are stored, has the same outlines
        turned = bitmask.boundary_f(bitmask.pack(pred.T), bitmask.pack(gt.T), height, radius)
        assert turned == pytest.approx(expected, abs=1e-12)
        seen.append(expected)
    assert width == 1 or np.std(seen) > 0.02


@pytest.mark.parametrize("width", [64, 100])
def test_f_of_objects_in_corners_and_at_word_borders(width):
    """Small objects whose outline starts in the word before theirs, or ends with the frame."""
    rng = np.random.default_rng(0)
    frame = np.zeros((50, width), bool)
    spots = [(0, 0), (0, width - 6), (44, 0), (44, width - 6), (20, 62), (20, 63 - 6), (20, min(64, width - 6))]
    radius = bitmask.boundary_radius(50, width)
    for y, x in spots:
        pred, gt = frame.copy(), frame.copy()
        gt[y : y + 6, x : x + 6] = True
        pred[y : y + 6, x : x + 6] = rng.random(gt[y : y + 6, x : x + 6].shape) > 0.3
        got = bitmask.boundary_f(bitmask.pack(pred), bitmask.pack(gt), width, radius)
        assert got == pytest.approx(whole_frame_f(pred, gt), abs=1e-12)


def test_counts_of_frames():
    rng = np.random.default_rng(1)
    pred, gt = smooth_masks(rng, (6, 60, 80)).reshape(2, 3, 60, 80)
    counts = bitmask.count_frames(bitmask.pack(pred), bitmask.pack(gt), 80, bitmask.boundary_radius(60, 80))
    np.testing.assert_array_equal(counts.intersection, (pred & gt).sum((1, 2)))
    np.testing.assert_array_equal(counts.union, (pred | gt).sum((1, 2)))
    np.testing.assert_array_equal(counts.pred, pred.sum((1, 2)))
    np.testing.assert_allclose(
        counts.boundary, [whole_frame_f(p, g) for p, g in zip(pred, gt, strict=True)], rtol=0, atol=1e-12
    )
    with pytest.raises(UserError, match="differ in shape"):
        bitmask.count_frames(bitmask.pack(pred), bitmask.pack(gt[:2]), 80, 1)
