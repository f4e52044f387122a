"""Kernels of linear layers as small integers with scales: weights alone, activations stay in floating point.

int8 has a scale for every output channel, which the finished product is multiplied with. int4 has a scale for every
output channel of each group of input rows, which the kernel is multiplied with inside the product. Both are symmetric:
zero is zero, and the largest absolute value is the largest integer. The values of int4 are stored by groups, so that
TPUs read a layer of a stack, convert and scale it within the product: with the groups in one axis the compiler makes
the whole kernel first, which takes ten times as long.

Axes: ... layers of a stack, I input rows, G groups of R of them, O output channels (one axis or several).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from virst_jax.errors import UserError

DTYPES = {"int8": np.dtype(np.int8), "int4": np.dtype(ml_dtypes.int4)}
LARGEST = {"int8": 127, "int4": 7}
GROUP = 128  # input rows that share a scale, at most
SCALE = "kernel_scale"  # the parameter beside `kernel`


class Quantized(NamedTuple):
    """A kernel without leading axes.

    values: int8[I, O] or int4[G, R, O].
    scale: float32[O] of int8, float32[G, O] of int4.
    """

    values: jax.Array
    scale: jax.Array

    def product(self, x: jax.Array) -> jax.Array:
        """dtype[..., I] -> float32[..., O], or float64 if x is: summed and scaled there, not yet rounded to dtype."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        kernel = self.values.astype(x.dtype)
        if not _is_grouped(self.values.dtype):
            return jnp.tensordot(x, kernel, 1, preferred_element_type=wide) * self.scale.astype(wide)
        grouped = x.reshape(*x.shape[:-1], *self.values.shape[:2])
        return jnp.tensordot(grouped, kernel * self.scale[:, None].astype(x.dtype), 2, preferred_element_type=wide)

    def outputs(self, index: int) -> "Quantized":
        """One of several kernels [I, n, O] that stand side by side."""
        values = self.values[:, :, index] if _is_grouped(self.values.dtype) else self.values[:, index]
        return Quantized(values, self.scale[..., index, :])


@jax.custom_vjp
def frozen_product(x: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
    """The product with an int8 kernel that is not trained, and its gradient with respect to x.

    Operands of both products have the type of x, so that they run at its rate; sums and scales are float32.

    Args:
      x: dtype[..., I].
      values: int8[I, O].
      scale: float32[O].

    Returns:
      dtype[..., O].
    """
    return Quantized(values, scale).product(x).astype(x.dtype)


def _frozen_gradient(kept: tuple[jax.Array, jax.Array], of_result: jax.Array) -> tuple[jax.Array, None, None]:
    values, scale = kept
    dtype = of_result.dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    scaled = (of_result.astype(wide) * scale.astype(wide)).astype(dtype)
    return jnp.tensordot(scaled, values.astype(dtype), ((-1,), (1,))), None, None


frozen_product.defvjp(
    lambda x, values, scale: (frozen_product(x, values, scale), (values, scale)),
    _frozen_gradient,
)


def _is_grouped(dtype: np.dtype) -> bool:
    return dtype == DTYPES["int4"]


def is_scale(path: str) -> bool:
    """Whether a parameter's path is that of scales, which stay in float32 whatever the rest is cast to."""
    return path.endswith(SCALE)


def num_groups(width: int) -> int:
    """How many groups `width` input rows make: as few as there can be of equal size, at most GROUP."""
    return next(width // size for size in range(min(GROUP, width), 0, -1) if width % size == 0)


def stored_shapes(shape: tuple[int, ...], kind: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of the values and of the scales of a kernel [I, O]."""
    rows, *outputs = shape
    if kind == "int8":
        return shape, tuple(outputs)
    groups = num_groups(rows)
    return (groups, rows // groups, *outputs), (groups, *outputs)


def quantize(kernel: np.ndarray, kind: str, leading: int = 0, where: str = "a kernel") -> tuple[np.ndarray, np.ndarray]:
    """Rounds a kernel to integers, on the host, one layer after another.

    Args:
      kernel: floating-point[..., I, O].
      kind: of DTYPES.
      leading: how many axes of a stack come first.
      where: its name, for messages.

    Returns:
      Values and scales as of `Quantized`, with the leading axes. An element differs from its value times its scale by
      half a scale at most.

    Raises:
      UserError: values that are not finite.
    """
    lead, shape = kernel.shape[:leading], kernel.shape[leading:]
    stored, scales = stored_shapes(shape, kind)
    stack = kernel.reshape(-1, *shape)
    values, scale = np.empty((len(stack), *stored), DTYPES[kind]), np.empty((len(stack), *scales), np.float32)
    for i, layer in enumerate(stack):
        grouped = np.asarray(layer, np.float32).reshape(stored)
        rows = len(stored) - len(shape)  # the axis of a group's input rows
        largest = np.abs(grouped).max(axis=rows)
        if not np.isfinite(largest).all():
            raise UserError(f"{where}: holds values that are not finite; convert the model again")
        step = largest / np.float32(LARGEST[kind])
        if _is_grouped(DTYPES[kind]):  # numbers of bfloat16, in which the kernel is scaled
            step = step.astype(ml_dtypes.bfloat16).astype(np.float32)
        step = np.where(step > 0, step, np.float32(1))  # of zeros alone: any
        rounded = np.rint(grouped / np.expand_dims(step, rows))
        values[i] = np.clip(rounded, -LARGEST[kind], LARGEST[kind]).astype(np.int8).astype(DTYPES[kind])
        scale[i] = step
    return values.reshape(*lead, *stored), scale.reshape(*lead, *scales)


def dequantize(values: np.ndarray, scale: np.ndarray, leading: int = 0) -> np.ndarray:
    """The kernel float32[..., I, O] that values and scales stand for."""
    grouped = _is_grouped(values.dtype)
    wide = values.astype(np.float32) * np.expand_dims(scale, leading + grouped)
    lead, shape = values.shape[:leading], values.shape[leading:]
    return wide.reshape(*lead, shape[0] * shape[1], *shape[2:]) if grouped else wide
