"""Scaled dot-product attention, with a choice of implementations.

Axes: B batch, S queries, K keys, H query heads, G key and value heads, R = H // G query heads that share one of
them, D width of queries and keys, E width of values.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from virst_jax.errors import UserError
from virst_jax.ops import splash
from virst_jax.ops.dropout import drop
from virst_jax.ops.platform import allows_kernels, target_platform
from virst_jax.ops.rounding import rounded
from virst_jax.ops.splash import LANES

IMPLEMENTATIONS = ("auto", "plain", "eager", "chunked", "cudnn", "splash")

PLAIN_LIMIT = 2**22  # `auto` builds the whole matrix up to so many weights a batch row
TPU_PLAIN_LIMIT = 2**23  # of queries at positions of their own on TPUs: the matrix fits the chip's fast memory
CHUNK_BUDGET = 2**24  # numbers that a chunk keeps for its backward pass, a batch row: 64 MiB in float32
BLOCK_BUDGET = 2**21  # weights of a chunk and a block of keys, a batch row: 8 MiB, which a processor's cache holds
KEY_BLOCK = 512  # most keys of a block
# A GPU starts each operation of a block anew, so blocks are few: 32 MiB in float32, about its second-level cache.
GPU_BLOCK_BUDGET = 2**23
GPU_KEY_BLOCK = 8192
BIAS_LIMIT = 2**26  # `auto` hands cuDNN masks (of two bytes an element) up to this size
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite: a row of these is uniform, not NaN


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    key_mask: jax.Array | np.ndarray | None = None,
    causal: bool = False,
    q_positions: jax.Array | None = None,
    scale: float | None = None,
    impl: str = "auto",
    chunk: int = 1024,
    dropout: float = 0.0,
    rng: jax.Array | None = None,
) -> jax.Array:
    """softmax(scale * q k^T) v, a head at a time; a row that sees no key gives zeros.

    Args:
      q: dtype[B, S, H, D]; H is a multiple of G, and query head h reads key head h // (H // G).
      k: dtype[B, K, G, D].
      v: dtype[B, K, G, E].
      key_mask: bool[B, K], the keys that may be seen; None: all. As a NumPy array it is known when tracing.
      causal: a query sees the keys whose index is at most its position.
      q_positions: int[B, S], used when `causal`; None: 0..S-1.
      scale: None: D ** -0.5.
      impl: one of IMPLEMENTATIONS. "plain" builds the S x K matrix; "eager" does, too, and rounds logits and weights
        to dtype, as PyTorch's attention without a kernel; "chunked" takes queries in chunks and computes
        them again in the backward pass; "cudnn" (NVIDIA GPUs) and "splash" (TPUs; elsewhere interpreted) are
        fused kernels; "auto" takes what fits backend, dtype and sizes.
      chunk: most rows of a chunk, which are queries of the R heads that share a key head; fewer when there are many
        heads or keys.
      dropout: share of the weights that are set to zero in training, the others grow to make up for them; the fused
        kernels cannot do that, so "auto" passes over them.
      rng: a jax.random key for dropout; None: no weight is dropped.

    Returns:
      dtype[B, S, H, E] of q's dtype. The softmax is computed in float32.

    Raises:
      ValueError: unknown `impl`, or shapes that do not fit.
      UserError: a kernel asked for by name cannot run this.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"unknown attention implementation {impl!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
    (batch, num_queries, heads, width), (num_keys, groups) = q.shape, k.shape[1:3]
    if k.shape != (batch, num_keys, groups, width) or v.shape[:3] != k.shape[:3] or heads % groups:
        raise ValueError(f"attention: q {q.shape}, k {k.shape} and v {v.shape} do not fit")
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    scale = width**-0.5 if scale is None else scale
    all_see = isinstance(key_mask, np.ndarray) and not causal and bool(key_mask.any(1).all())
    key_mask = None if key_mask is None else jnp.asarray(key_mask)
    if not causal:
        q_positions = None
    elif num_queries == 1:  # a decoding step: its position is but a limit on the keys
        last = jnp.zeros((batch, 1), int) if q_positions is None else q_positions
        before = jnp.arange(num_keys) <= last
        key_mask, q_positions, causal = before if key_mask is None else key_mask & before, None, False
    drop = dropout if rng is not None else 0.0
    if impl == "auto":
        impl = _without_kernels(q, k) if drop else _choose(q, k, v, key_mask, causal, q_positions)
    if drop and impl not in ("plain", "chunked"):
        raise UserError(f"attention {impl!r} cannot drop weights in training; set compute.attention to 'auto'")
    if impl == "cudnn":
        return _cudnn(q, k, v, key_mask, causal, q_positions, scale)
    if impl == "splash":
        return _splash(q, k, v, key_mask, causal, q_positions, scale, all_see)
    if causal and q_positions is None:
        q_positions = jnp.arange(num_queries)[None]
    if impl == "eager":
        return _eager(q, k, v, key_mask, q_positions, scale)
    if impl == "plain":
        return _plain(q, k, v, key_mask, q_positions, scale, drop, rng)
    return _chunked(q, k, v, key_mask, q_positions, scale, chunk, drop, rng)


