"""Depthwise convolution as shifted multiply-adds.

XLA's own is some twenty times slower on CPUs. A few rows are computed at a time: they stay in the cache over all taps,
and the compiler cannot fuse the 49 taps into what comes after, where it computes them again.

Axes: B images, H, W grid, C channels, K odd kernel side.
"""

import math

import jax
import jax.numpy as jnp

ROWS = 8


def _pad(x: jax.Array, size: int) -> jax.Array:
    half = size // 2
    return jnp.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))


@jax.custom_vjp
def shifted_depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves dtype[B, H, W, C] with one kernel a channel, dtype[K, K, C], keeping the size."""
    size, (images, height, width, channels) = kernel.shape[0], x.shape
    rows, padded = math.gcd(height, ROWS), _pad(x, size)

    def block(first: jax.Array) -> jax.Array:
        shape = (images, rows + size - 1, width + size - 1, channels)
        part = jax.lax.dynamic_slice(padded, (0, first, 0, 0), shape)
        out = jnp.zeros((images, rows, width, channels), x.dtype)
        for i in range(size):
            for j in range(size):
                out += part[:, i : i + rows, j : j + width] * kernel[i, j]
        return out

    blocks = jax.lax.map(block, jnp.arange(0, height, rows))
    return jnp.moveaxis(blocks, 0, 1).reshape(x.shape)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return shifted_depthwise(x, kernel), (x, kernel)


def _backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    # derived by hand: the transpose of 49 slices is 49 pads, which compile slowly and run far slower
    x, kernel = saved
    size = kernel.shape[0]
    padded = _pad(x, size)

    def tap(offset: jax.Array) -> jax.Array:
        shifted = jax.lax.dynamic_slice(padded, (0, offset // size, offset % size, 0), x.shape)
        return (shifted * gradient).sum((0, 1, 2))

    taps = jax.lax.map(tap, jnp.arange(size * size))
    return shifted_depthwise(gradient, kernel[::-1, ::-1]), taps.reshape(kernel.shape)


shifted_depthwise.defvjp(_forward, _backward)
