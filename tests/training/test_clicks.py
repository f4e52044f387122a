"""Clicks and boxes that are simulated from true masks."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from virst_jax.training.clicks import edge_distance, next_click, noisy_box

SIDE = 48


def shapes() -> tuple[np.ndarray, np.ndarray]:
    """Masks bool[4, H, W] and true ones: something is missing, something is too much, both, and nothing is wrong."""
    y, x = np.mgrid[:SIDE, :SIDE]
    disk = (y - 20) ** 2 + (x - 30) ** 2 < 100
    left = disk & (x < 28)
    other = (y > 40) & (x < 12)
    return np.stack([left, disk | other, left | other, disk]), np.stack([disk, disk, disk, disk])


def test_distances_are_those_of_scipy() -> None:
    pred, truth = shapes()
    regions = np.concatenate([truth & ~pred, pred & ~truth, np.ones((1, SIDE, SIDE), bool)])
    expected = [ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1] for region in regions]
    np.testing.assert_allclose(edge_distance(jnp.asarray(regions)), expected, rtol=1e-6)


def test_every_other_pixel_of_large_regions_has_a_distance() -> None:
    """Steps of n pixels, so half of the true distance, within one step at either end."""
    region = np.zeros((1, 500, 500), bool)
    region[0, 100:300, 50:250] = True
    found = np.asarray(edge_distance(jnp.asarray(region)))
    expected = ndimage.distance_transform_edt(region[0])
    assert (found[0, 1::2] == 0).all()
    assert (found[0, :, 1::2] == 0).all()
    assert np.abs(2 * found[0, ::2, ::2] - expected[::2, ::2]).max() <= 2


def test_clicks_lie_in_what_is_wrong() -> None:
    pred, truth = shapes()
    click = jax.jit(next_click)
    places = set()
    for seed in range(20):
        points, labels = click(jax.random.key(seed), pred, truth)
        x, y = np.asarray(points).astype(int).T
        rows = np.arange(len(truth))
        assert (truth[rows, y, x] == np.asarray(labels)).all()
        assert (pred[rows, y, x] != truth[rows, y, x])[:3].all()
        assert labels[0] == 1
        assert labels[1] == 0
        assert labels[3] == 0  # nothing is wrong: beside the object
        places.add((x[0], y[0]))
    assert len(places) > 10


def test_central_clicks_are_farthest_from_the_edge() -> None:
    pred, truth = shapes()
    points, labels = next_click(jax.random.key(0), pred, truth, jnp.array(True))
    x, y = np.asarray(points).astype(int).T
    for i, wrong in enumerate((truth & ~pred, pred & ~truth, truth & ~pred)[:2]):
        depth = ndimage.distance_transform_edt(np.pad(wrong[i], 1))[1:-1, 1:-1]
        assert depth[y[i], x[i]] == depth.max()
    assert labels[:2].tolist() == [1, 0]


def test_boxes_are_a_little_off() -> None:
    _, truth = shapes()
    truth = np.stack([truth[0], np.zeros((SIDE, SIDE), bool)])
    rows, columns = np.flatnonzero(truth[0].any(1)), np.flatnonzero(truth[0].any(0))
    exact = np.array([[columns[0], rows[0]], [columns[-1], rows[-1]]])
    most = np.minimum((exact[1] - exact[0]) * 0.1, SIDE * 20 / 1024)
    boxes = [np.asarray(noisy_box(jax.random.key(seed), jnp.asarray(truth))) for seed in range(20)]
    assert all((np.abs(box[0] - exact) <= most + 1e-5).all() for box in boxes)
    assert np.std([box[0] for box in boxes], 0).min() > 0.1
    assert all((box[1] == 0).all() for box in boxes)