def _without_kernels(q: jax.Array, k: jax.Array) -> str:
    return "plain" if q.shape[1] * k.shape[1] * q.shape[2] <= PLAIN_LIMIT else "chunked"


def _choose(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_mask: jax.Array | None,
    causal: bool,
    q_positions: jax.Array | None,
) -> str:
    size = q.shape[1] * k.shape[1]
    if not allows_kernels() or _without_kernels(q, k) == "plain":
        return _without_kernels(q, k)
    platform = target_platform()
    if platform == "tpu" and q_positions is None and splash.can_be_sharded():
        return "splash"
    needs_bias = causal and (key_mask is not None or q_positions is not None)
    if platform == "gpu" and not _cudnn_obstacle(q, v) and (not needs_bias or size <= BIAS_LIMIT):
        return "cudnn"
    if platform == "tpu" and q_positions is not None and size * q.shape[2] <= TPU_PLAIN_LIMIT:
        return "plain"
    return "chunked"


def _visible(key_mask: jax.Array | None, q_positions: jax.Array | None, index: jax.Array) -> jax.Array | None:
    """bool[B or 1, 1, S or 1, K] of the keys int[K]; None: everything."""
    visible = None if key_mask is None else key_mask[:, None]
    if q_positions is not None:
        before = index <= q_positions[..., None]
        visible = before if visible is None else visible & before
    return None if visible is None else visible[:, None]


def _heads_first(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[B, G, R * S, D], [B, G, K, D] and [B, G, K, E]: four axes, which XLA's CPU compiler makes one fused loop of."""
    batch, num_queries, heads, width = q.shape
    rows = q.reshape(batch, num_queries, k.shape[2], -1, width).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, k.shape[2], heads // k.shape[2] * num_queries, width)
    return rows, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)


