"""J, F, A and R against the release's, and F on its crop against the whole frame."""

import json

import numpy as np
import pytest
from scipy import ndimage

from helpers.evaluation_cases import sequence_scores, whole_frame_f
from helpers.places import PARITY
from virst_jax.errors import UserError
from virst_jax.evaluation import metrics

ROWS = json.loads((PARITY / "metrics.json").read_text())["rows"]


def unpack(row, key):
    size = row["h"] * row["w"]
    packed = [np.frombuffer(bytes.fromhex(text), np.uint8) for text in row[key]]
    return np.stack([np.unpackbits(bits)[:size].reshape(row["h"], row["w"]) for bits in packed])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['h']}x{row['w']}")
def test_scores_are_those_of_the_release(row):
    pred, gt, foreground = (unpack(row, key) for key in ("pred", "gt", "fg"))
    np.testing.assert_allclose(metrics.region_similarity(pred, gt), row["J"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(metrics.boundary_f(pred, gt), row["F"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(metrics.accuracy(pred, gt), row["A"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(metrics.robustness(pred, gt, foreground), row["R"], rtol=0, atol=1e-9)

    scores = sequence_scores(pred, gt, foreground)
    assert scores == pytest.approx(
        {k: np.mean(row[k]) for k in "JFAR"} | {"JF": (np.mean(row["J"]) + np.mean(row["F"])) / 2}, abs=1e-9
    )


def ellipse(shape, centre, radii):
    y, x = np.mgrid[: shape[0], : shape[1]]
    return ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 < 1


SHAPE = (180, 320)  # a tolerance of 3 pixels
DISK = ellipse(SHAPE, (60, 90), (30, 40))
PAIRS = {
    "near": (DISK, ellipse(SHAPE, (62, 93), (31, 38))),
    "far": (DISK, ellipse(SHAPE, (140, 250), (20, 20))),
    "at the origin": (ellipse(SHAPE, (0, 0), (50, 60)), ellipse(SHAPE, (2, 2), (50, 60))),
    "at the far corner": (ellipse(SHAPE, (179, 319), (50, 60)), ellipse(SHAPE, (176, 316), (50, 60))),
    "at the lower edge": (ellipse(SHAPE, (179, 150), (40, 70)), ellipse(SHAPE, (177, 152), (40, 70))),
    "one pixel": (DISK, np.eye(*SHAPE, dtype=bool) & ellipse(SHAPE, (60, 60), (1, 1))),
    "corner pixels": (np.pad(np.zeros((179, 319), bool), ((1, 0), (1, 0)), constant_values=True), DISK),
    "whole frame": (np.ones(SHAPE, bool), DISK),
    "both whole": (np.ones(SHAPE, bool), np.ones(SHAPE, bool)),
    "empty prediction": (np.zeros(SHAPE, bool), DISK),
    "both empty": (np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)),
    "speckled": (DISK ^ (np.random.default_rng(0).random(SHAPE) > 0.97), DISK),
    "noise": (np.random.default_rng(1).random(SHAPE) > 0.5, np.random.default_rng(2).random(SHAPE) > 0.99),
}


@pytest.mark.parametrize("name", PAIRS)
def test_crop_gives_the_f_of_the_whole_frame(name):
    pred, gt = PAIRS[name]
    assert metrics.boundary_f(pred, gt) == pytest.approx(whole_frame_f(pred, gt), abs=1e-12)
    assert metrics.boundary_f(gt, pred) == pytest.approx(whole_frame_f(gt, pred), abs=1e-12)


def test_crop_gives_the_f_of_the_whole_frame_on_random_masks():
    rng = np.random.default_rng(3)
    scores = []
    for _ in range(60):
        shape = tuple(rng.integers(3, 160, 2))
        smooth = ndimage.gaussian_filter(rng.standard_normal((2, *shape)), (0, 5, 5))
        pred, gt = smooth > rng.normal(0, 0.08, (2, 1, 1))
        scores.append(whole_frame_f(pred, gt))
        assert metrics.boundary_f(pred, gt) == pytest.approx(scores[-1], abs=1e-12)
    assert np.std(scores) > 0.05


def test_tolerance_includes_its_own_distance():
    """Two lines, 3 pixels apart where the tolerance is 3, then 4 pixels apart."""
    line = np.zeros((3, *SHAPE), bool)
    for i, row in enumerate((50, 53, 54)):
        line[i, row:] = True
    assert metrics.boundary_f(line[0], line[1]) == 1
    assert metrics.boundary_f(line[0], line[2]) == 0
    assert metrics.boundary_f(line[0], line[2], tolerance=4) == 1


def test_known_values():
    gt = np.zeros((10, 10), bool)
    gt[:, :4] = True
    pred = np.zeros((10, 10), np.uint8)
    pred[:, 2:6] = 255
    assert metrics.region_similarity(pred, gt) == pytest.approx(1 / 3)
    assert metrics.accuracy(pred, gt) == pytest.approx(0.6)
    assert metrics.robustness(pred, gt, gt) == pytest.approx(0.5, abs=1e-6)
    assert metrics.robustness(pred, gt, np.zeros_like(gt)) == 0
    assert metrics.region_similarity(np.zeros_like(gt), np.zeros_like(gt)) == 1


def test_leading_axes_are_kept():
    rng = np.random.default_rng(0)
    pred, gt = rng.random((2, 2, 3, 20, 30)) > 0.7
    for score in (metrics.region_similarity, metrics.boundary_f, metrics.accuracy):
        every = score(pred, gt)
        assert every.shape == (2, 3)
        assert every.dtype == np.float64
        assert every[1, 2] == score(pred[1, 2], gt[1, 2])
    assert metrics.robustness(pred, gt, gt).shape == (2, 3)


def test_bad_masks_are_refused():
    with pytest.raises(UserError, match=r"'pred' is \[4, 4\], 'gt' is \[4, 5\]"):
        metrics.region_similarity(np.zeros((4, 4)), np.zeros((4, 5)))
    with pytest.raises(UserError, match="'foreground'"):
        metrics.robustness(np.zeros((4, 4)), np.zeros((4, 4)), np.zeros((2, 4, 4)))
    with pytest.raises(UserError, match=r"shape \[..., H, W\]"):
        metrics.boundary_f(np.zeros(4), np.zeros(4))
