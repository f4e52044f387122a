"""Token merging by bipartite soft matching (ToMe), as the video projector uses it.

Axes: B batch, N tokens, D width, M = metric width.
"""

import jax
import jax.numpy as jnp


def merge_schedule(count: int, target: int) -> list[int]:
    """How many tokens each round removes: at most half, until `target` remain."""
    if not 0 < target < count:
        raise ValueError(f"cannot merge {count} tokens into {target}")
    rounds = []
    while count > target:
        rounds.append(min(count - target, count // 2))
        count -= rounds[-1]
    return rounds


def merge_tokens(x: jax.Array, target: int, num_heads: int) -> jax.Array:
    """Merges dtype[B, N, D] into dtype[B, target, D] by size-weighted averages of similar tokens.

    Similarity is the cosine of the mean over `num_heads` groups of channels. In every round tokens at even
    places look for their best match among those at odd places; the most similar ones merge. Remaining even
    tokens come first (by falling similarity), then the odd ones.
    Source: model/videochat/mm_projector_builder.py, ToMe16_mlp_hd64.merge_tokens.
    """
    size = jnp.ones((*x.shape[:2], 1), x.dtype)
    for removed in merge_schedule(x.shape[1], target):
        x, size = jax.vmap(_merge_round, (0, 0, None, None))(x, size, removed, num_heads)
    return x


def _merge_round(x: jax.Array, size: jax.Array, removed: int, num_heads: int) -> tuple[jax.Array, jax.Array]:
    metric = jax.lax.stop_gradient(x.reshape(x.shape[0], num_heads, -1).mean(1))
    metric = metric / jnp.linalg.norm(metric, axis=-1, keepdims=True)
    scores = metric[0::2] @ metric[1::2].T
    match = scores.argmax(-1)
    order = jnp.argsort(-scores.max(-1), stable=True)
    merged, kept = order[:removed], order[removed:]

    def merge(values: jax.Array) -> jax.Array:
        even, odd = values[0::2], values[1::2]
        return jnp.concatenate([even[kept], odd.at[match[merged]].add(even[merged])])

    total = merge(size)
    return merge(x * size) / total, total
