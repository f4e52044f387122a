"""Next-token cross-entropy with its gradients, where there is something to predict.

The head of a language model has more weights than ten of its layers, and most positions of a conversation (what the
user says, visual tokens, filler) have no label. So positions with one are put first and taken in pieces until none is
left. A piece gives its loss and the gradients that are wanted, and logits are never kept.

Axes: N positions, D width, V words of the vocabulary.
"""

import jax
import jax.numpy as jnp

from virst_jax.ops.rounding import rounded

BUDGET = 2**26  # logits that are held at a time: 256 MiB in float32
ROWS = 128  # a piece has a multiple of so many positions, where it has more

Gradients = tuple[jax.Array, jax.Array | None, jax.Array | None]  # the loss; gradients of kernel and hidden states


def piece_size(positions: int, vocabulary: int) -> int:
    """Positions that are taken at a time, of so many."""
    size = max(1, BUDGET // vocabulary)
    return max(1, min(positions, size // ROWS * ROWS or size))


def cross_entropy(
    kernel: jax.Array,
    hidden: jax.Array,
    target: jax.Array,
    weight: jax.Array,
    wanted: tuple[bool, bool],
    *,
    rounds: bool = False,
) -> Gradients:
    """The weighted sum of cross-entropies, and its gradients; not to be differentiated.

    Args:
      kernel: dtype[D, V], of the head.
      hidden: float[N, D], used in the kernel's dtype.
      target: int[N], the next tokens.
      weight: float32[N]; where it is 0 nothing is computed.
      wanted: whether the gradients of kernel and of hidden states are wanted.
      rounds: rounds logits to the kernel's dtype.

    Returns:
      The loss, float32[]; the gradients float32[D, V] and those of `hidden`, in its shape and dtype, or None.
    """
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    vocabulary = kernel.shape[1]
    size = piece_size(len(hidden), vocabulary)
    filler = -len(hidden) % size
    order = jnp.argsort(weight == 0, stable=True)  # those that count come first
    targets, weights = jnp.pad(target[order], (0, filler)), jnp.pad(weight[order], (0, filler))
    rows = jnp.pad(hidden[order].astype(kernel.dtype), ((0, filler), (0, 0)))
    rows = jnp.where(weights[:, None] == 0, 0, rows)  # those of the last piece may be no numbers

    def product(x: jax.Array, y: jax.Array, over: tuple[int, int]) -> jax.Array:
        return jax.lax.dot_general(x, y, (((over[0],), (over[1],)), ((), ())), preferred_element_type=wide)

    def add_piece(i: jax.Array, sums: Gradients) -> Gradients:
        total, of_kernel, of_rows = sums
        row, goal, share = (jax.lax.dynamic_slice_in_dim(x, i * size, size) for x in (rows, targets, weights))
        logits = product(row, kernel, (1, 0))
        if rounds:
            logits = rounded(logits, kernel.dtype).astype(wide)
        peak = logits.max(-1, keepdims=True)
        powers = jnp.exp(logits - peak)
        norm = powers.sum(-1, keepdims=True)
        hit = jnp.arange(vocabulary) == goal[:, None]
        total += (share * (jnp.log(norm[:, 0]) + peak[:, 0] - jnp.where(hit, logits, 0).sum(-1))).sum()
        of_logits = ((powers / norm - hit) * share[:, None]).astype(kernel.dtype)
        if of_kernel is not None:
            of_kernel += product(row, of_logits, (0, 0))
        if of_rows is not None:
            of_row = product(of_logits, kernel, (1, 1)).astype(of_rows.dtype)
            of_rows = jax.lax.dynamic_update_slice_in_dim(of_rows, of_row, i * size, 0)
        return total, of_kernel, of_rows

    start = (
        jnp.zeros((), wide),
        jnp.zeros(kernel.shape, wide) if wanted[0] else None,
        jnp.zeros(rows.shape, hidden.dtype) if wanted[1] else None,
    )
    pieces = -(-(weight != 0).sum() // size)
    total, of_kernel, of_rows = jax.lax.fori_loop(0, pieces, add_piece, start)
    return total, of_kernel, None if of_rows is None else of_rows[jnp.argsort(order)]
