"""Clicks and boxes that a person might give, simulated from true masks within a compiled step.

Axes: O objects, H, W sides of the masks.
Source: sam2/modeling/sam2_utils.py of facebookresearch/sam2 (sample_box_points, get_next_point).
"""

import jax
import jax.numpy as jnp

BOX_NOISE = 0.1  # a corner moves by up to this share of the box's side ...
MOST_BOX_NOISE = 20 / 1024  # ... and of the image's
MOST_DISTANCE_SIDE = 256  # distances to an edge are computed on every n-th pixel of larger masks


def next_click(
    key: jax.Array, pred: jax.Array, truth: jax.Array, central: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """A click that corrects a mask, for every object.

    Args:
      key: a random key.
      pred, truth: bool[O, H, W]. Where both are equal the click lies beside the object.
      central: bool[]: the click lies where it is farthest from the edge of what is missing or too much; otherwise
        anywhere in it. None: never.

    Returns:
      float32[O, 2], (x, y) in pixels, and labels int32[O]: 1 where something is missing, 0 where it is too much.
    """
    correct = (pred == truth).all((-2, -1), keepdims=True)
    wrong = (pred != truth) | (correct & ~truth)
    place = jnp.where(wrong, jax.random.uniform(key, wrong.shape), -1)
    if central is not None:
        # regions of different labels may touch
        depth = jnp.maximum(edge_distance(truth & ~pred), edge_distance(wrong & ~truth))
        place = jnp.where(central, jnp.where(wrong, depth, -1), place)
    index = place.reshape(place.shape[0], -1).argmax(-1)
    width = truth.shape[-1]
    labels = jnp.take_along_axis(truth.reshape(truth.shape[0], -1), index[:, None], 1)[:, 0]
    return jnp.stack([index % width, index // width], -1).astype(jnp.float32), labels.astype(jnp.int32)


def edge_distance(region: jax.Array) -> jax.Array:
    """Distance of every pixel of regions bool[O, H, W] to the nearest one outside, float32[O, H, W]; 0 outside.

    Beyond the frame's edge everything is outside. In regions larger than MOST_DISTANCE_SIDE only every n-th pixel has
    a distance, in steps of n pixels.
    """
    step = -(-max(region.shape[-2:]) // MOST_DISTANCE_SIDE)
    coarse = region[:, ::step, ::step]
    height, width = coarse.shape[-2:]
    x = jnp.arange(width)
    before = jax.lax.cummax(jnp.where(coarse, -1, x), axis=2)
    behind = jax.lax.cummin(jnp.where(coarse, width, x), axis=2, reverse=True)
    across = jnp.square(jnp.minimum(x - before, behind - x).astype(jnp.float32))  # to the nearest one of the row
    across = jnp.pad(across, ((0, 0), (1, 1), (0, 0)))
    rows = jnp.arange(-1, height + 1)

    def of_row(y: jax.Array) -> jax.Array:
        return (jnp.square(rows - y)[:, None] + across).min(1)

    distance = jnp.sqrt(jax.lax.map(of_row, jnp.arange(height)).swapaxes(0, 1))
    return jnp.zeros(region.shape).at[:, ::step, ::step].set(distance)


def noisy_box(key: jax.Array, truth: jax.Array) -> jax.Array:
    """The box around masks bool[O, H, W] with corners that are a little off: float32[O, 2, 2], (x, y) in pixels.

    That of an empty mask is a point at the origin.
    """
    corners, sides = [], []
    for axis, length in ((-2, truth.shape[-1]), (-1, truth.shape[-2])):  # x, then y
        there, place = truth.any(axis), jnp.arange(length)
        corners.append((jnp.where(there, place, length).min(-1), jnp.where(there, place, -1).max(-1)))
        sides.append(length)
    low, high = (jnp.stack(ends, -1).astype(jnp.float32) for ends in zip(*corners))
    box = jnp.where(truth.any((-2, -1))[:, None, None], jnp.stack([low, high], 1), 0)
    limit = jnp.asarray(sides, jnp.float32)
    size = box[:, 1] - box[:, 0]
    most = jnp.minimum(size * BOX_NOISE, limit * MOST_BOX_NOISE)
    return jnp.clip(box + jax.random.uniform(key, box.shape, minval=-1, maxval=1) * most[:, None], 0, limit - 1)
