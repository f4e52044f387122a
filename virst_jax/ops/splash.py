"""The attention kernel of TPUs: JAX's splash attention, padded to its blocks, on every device's share of a mesh.

Axes: B batch, N positions of queries or keys, H heads, D width.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jax.sharding import AxisType, PartitionSpec

from virst_jax.ops.platform import target_platform

LANES = 128  # of a TPU; its kernel takes as many positions at once, or a multiple
RESIDUALS = "attention residuals"  # what the kernel's gradient needs beside its inputs
KEPT = jax.checkpoint_policies.save_only_these_names(RESIDUALS)  # for what is computed again but for its attention
GRADIENT_KEYS = 1280  # keys whose gradients the kernel accumulates at a time, as far as its fast memory holds them

_mesh_axes: contextvars.ContextVar[tuple[tuple[str, ...], tuple[str, ...]] | None] = contextvars.ContextVar(
    "mesh_axes", default=None
)


@contextlib.contextmanager
def sharded_over(batch: tuple[str, ...] = (), heads: tuple[str, ...] = ()) -> Iterator[None]:
    """Names the mesh axes that split batch and heads in what is traced inside.

    The TPU kernel needs them: the compiler cannot partition it by itself. Without them, on a mesh of several
    devices, "auto" does not choose it, and a "splash" asked for by name runs on all rows on every device.
    """
    token = _mesh_axes.set((batch, heads))
    try:
        yield
    finally:
        _mesh_axes.reset(token)


def block_length(length: int) -> int:
    """Block of the kernel: little padding, and long, because every block costs about as much as 64 more positions."""
    return min(range(LANES, 5 * LANES + 1, LANES), key=lambda block: -(-length // block) * (block + 64))


def gradient_block_length(length: int, block: int) -> int:
    """Keys of a block of the gradient's kernel, in whole blocks that are computed at a time.

    The kernel writes the gradient of all queries once for each of these blocks, and they are added afterwards.
    """
    count = length // block
    return block * max(n for n in range(1, count + 1) if count % n == 0 and n * block <= max(block, GRADIENT_KEYS))


def blocks_seen(seen: jax.Array, block: int) -> jax.Array:
    """Which blocks of keys a kernel has to run: bool[K // block] for keys that rows see, [B, K].

    The first one is run if no other is, since a sum over no keys divides by zero.
    """
    found = (seen != 0).reshape(seen.shape[0], -1, block).any((0, 2))
    return found.at[0].set(found[0] | ~found.any())


def _pass_over_unseen(kernel: kernels.SplashAttentionKernel, segments: jax.Array, block: int) -> None:
    """Makes the kernel skip blocks of keys that no row sees: neither products nor copies are spent on them.

    kernel: over a full mask. segments: int[B, K], 0 for keys that are not there.
    """
    run = blocks_seen(segments, block)
    # a skipped block names the next one that is run, which is then copied meanwhile
    blocks = jnp.arange(run.size)
    following = jax.lax.cummin(jnp.where(run, blocks, run.size), reverse=True)
    following = jnp.where(following == run.size, run.argmax(), following)
    kernel.fwd_mask_info = _blocks(kernel.fwd_mask_info, run, following)
    # the gradient's kernel goes through the queries for every block of keys, several of those above
    assert kernel.dkv_mask_info is not None
    queries = jnp.asarray(kernel.dkv_mask_info.data_next)
    run = run.reshape(queries.shape[-1], -1).any(1)
    kernel.dkv_mask_info = _blocks(kernel.dkv_mask_info, run, jnp.where(run, queries, 0))


def _blocks(info: MaskInfo, run: jax.Array, copied: jax.Array) -> MaskInfo:
    """Those of `info` that are run, bool[K // block], and which one is copied for each."""
    mask = jnp.asarray(info.block_mask)
    return info._replace(
        data_next=jnp.broadcast_to(copied, mask.shape).astype(jnp.int32),
        block_mask=jnp.where(run, mask, 0).astype(jnp.int32),
    )


def _auto_mesh() -> bool:
    """Whether the compiler would have to partition what is traced here."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(size > 1 and kind != AxisType.Manual for size, kind in zip(mesh.axis_sizes, mesh.axis_types))


def mesh_axes(kind: str, length: int) -> tuple[str, ...]:
    """The mesh axes that split "batch" or "heads", if they divide `length`; only those that the compiler still has."""
    names = dict(zip(("batch", "heads"), _mesh_axes.get() or ((), ())))[kind]
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types)
    sizes = {name: size for name, size, of in kinds if of != AxisType.Manual}
    axes = tuple(name for name in names if name in sizes)
    return axes if length % math.prod(sizes[name] for name in axes) == 0 else ()


def can_be_sharded() -> bool:
    """Whether the kernel runs on a share of the rows on each device, or there is one device only."""
    return _mesh_axes.get() is not None or not _auto_mesh()


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, key_mask: jax.Array | None, causal: bool, scale: float
) -> jax.Array:
    """As `attention.attention`; rows of queries that see no key mean nothing."""
    (_, num_queries, _, _), (num_keys, _, value_width) = q.shape, v.shape[1:]
    block_q, block_k = block_length(num_queries), block_length(num_keys)

    def to_kernel(x: jax.Array, block: int) -> jax.Array:
        """[B, N, H, D] -> [B, H, N', D'], padded to whole blocks and lanes."""
        padding = [(0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)]
        return jnp.pad(x, padding).transpose(0, 2, 1, 3)

    scaled = (scale * q.astype(jnp.float32)).astype(q.dtype)  # the kernel knows no scale
    q_, k_, v_ = to_kernel(scaled, block_q), to_kernel(k, block_k), to_kernel(v, block_k)
    padded_keys = k_.shape[2]
    segments = None
    # no query reaches the padding behind its own last key
    if key_mask is not None or (padded_keys > num_keys and not (causal and num_queries <= num_keys)):
        mask = jnp.ones((q.shape[0], num_keys), bool) if key_mask is None else key_mask
        segments = jnp.pad(mask, ((0, 0), (0, padded_keys - num_keys))).astype(jnp.int32)

    out = _partitioned(block_q, block_k, causal, q_, k_, v_, segments)
    return out.transpose(0, 2, 1, 3)[:, :num_queries, :, :value_width]


def _partitioned(
    block_q: int, block_k: int, causal: bool, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None
) -> jax.Array:
    """The kernel on every device's share: arrays [B, heads, length, width], segments int32[B, K]."""
    interpret = target_platform() != "tpu"

    def run(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> jax.Array:
        shape = (q.shape[2], k.shape[2])
        mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
        kernel = kernels.make_splash_mha_single_device(
            masks.MultiHeadMask([mask] * q.shape[1]),
            block_sizes=kernels.BlockSizes(
                block_q=block_q,
                block_kv=block_k,
                block_kv_compute=block_k,
                block_q_dkv=block_q,
                block_kv_dkv=gradient_block_length(k.shape[2], block_k),
                block_kv_dkv_compute=block_k,
                # scores are computed once for the gradients of queries, keys and values
                use_fused_bwd_kernel=True,
            ),
            residual_checkpoint_name=RESIDUALS,
            interpret=interpret,
        )
        if segments is None:
            return jax.vmap(kernel)(q, k, v)
        if not causal:
            _pass_over_unseen(kernel, segments, block_k)
        ones = jnp.ones(shape[0], jnp.int32)
        return jax.vmap(lambda q, k, v, s: kernel(q, k, v, kernels.SegmentIds(ones, s)))(q, k, v, segments)

    if not _auto_mesh():
        return run(q, k, v, segments)
    # where axes do not divide, every device has all
    batch, heads = mesh_axes("batch", q.shape[0]), mesh_axes("heads", k.shape[1])
    spec = PartitionSpec(batch or None, heads or None)
    in_specs = (spec, spec, spec, None if segments is None else PartitionSpec(batch or None))
    return jax.shard_map(run, in_specs=in_specs, out_specs=spec, check_vma=False)(q, k, v, segments)
