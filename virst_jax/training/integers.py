"""Frozen kernels of the language model as int8 while adapters beside them are trained: half of bfloat16's bytes.

Axes: N layers of the stack, I input rows, O output channels.
"""

import re

import jax
import jax.numpy as jnp

from virst_jax.errors import UserError
from virst_jax.models.lora import ADAPTED
from virst_jax.models.tree import flatten, unflatten
from virst_jax.ops.quantized import DTYPES, LARGEST, SCALE
from virst_jax.types import Params, PyTree

KIND = "int8"
_KERNEL = re.compile(rf"llm/layers/.*/({'|'.join(ADAPTED)})/kernel")


def to_integers(frozen: Params) -> dict[str, PyTree]:
    """Frozen parameters with the kernels float[N, I, O] of the language model's layers as int8[N, I, O].

    Beside each stands `kernel_scale` float32[N, O], by which models.lora.LoraDense knows it. The rounding is that of
    ops.quantized.quantize. May be traced.

    Raises:
      UserError: no such kernel is frozen.
    """
    flat: dict[str, PyTree] = {}
    for path, leaf in flatten(frozen).items():
        if not _KERNEL.fullmatch(path):
            flat[path] = leaf
            continue
        wide = leaf.astype(jnp.float32)
        step = jnp.abs(wide).max(axis=-2) / LARGEST[KIND]
        step = jnp.where(step > 0, step, 1)  # of zeros alone: any
        values = jnp.clip(jnp.rint(wide / step[..., None, :]), -LARGEST[KIND], LARGEST[KIND])
        flat[path] = values.astype(DTYPES[KIND])
        flat[_scale_of(path)] = step
    if not any(path.endswith(f"/{SCALE}") for path in flat):
        raise UserError(
            "frozen_weights: int8 holds frozen kernels of the language model's layers, and this stage has none; set it "
            "to float"
        )
    return unflatten(flat)


def to_floats(frozen: Params) -> dict[str, PyTree]:
    """The inverse of `to_integers`: kernels are integers times scales, rounded once to the dtype of other leaves."""
    flat = flatten(frozen)
    kept = {path: leaf for path, leaf in flat.items() if not path.endswith(f"/{SCALE}")}
    floats = (leaf.dtype for leaf in kept.values() if jnp.issubdtype(leaf.dtype, jnp.floating))
    dtype = next(floats, jnp.dtype(jnp.float32))
    for path, leaf in kept.items():
        if leaf.dtype == DTYPES[KIND]:
            kept[path] = _floats(leaf, flat[_scale_of(path)], dtype)
    return unflatten(kept)


def _scale_of(path: str) -> str:
    return f"{path.rpartition('/')[0]}/{SCALE}"


# one pass: each operation on its own would make arrays in float32 beside the integers
_floats = jax.jit(
    lambda values, scale, dtype: (values.astype(jnp.float32) * scale[..., None, :]).astype(dtype),
    static_argnums=2,
)
