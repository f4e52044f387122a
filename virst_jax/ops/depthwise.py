"""Depthwise convolution as shifted multiply-adds.

XLA's own is some twenty times slower on CPUs.

Axes: B images, H, W grid, C channels, K odd kernel side.
"""

import jax
import jax.numpy as jnp


def _pad(x: jax.Array, size: int) -> jax.Array:
    half = size // 2
    return jnp.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))


@jax.custom_vjp
def shifted_depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves dtype[B, H, W, C] with one kernel a channel, dtype[K, K, C], keeping the size."""
    size, (height, width) = kernel.shape[0], x.shape[1:3]
    padded, out = _pad(x, size), jnp.zeros_like(x)
    for i in range(size):
        for j in range(size):
            out += padded[:, i : i + height, j : j + width] * kernel[i, j]
    return out


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
