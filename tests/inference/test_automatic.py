"""Masks of everything in an image."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from helpers.network import CFG, params
from helpers.segmenting import video
from virst_jax.data.transforms import resize_frames
from virst_jax.errors import UserError
from virst_jax.inference.automatic import AutomaticOptions, crop_boxes, find_masks, grid_points, suppress
from virst_jax.ops.resize import resize_maps
from virst_jax.tracking import TrackerModel

HEIGHT, WIDTH = 40, 56
# a network of random weights is sure of nothing
LENIENT = AutomaticOptions(points_per_side=3, batch=4, iou_threshold=0.3, stability_threshold=0.2, overlap_threshold=1)


@pytest.fixture(scope="module")
def tracker() -> TrackerModel:
    return TrackerModel(CFG.sam2, params()["sam2"])


def test_masks_of_a_grid(tracker: TrackerModel) -> None:
    """The same masks as from every click by itself at the image's size, filtered one by one."""
    (image,) = video(1, HEIGHT, WIDTH)
    found = find_masks(tracker.network, image, LENIENT)
    side = CFG.sam2.image_size
    (features,) = tracker.network.encode_batch(resize_frames(image[None], side, "bilinear"), 1)
    expected: dict[tuple[float, float, float], Any] = {}
    for x, y in grid_points(LENIENT, 0):
        clicks = np.full((LENIENT.batch, 2), (x * side, y * side), np.float32)
        logits, ious = (np.asarray(a)[0] for a in tracker.network.every_mask(features, clicks))
        for large, iou in zip(np.asarray(resize_maps(jnp.asarray(logits), (HEIGHT, WIDTH))), ious):
            stability = (large > 1).sum() / max(1, (large > -1).sum())
            if iou > LENIENT.iou_threshold and stability >= LENIENT.stability_threshold and (large > 0).any():
                expected[x * WIDTH, y * HEIGHT, round(float(iou), 4)] = large > 0
    assert 0 < len(expected) < 9 * 3
    assert {(*mask.point, round(mask.predicted_iou, 4)) for mask in found} == set(expected)
    for mask in found:
        same = expected[(*mask.point, round(mask.predicted_iou, 4))] == mask.mask
        assert same.mean() > 0.999  # sums in another order
        x0, y0, x1, y1 = mask.box
        assert mask.mask[y0:y1, x0:x1].sum() == mask.area > 0
        assert mask.mask[y0].any()
        assert mask.mask[:, x1 - 1].any()
    assert [mask.predicted_iou for mask in found] == sorted((mask.predicted_iou for mask in found), reverse=True)


def test_crops() -> None:
    options = AutomaticOptions(points_per_side=8, crop_layers=2, crop_points_divisor=2, crop_overlap=0.25)
    crops = list(crop_boxes((40, 100), options))
    assert crops[0] == ((0, 0, 100, 40), 0)
    assert [sum(layer == i for _, layer in crops) for i in range(3)] == [1, 4, 16]
    assert [len(grid_points(options, layer)) for layer in range(3)] == [64, 16, 4]
    for layer in (1, 2):
        seen = np.zeros((40, 100), int)
        for (x0, y0, x1, y1), of in crops:
            if of == layer:
                seen[y0:y1, x0:x1] += 1
        assert seen.min() == 1  # every pixel lies in one
        assert seen.max() > 1  # and they overlap
    assert grid_points(AutomaticOptions(points_per_side=2), 0).tolist() == [
        [0.25, 0.25],
        [0.75, 0.25],
        [0.25, 0.75],
        [0.75, 0.75],
    ]


def test_overlapping_boxes_give_way_to_better_ones() -> None:
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [0, 0, 5, 10], [50, 50, 60, 60]])
    scores = np.array([0.5, 0.9, 0.8, 0.1])
    # of 0 and 1, 90 of 110 pixels are shared; of 1 and 2, 40 of 110
    assert suppress(boxes, scores, 0.8) == [1, 2, 3]
    assert suppress(boxes, scores, 0.82) == [1, 2, 0, 3]
    assert suppress(boxes, scores, 0.3) == [1, 3]
    assert suppress(np.zeros((0, 4)), np.zeros(0), 0.5) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points_per_side": 0}, "points_per_side is 0"),
        ({"crop_layers": -1}, "crop_layers is -1"),
        ({"batch": 1.5}, "batch is 1.5"),
        ({"iou_threshold": 2}, "iou_threshold is 2"),
        ({"stability_offset": 0}, "stability_offset is 0"),
    ],
)
def test_options_out_of_range(tracker: TrackerModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tracker.find_masks(video(1)[0], AutomaticOptions(**options))


def test_an_image_and_no_video(tracker: TrackerModel) -> None:
    with pytest.raises(UserError, match="an image must be"):
        tracker.find_masks(video(3))