def _heads_last(out: jax.Array, num_queries: int) -> jax.Array:
    """[B, G, R * S, E] -> [B, S, H, E]"""
    batch, groups, rows, width = out.shape
    out = out.reshape(batch, groups, rows // num_queries, num_queries, width).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, num_queries, -1, width)


def _logits(rows: jax.Array, k: jax.Array, scale: float) -> jax.Array:
    return scale * jnp.einsum("bgsd,bgkd->bgsk", rows, k, preferred_element_type=_accumulator(rows))


def _weighted(weights: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.einsum("bgsk,bgke->bgse", weights.astype(v.dtype), v, preferred_element_type=_accumulator(v))


def _accumulator(x: jax.Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


def _plain(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_mask: jax.Array | None,
    q_positions: jax.Array | None,
    scale: float,
    dropout: float = 0.0,
    rng: jax.Array | None = None,
) -> jax.Array:
    num_queries, num_keys, dtype = q.shape[1], k.shape[1], q.dtype
    rows, k, v = _heads_first(q, k, v)
    positions = None if q_positions is None else jnp.tile(q_positions, (1, rows.shape[2] // num_queries))
    logits, visible = _logits(rows, k, scale), _visible(key_mask, positions, jnp.arange(num_keys))
    if visible is not None:
        logits = jnp.where(visible, logits, MASKED)
    # divided by their sum at the end: the other way round the loop is not fused
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    if visible is not None:
        weights = jnp.where(visible, weights, 0)
    with_ones = target_platform() == "tpu" and dtype == jnp.bfloat16 and num_keys >= LANES and v.shape[3] % LANES
    if with_ones and not dropout:  # a column that the product pads anyway, in place of a pass over the weights
        ones = jnp.ones((*v.shape[:3], 1), v.dtype)
        out, total = jnp.split(_weighted(weights, jnp.concatenate([v, ones], axis=-1)), [v.shape[3]], axis=-1)
    else:
        total = weights.sum(-1, keepdims=True)
        out = _weighted(drop(weights, dropout, rng) if dropout and rng is not None else weights, v)
    if visible is not None:
        total = jnp.where(total == 0, 1, total)  # zeros where nothing is seen
    return _heads_last((out / total).astype(dtype), num_queries)


def _eager(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_mask: jax.Array | None,
    q_positions: jax.Array | None,
    scale: float,
) -> jax.Array:
    num_queries, num_keys, dtype = q.shape[1], k.shape[1], q.dtype
    rows, k, v = _heads_first(q, k, v)
    positions = None if q_positions is None else jnp.tile(q_positions, (1, rows.shape[2] // num_queries))
    visible, wide = _visible(key_mask, positions, jnp.arange(num_keys)), _accumulator(q)
    products = rounded(_logits(rows, k, 1.0), dtype).astype(wide)
    logits = rounded(products * scale, dtype).astype(wide)
    if visible is not None:
        logits = jnp.where(visible, logits, MASKED)
    weights = rounded(jax.nn.softmax(logits, axis=-1), dtype)
    if visible is not None:
        weights = jnp.where(visible.any(-1, keepdims=True), weights, 0)  # zeros where nothing is seen
    return _heads_last(rounded(_weighted(weights, v), dtype), num_queries)


def _chunked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_mask: jax.Array | None,
    q_positions: jax.Array | None,
    scale: float,
    chunk: int,
    dropout: float = 0.0,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Chunks of queries meet blocks of keys; maximum and sum of the softmax are carried from block to block."""
    (batch, num_queries, _, _), num_keys, dtype = q.shape, k.shape[1], q.dtype
    rows, k, v = _heads_first(q, k, v)
    groups, num_rows = rows.shape[1:3]
    on_gpu = target_platform() == "gpu"
    most_keys, budget = (GPU_KEY_BLOCK, GPU_BLOCK_BUDGET) if on_gpu else (KEY_BLOCK, BLOCK_BUDGET)
    blocks, block = _even(num_keys, most_keys, 128)
    if blocks * block > num_keys and key_mask is None:
        key_mask = jnp.ones((batch, num_keys), bool)
    # what the backward pass keeps of a chunk: the sums after every block
    kept = CHUNK_BUDGET // (blocks * groups * v.shape[3])
    chunks, chunk = _even(num_rows, max(1, min(chunk, kept, budget // (block * groups))))

    def split(x: jax.Array, axis: int, count: int, size: int) -> jax.Array:
        """[..., N, ...] -> [count, ..., size, ...]"""
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, count * size - x.shape[axis])
        x = jnp.pad(x, padding)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)

    across = (
        split(k, 2, blocks, block),
        split(v, 2, blocks, block),
        None if key_mask is None else split(key_mask, 1, blocks, block),
        jnp.arange(blocks * block).reshape(blocks, block),
    )

    def attend(part: tuple[jax.Array, jax.Array | None, jax.Array | None]) -> jax.Array:
        rows, positions, rng = part

        def step(
            carry: tuple[jax.Array, jax.Array, jax.Array],
            part: tuple[jax.Array, jax.Array, jax.Array | None, jax.Array],
        ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
            (highest, total, out), (k, v, key_mask, index) = carry, part
            visible = _visible(key_mask, positions, index)

            def meet() -> tuple[jax.Array, jax.Array, jax.Array]:
                logits = _logits(rows, k, scale)
                if visible is not None:
                    logits = jnp.where(visible, logits, MASKED)
                higher = jax.lax.stop_gradient(jnp.maximum(highest, logits.max(-1, keepdims=True)))
                weights, shrink = jnp.exp(logits - higher), jnp.exp(highest - higher)
                sums = total * shrink + weights.sum(-1, keepdims=True)
                if dropout and rng is not None:
                    weights = drop(weights, dropout, jax.random.fold_in(rng, index[0]))
                return higher, sums, out * shrink + _weighted(weights, v)

            # memories that are not there yet and what lies ahead of all queries cost nothing; a GPU would be waited
            # for at every branch
            return meet() if visible is None or on_gpu else jax.lax.cond(visible.any(), meet, lambda: carry), None

        lowest = jnp.full((*rows.shape[:3], 1), MASKED, _accumulator(rows))
        start = lowest, jnp.zeros_like(lowest), jnp.zeros((*rows.shape[:3], v.shape[3]), lowest.dtype)
        (highest, total, out), _ = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), start, across)
        seen = highest > MASKED
        return jnp.where(seen, out / jnp.where(seen, total, 1), 0).astype(dtype)

    positions = None
    if q_positions is not None:
        positions = split(jnp.tile(q_positions, (1, num_rows // num_queries)), 1, chunks, chunk)
    keys = jax.random.split(rng, chunks) if dropout and rng is not None else None
    parts = split(rows, 2, chunks, chunk), positions, keys
    out = jax.lax.map(jax.checkpoint(attend, prevent_cse=False), parts)  # [chunks, B, G, chunk, E]
    out = jnp.moveaxis(out, 0, 2).reshape(batch, groups, chunks * chunk, -1)
    return _heads_last(out[:, :, :num_rows], num_queries)


def _even(length: int, most: int, multiple: int = 1) -> tuple[int, int]:
    """How many parts of at most `most`, and how long, so that they are even; the length a multiple, if it is long."""
    parts = -(-length // most)
    size = -(-length // parts)
    return parts, min(most, -(-size // multiple) * multiple) if size > multiple else size


def _zero_blind_rows(
    out: jax.Array, key_mask: jax.Array | None, causal: bool, q_positions: jax.Array | None
) -> jax.Array:
    """Zeros where a query sees no key; the kernels leave a mean of the values there."""
    positions = jnp.arange(out.shape[1])[None] if q_positions is None else q_positions
    if key_mask is None:
        if not causal or q_positions is None:
            return out
        seeing = positions >= 0
    else:
        seeing = key_mask.any(1)[:, None]
        if causal:
            seeing = seeing & (jnp.argmax(key_mask, axis=1)[:, None] <= positions)
    return jnp.where(seeing[..., None, None], out, 0)


# cuDNN


def _cudnn_obstacle(q: jax.Array, v: jax.Array) -> str:
    """Why cuDNN cannot run this, or an empty string."""
    width = q.shape[-1]
    if target_platform() != "gpu":
        return f"the backend is {target_platform()}, not an NVIDIA GPU"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the dtype is {q.dtype}, not bfloat16 or float16"
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    if not capability[:1].isdigit():  # AMD
        return "the device reports no CUDA compute capability"
    major = int(capability.split(".")[0])
    limit = 256 if major >= 9 else 128
    if major < 8:
        return f"compute capability {capability} is below 8.0"
    if width % 8 or width > limit:
        return f"the head width {width} is not a multiple of 8 up to {limit}"
    if v.shape[-1] != width:
        return f"values are {v.shape[-1]} wide and keys {width}"
    return ""


def _cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_mask: jax.Array | None,
    causal: bool,
    q_positions: jax.Array | None,
    scale: float,
) -> jax.Array:
    if obstacle := _cudnn_obstacle(q, v):
        raise UserError(f"attention 'cudnn' cannot run here: {obstacle}; set compute.attention to 'auto'")
    num_queries, num_keys = q.shape[1], k.shape[1]
    options: dict[str, Any] = {}
    arrays = [q, k, v]
    if not causal and key_mask is not None:
        # visible keys to the front, where a length says the same as a mask, without an S x K bias
        order = jnp.argsort(~key_mask, axis=1, stable=True)[..., None, None]
        arrays = [q, *(jnp.take_along_axis(x, order, axis=1) for x in (k, v))]
        options["key_value_seq_lengths"] = jnp.maximum(1, key_mask.sum(1, dtype=jnp.int32))
    elif causal and key_mask is None and q_positions is None:
        options["is_causal"] = True
    elif causal:
        positions = jnp.arange(num_queries)[None] if q_positions is None else q_positions
        visible = cast(jax.Array, _visible(key_mask, positions, jnp.arange(num_keys)))[:, 0]
        # the backward pass with a bias wants even lengths
        odd_q, odd_k = num_queries % 2, num_keys % 2
        options["mask"] = jnp.pad(visible, ((0, 0), (0, odd_q), (0, odd_k)))[:, None]
        arrays = [jnp.pad(x, ((0, 0), (0, odd), (0, 0), (0, 0))) for x, odd in zip((q, k, v), (odd_q, odd_k, odd_k))]
    out = jax.nn.dot_product_attention(*arrays, scale=scale, implementation="cudnn", **options)
    return _zero_blind_rows(out[:, :num_queries], key_mask, causal, q_positions)


# TPU


def _splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_mask: jax.Array | None,
    causal: bool,
    q_positions: jax.Array | None,
    scale: float,
    all_see: bool = False,
) -> jax.Array:
    if q_positions is not None:
        raise UserError(
            "attention 'splash' cannot take several queries at positions of their own; set compute.attention to 'auto'"
        )
    out = splash.attend(q, k, v, key_mask, causal, scale)
    return out if all_see else _zero_blind_rows(out, key_mask, causal, None)
