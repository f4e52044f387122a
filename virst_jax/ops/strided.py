"""Strided convolutions: one whose gradient is a matrix product, for CPUs, and one of few channels, for TPUs.

Inside a loop on CPUs, the gradient of XLA's own convolution is many times slower, and took two thirds of a training
step of the tracker. A TPU's matrix units are 128 channels wide, and mostly idle with the three of an image.

Axes: B images, H, W grid, C channels, K kernel side, D output channels, h, w output grid.
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def strided_convolution(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """Convolves dtype[B, H, W, C] with dtype[K, K, C, D] -> dtype[B, h, w, D]."""
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), ((padding, padding),) * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _as_product(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """The same: what every position sees, side by side, times the kernel."""
    size = kernel.shape[0]
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    height, width = (x.shape[1] - size) // stride, (x.shape[2] - size) // stride
    taps = [
        x[:, i : i + height * stride + 1 : stride, j : j + width * stride + 1 : stride]
        for i in range(size)
        for j in range(size)
    ]
    return jnp.einsum("bhwk,kd->bhwd", jnp.concatenate(taps, axis=-1), kernel.reshape(-1, kernel.shape[-1]))


def _forward(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return strided_convolution(x, kernel, stride, padding), (x, kernel)


def _backward(stride: int, padding: int, saved: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, ...]:
    _, pull = jax.vjp(functools.partial(_as_product, stride=stride, padding=padding), *saved)
    return pull(gradient)


strided_convolution.defvjp(_forward, _backward)


def folded_convolution(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """The same convolution, over blocks of stride x stride positions whose channels stand side by side."""
    size = kernel.shape[0]
    before = -padding % stride  # of the kernel, so that it begins with a block
    blocks = -(-(before + size) // stride)
    kernel = jnp.pad(kernel, ((before, blocks * stride - before - size),) * 2 + ((0, 0), (0, 0)))
    kernel = rearrange(kernel, "(a i) (b j) c d -> a b (i j c) d", i=stride, j=stride)
    edges = []
    for length in x.shape[1:3]:
        needed = ((length + 2 * padding - size) // stride + blocks) * stride
        edges.append((padding + before, needed - length - padding - before, 0))
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *edges, (0, 0, 0)))
    x = rearrange(x, "b (h i) (w j) c -> b h w (i j c)", i=stride, j=stride)
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
