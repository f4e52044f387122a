"""Depthwise convolution as shifted multiply-adds.

XLA's own is some twenty times slower on CPUs. All taps are one loop, which the compiler neither splits nor fuses into
what comes after, where it would compute them again.

Axes: B images, H, W grid, C channels, K odd kernel side.
"""

import jax
import jax.numpy as jnp

# Rows of 256 or 512 channels lie whole powers of two apart, and a cache keeps only a few such: the taps of a position
# would drive each other out. So many unused channels behind them set the rows apart.
UNUSED = 8


def _pad(x: jax.Array, size: int, unused: int = 0) -> jax.Array:
    half = size // 2
    return jnp.pad(x, ((0, 0), (half, half), (half, half), (0, unused)))


@jax.custom_vjp
def shifted_depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves dtype[B, H, W, C] with one kernel a channel, dtype[K, K, C], keeping the size."""
    size, (_, height, width, channels) = kernel.shape[0], x.shape
    spaced = jnp.pad(kernel, ((0, 0), (0, 0), (0, UNUSED)))
    padded, spaced = jax.lax.optimization_barrier((_pad(x, size, UNUSED), spaced))
    out = jnp.zeros_like(x)
    for i in range(size):
        for j in range(size):
            out += padded[:, i : i + height, j : j + width, :channels] * spaced[i, j, :channels]
    result: jax.Array = jax.lax.optimization_barrier(out)
    return result


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
