"""The memory encoder's first convolution on planes, for CPUs.

It makes four channels of one. Channels that stand side by side leave a CPU's vector units half empty, and a mean over
four neighbours is no vector operation at all. As a plane for each channel everything is sums of whole rows.

Axes: B images, H, W grid.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from virst_jax.config import Compute
from virst_jax.models.layers import default_init, with_axes


class PlaneConv(nn.Module):
    """A 3 x 3 convolution of one channel, of stride 2, padded by 1. Its parameters are those of `layers.conv`."""

    compute: Compute
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """dtype[B, H, W], both even -> dtype[B, H / 2, W / 2] for each feature"""
        dtype, param_dtype = jnp.dtype(self.compute.dtype), jnp.dtype(self.compute.param_dtype)
        init = with_axes(default_init, "kernel", "kernel", "conv_in", "conv_out")
        kernel = self.param("kernel", init, (3, 3, 1, self.features), param_dtype).astype(dtype)
        bias = self.param("bias", with_axes(nn.initializers.zeros, "conv_out"), (self.features,), param_dtype)
        wide = jnp.promote_types(dtype, jnp.float32)
        height, width = x.shape[1] // 2, x.shape[2] // 2
        x = jnp.pad(x.astype(dtype).astype(wide), ((0, 0), (1, 1), (1, 1)))
        # even and odd rows and columns apart, once: a loop over every second number is slow
        phases = x.reshape(x.shape[0], height + 1, 2, width + 1, 2).transpose(2, 4, 0, 1, 3)
        phases = jax.lax.optimization_barrier(phases)
        planes = []
        for feature in range(self.features):
            plane = jnp.zeros((x.shape[0], height, width), wide)
            for i in range(3):
                for j in range(3):
                    tap = phases[i % 2, j % 2, :, i // 2 : i // 2 + height, j // 2 : j // 2 + width]
                    plane += tap * kernel[i, j, 0, feature].astype(wide)
            planes.append(plane.astype(dtype) + bias[feature].astype(dtype))
        return planes


class PlaneNorm(nn.Module):
    """Layer norm over planes, with statistics in float32. Its parameters are those of `layers.layer_norm`."""

    compute: Compute
    epsilon: float

    @nn.compact
    def __call__(self, planes: Sequence[jax.Array]) -> list[jax.Array]:
        """dtype[B, H, W] for each channel -> the same"""
        count, param_dtype = len(planes), jnp.dtype(self.compute.param_dtype)
        scale = self.param("scale", with_axes(nn.initializers.ones, "norm"), (count,), param_dtype)
        bias = self.param("bias", with_axes(nn.initializers.zeros, "norm"), (count,), param_dtype)
        wide = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in planes]
        mean = sum(wide[1:], wide[0]) / count
        apart = [x - mean for x in wide]
        inverse = jax.lax.rsqrt(sum((x * x for x in apart[1:]), apart[0] * apart[0]) / count + self.epsilon)
        return [(x * inverse * scale[i] + bias[i]).astype(jnp.dtype(self.compute.dtype)) for i, x in enumerate(apart)]
