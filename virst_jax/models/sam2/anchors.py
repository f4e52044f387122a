"""Which anchors a frame attends to.

Axes: A anchor slots, M attended anchors.
Source: model/sam2/modeling/sam2_utils.py, select_closest_cond_frames.
"""

import jax
import jax.numpy as jnp


def select_anchors(
    frame: jax.Array, anchor_frames: jax.Array, available: jax.Array, limit: int
) -> tuple[jax.Array, jax.Array]:
    """Chooses up to `limit` anchors for a frame.

    First the nearest before it, then the nearest at or after it, then the others by distance; of two at the same
    distance the one in the earlier slot.

    Args:
      frame: int[], the frame's number.
      anchor_frames: int[A], the anchors' frames.
      available: bool[A], which slots hold an anchor.
      limit: how many to choose; -1: all.

    Returns:
      Slots int[M] in order of choice and which of them are chosen, bool[M], with M = min(limit, A).
    """
    count = anchor_frames.shape[0]
    limit = count if limit == -1 else min(limit, count)
    far = jnp.iinfo(jnp.int32).max
    offset = anchor_frames - frame
    before = jnp.where(available & (offset < 0), -offset, far)
    after = jnp.where(available & (offset >= 0), offset, far)
    slots = jnp.arange(count)
    rank = jnp.where((slots == before.argmin()) & (before < far), 0, 2 + jnp.abs(offset))
    rank = jnp.where((slots == after.argmin()) & (after < far), 1, rank)
    order = jnp.argsort(jnp.where(available, rank, far), stable=True)[:limit]
    return order, available[order]
