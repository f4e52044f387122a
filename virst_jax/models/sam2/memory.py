"""Memory attention and memory encoder.

Axes: B objects, S = H*W tokens of a frame, F remembered frames, K = F*S + pointer tokens, C width, D memory width,
R mask side (the image's).
Source: model/sam2/modeling/{memory_attention,memory_encoder}.py, sam/transformer.py class RoPEAttention.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from virst_jax.config import Compute, Sam2Config
from virst_jax.models.layers import Dropout, conv, default_init, dense, gelu, in_parts, layer_norm, with_axes
from virst_jax.models.sam2.folded import FoldedConv, FoldedNorm, fold
from virst_jax.models.sam2.planes import PlaneConv, PlaneNorm
from virst_jax.ops.attention import attention
from virst_jax.ops.constrain import constrain
from virst_jax.ops.depthwise import shifted_depthwise
from virst_jax.ops.platform import target_platform
from virst_jax.ops.position import axial_angles, rotate_halves, sine_2d
from virst_jax.ops.splash import KEPT, block_length


class SplitDense(nn.Module):
    """A linear layer that gives the first channels of all rotated pairs, then their second ones, head by head.

    The products of queries and keys are the same in any order of channels. Neighbours would have to be taken apart in
    every frame, which costs a TPU more than their products.
    """

    compute: Compute
    features: int
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """dtype[B, S, C] -> dtype[B, S, heads, features // heads]"""
        dtype, param_dtype = jnp.dtype(self.compute.dtype), jnp.dtype(self.compute.param_dtype)
        kernel_init, bias_init = with_axes(default_init, "embed", "heads"), with_axes(nn.initializers.zeros, "heads")
        kernel = self.param("kernel", kernel_init, (x.shape[-1], self.features), param_dtype).astype(dtype)
        bias = self.param("bias", bias_init, (self.features,), param_dtype).astype(dtype)
        order = "(h d p) -> (h p d)"
        kernel = rearrange(kernel, "c " + order.replace("->", "-> c"), h=self.heads, p=2)
        y = x.astype(dtype) @ kernel + rearrange(bias, order, h=self.heads, p=2)
        return rearrange(y, "b n (h d) -> b n h d", h=self.heads)


class RotaryAttention(nn.Module):
    """Attention whose queries and keys are rotated by their 2-D position."""

    cfg: Sam2Config
    compute: Compute

    @nn.compact
    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        key_mask: jax.Array | None = None,
        unrotated: int = 0,
    ) -> jax.Array:
        """q dtype[B, S, C], k and v dtype[B, K, ...], key_mask bool[B, K] -> dtype[B, S, C].

        Keys are whole frames, which repeat the rotation of the queries, then `unrotated` others. A query sees at
        least one.
        """
        cfg, width = self.cfg, self.cfg.hidden_size
        # weights of one head sum to one, so they may weigh narrow memories before these are projected; cuDNN wants
        # values as wide as keys
        late = cfg.memory_heads == 1 and v.shape[-1] < width and target_platform() != "gpu"

        def project(name: str, x: jax.Array) -> jax.Array:
            return dense(self.compute, width, ("embed", "heads"), name=f"{name}_proj")(x)

        def split(x: jax.Array) -> jax.Array:
            return rearrange(x, "b n (h d) -> b n h d", h=cfg.memory_heads)

        q = SplitDense(self.compute, width, cfg.memory_heads, name="q_proj")(q)
        k = SplitDense(self.compute, width, cfg.memory_heads, name="k_proj")(k)
        angles = axial_angles(cfg.feature_size, cfg.feature_size, width // cfg.memory_heads, cfg.rope_theta)
        whole = k.shape[1] - unrotated
        frames = rearrange(k[:, :whole], "b (f s) h d -> b f s h d", s=angles.shape[0])
        rotated = rearrange(rotate_halves(frames, angles), "b f s h d -> b (f s) h d")
        out = attention(
            rotate_halves(q, angles),
            jnp.concatenate([rotated, k[:, whole:]], axis=1),
            split(v if late else project("v", v)),
            key_mask=key_mask,
            impl=self.compute.attention,
        )
        out = rearrange(out, "b n h d -> b n (h d)")
        return dense(self.compute, width, ("heads", "embed"), name="out_proj")(project("v", out) if late else out)


class Layer(nn.Module):
    cfg: Sam2Config
    compute: Compute
    pointer_tokens: int
    deterministic: bool = True

    @nn.compact
    def __call__(
        self, x: jax.Array, memory: jax.Array, memory_pos: jax.Array, key_mask: jax.Array | None
    ) -> tuple[jax.Array, None]:
        cfg, compute = self.cfg, self.compute
        x = constrain(x, None, None, "width")
        norm = [layer_norm(compute, name=f"norm{i}") for i in range(1, 4)]
        y = norm[0](x)
        drop = functools.partial(Dropout(cfg.memory_dropout), deterministic=self.deterministic)
        x = x + drop(RotaryAttention(cfg, compute, name="self_attn")(y, y, y))
        y = norm[1](x)
        cross = RotaryAttention(cfg, compute, name="cross_attn")
        x = x + drop(cross(y, memory + memory_pos, memory, key_mask, self.pointer_tokens))
        y = drop(dense(compute, cfg.memory_mlp_dim, ("embed", "mlp"), name="linear1")(norm[2](x)), relu=True)
        return x + drop(dense(compute, cfg.hidden_size, ("mlp", "embed"), name="linear2")(y)), None


class MemoryAttention(nn.Module):
    cfg: Sam2Config
    compute: Compute

    @nn.compact
    def __call__(
        self,
        image: jax.Array,
        image_pos: jax.Array,
        memory: jax.Array,
        memory_pos: jax.Array,
        key_mask: jax.Array | None = None,
        pointer_tokens: int = 0,
        deterministic: bool = True,
    ) -> jax.Array:
        """Conditions a frame's features on what is remembered.

        Args:
          image: dtype[B, S, C].
          image_pos: float32[S, C] or float32[B, S, C].
          memory: dtype[B, K, D], whole frames first, pointer tokens after them.
          memory_pos: dtype[B, K, D].
          key_mask: bool[B, K], which of the keys exist.
          pointer_tokens: how many of the keys are pointer tokens.
          deterministic: False: with dropout, which draws from the "dropout" rng.

        Returns:
          dtype[B, S, C].
        """
        dtype = jnp.dtype(self.compute.dtype)
        layer: Any = Layer
        if target_platform() == "tpu":
            # Training computes whole frames again in the backward pass, but for attention, whose outcome is kept. To
            # keep the keys of all layers then takes longer than to project those of each layer once more.
            layer = nn.remat(Layer, prevent_cse=False, policy=KEPT)
        layers: Any = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast),
            length=self.cfg.memory_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        if target_platform() == "tpu" and key_mask is not None:
            # to whole blocks of the kernel, which would have to pad each layer's keys and values
            padding = -memory.shape[1] % block_length(memory.shape[1])
            memory, memory_pos = (jnp.pad(x, ((0, 0), (0, padding), (0, 0))) for x in (memory, memory_pos))
            key_mask = jnp.pad(key_mask, ((0, 0), (0, padding)))
            pointer_tokens += padding
        x = image.astype(dtype) + (0.1 * image_pos).astype(dtype)
        self.sow("intermediates", "entered", x)
        x, _ = layers(self.cfg, self.compute, pointer_tokens, deterministic, name="layers")(
            x, memory.astype(dtype), memory_pos.astype(dtype), key_mask
        )
        return layer_norm(self.compute, name="norm")(x)


