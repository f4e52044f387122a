"""The memory encoder's first convolutions on folded maps.

They take a mask of one channel to 256 in four steps, each at half the side and four times the channels. A TPU computes
128 channels at once and would be idle but for 1, 4, 16 or 64 of them. A map is folded when the positions of a block of
F x F stand side by side as channels. Folded, each of the four steps has 256 channels at the last step's size.

Axes: B images, H, W grid of blocks, F side of a block, C channels.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from virst_jax.config import Compute
from virst_jax.models.layers import default_init, with_axes


def fold(x: jax.Array, side: int) -> jax.Array:
    """dtype[B, H * F, W * F, C] -> dtype[B, H, W, F * F * C]"""
    return rearrange(x, "b (h i) (w j) c -> b h w (i j c)", i=side, j=side)


@functools.cache
def _places(side: int) -> np.ndarray:
    """float32[3, 2, side, side // 2]: 1 where a tap meets a row of the last block or this one, for a row of output."""
    places = np.zeros((3, 2, side, side // 2), np.float32)
    for tap in range(3):
        for out in range(side // 2):
            row = 2 * out + tap - 1
            places[tap, int(row >= 0), row % side, out] = 1
    return places


class FoldedConv(nn.Module):
    """A 3 x 3 convolution of stride 2, padded by 1, from blocks of `side` to blocks of half of it."""

    compute: Compute
    features: int
    side: int  # F

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """dtype[B, H, W, F * F * C] -> dtype[B, H, W, F / 2 * F / 2 * features]"""
        dtype, param_dtype = jnp.dtype(self.compute.dtype), jnp.dtype(self.compute.param_dtype)
        channels = x.shape[-1] // self.side**2
        init = with_axes(default_init, "kernel", "kernel", "conv_in", "conv_out")
        kernel = self.param("kernel", init, (3, 3, channels, self.features), param_dtype).astype(dtype)
        bias = self.param("bias", with_axes(nn.initializers.zeros, "conv_out"), (self.features,), param_dtype)
        places = jnp.asarray(_places(self.side), dtype)
        # exact: each element is one of the kernel's, or 0; by default a TPU would round float32 to bfloat16
        wide = jnp.einsum("sbxy,tscd->tbxycd", places, kernel, precision="highest")
        wide = jnp.einsum("tauv,tbxycd->abuxcvyd", places, wide, precision="highest")
        wide = rearrange(wide, "a b u x c v y d -> a b (u x c) (v y d)")
        dimensions = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x.astype(dtype), wide, (1, 1), ((1, 0), (1, 0)), dimension_numbers=dimensions)
        return y + jnp.tile(bias.astype(dtype), (self.side // 2) ** 2)


def _product(x: jax.Array, matrix: np.ndarray, precision: str) -> jax.Array:
    y: jax.Array = jnp.einsum(
        "bhwc,cd->bhwd", x, jnp.asarray(matrix, x.dtype), precision=precision, preferred_element_type=jnp.float32
    )
    return y


class FoldedNorm(nn.Module):
    """Layer norm over the channels of every position in a block, with statistics in float32."""

    compute: Compute
    channels: int
    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """dtype[B, H, W, F * F * C] -> the same"""
        param_dtype = jnp.dtype(self.compute.param_dtype)
        scale = self.param("scale", with_axes(nn.initializers.ones, "norm"), (self.channels,), param_dtype)
        bias = self.param("bias", with_axes(nn.initializers.zeros, "norm"), (self.channels,), param_dtype)
        count = x.shape[-1] // self.channels
        # a mean over few neighbours is slow on a TPU, so it is a product; its weights, powers of 1/2, are exact
        means = np.kron(np.eye(count), np.full((self.channels,) * 2, 1 / self.channels))
        exact = x.dtype == jnp.bfloat16
        y = x.astype(jnp.float32) - _product(x, means, "default" if exact else "highest")
        y *= jax.lax.rsqrt(_product(y * y, means, "high" if exact else "highest") + self.epsilon)
        y = y * jnp.tile(scale.astype(jnp.float32), count) + jnp.tile(bias.astype(jnp.float32), count)
        return y.astype(jnp.dtype(self.compute.dtype))