class DepthwiseConv(nn.Module):
    """Depthwise convolution, padded to keep the size."""

    compute: Compute
    kernel_size: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """dtype[B, H, W, C] -> dtype[B, H, W, C]"""
        n, channels = self.kernel_size, x.shape[-1]
        dtype, param_dtype = jnp.dtype(self.compute.dtype), jnp.dtype(self.compute.param_dtype)
        init = with_axes(default_init, "kernel", "kernel", "conv_in", "conv_out")
        kernel = self.param("kernel", init, (n, n, 1, channels), param_dtype).astype(dtype)
        bias = self.param("bias", with_axes(nn.initializers.zeros, "conv_out"), (channels,), param_dtype).astype(dtype)
        x = x.astype(dtype)
        if target_platform() == "cpu":
            return shifted_depthwise(x, kernel[:, :, 0]) + bias
        return bias + jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=channels
        )


class ConvNextBlock(nn.Module):
    compute: Compute
    kernel_size: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        y = DepthwiseConv(self.compute, self.kernel_size, name="dwconv")(x)
        y = in_parts(self, ConvNextBlock._mix_channels, y, 4 * width, flat=True)
        init = with_axes(nn.initializers.constant(1e-6), "norm")
        gamma = self.param("gamma", init, (width,), jnp.dtype(self.compute.param_dtype))
        return x + gamma.astype(y.dtype) * y

    def _mix_channels(self, y: jax.Array) -> jax.Array:
        """dtype[..., C] -> the same"""
        width = y.shape[-1]
        y = layer_norm(self.compute, 1e-6, name="norm")(y)
        y = gelu(dense(self.compute, 4 * width, ("embed", "mlp"), name="pwconv1")(y))
        return dense(self.compute, width, ("mlp", "embed"), name="pwconv2")(y)


class MemoryEncoder(nn.Module):
    cfg: Sam2Config
    compute: Compute

    @nn.compact
    def __call__(self, image: jax.Array, mask: jax.Array) -> jax.Array:
        """Image features dtype[B or 1, H, W, C] and a mask float[B, R, R] in [-10, 10] -> memory dtype[B, H, W, D]."""
        cfg, compute = self.cfg, self.compute
        y = mask[..., None].astype(jnp.dtype(compute.dtype))
        platform, side = target_platform(), 16
        folded = platform == "tpu"
        y = fold(y, side) if folded else y
        for i in range(4):
            channels = 4 ** (i + 1)
            if platform == "cpu" and i == 0:
                planes = PlaneNorm(compute, 1e-6, name="mask_norm0")(PlaneConv(compute, 4, name="mask_conv0")(mask))
                y = jnp.stack([gelu(x) for x in planes], -1)
            elif folded:
                y = FoldedConv(compute, channels, side >> i, name=f"mask_conv{i}")(y)
                y = gelu(FoldedNorm(compute, channels, 1e-6, name=f"mask_norm{i}")(y))
            else:
                y = conv(compute, channels, 3, stride=2, padding=1, name=f"mask_conv{i}")(y)
                y = gelu(layer_norm(compute, 1e-6, name=f"mask_norm{i}")(y))
        y = conv(compute, cfg.hidden_size, 1, name="mask_proj")(y)
        x = conv(compute, cfg.hidden_size, 1, name="image_proj")(image) + y
        for i in range(cfg.memory_fuser_layers):
            x = ConvNextBlock(compute, cfg.memory_kernel, name=f"fuser{i}")(x)
        return conv(compute, cfg.memory_dim, 1, name="out_proj")(x)


def memory_position(cfg: Sam2Config) -> np.ndarray:
    """Spatial position encoding float32[S, D] of a memory."""
    return sine_2d(cfg.feature_size, cfg.feature_size, cfg.memory_dim).reshape(-1, cfg.memory_dim)
