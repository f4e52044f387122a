"""UMT video encoder: a ViT over clips of four frames, or over still images.

Axes: B clips, T frames of a clip, N = T * grid * grid tokens, D width, S image side.
Source: model/videochat/vision_tower_builder.py.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from virst_jax.config import Compute, VisionConfig
from virst_jax.models.layers import Projections, dense, gelu, layer_norm, remat, with_axes
from virst_jax.ops.attention import attention
from virst_jax.ops.constrain import constrain
from virst_jax.ops.platform import target_platform
from virst_jax.ops.position import sinusoid_table
from virst_jax.ops.splash import LANES


class Attention(nn.Module):
    """Self-attention with biases on queries and values, none on keys."""

    cfg: VisionConfig
    compute: Compute
    tokens: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, dtype, param_dtype = (
            x.shape[-1],
            jnp.dtype(self.compute.dtype),
            jnp.dtype(self.compute.param_dtype),
        )
        q, k, v = Projections(self.compute, width, use_bias=False, weights=self.cfg.weights, name="qkv")(x)
        zeros = with_axes(nn.initializers.zeros, "heads")
        q_bias = self.param("q_bias", zeros, (width,), param_dtype).astype(dtype)
        v_bias = self.param("v_bias", zeros, (width,), param_dtype).astype(dtype)
        heads = [rearrange(y, "b n (h d) -> b n h d", h=self.cfg.num_heads) for y in (q + q_bias, k, v + v_bias)]
        padded = 0 < self.tokens < x.shape[1]
        key_mask = np.broadcast_to(np.arange(x.shape[1]) < self.tokens, x.shape[:2]) if padded else None
        out = attention(*heads, key_mask=key_mask, impl=self.compute.attention)
        proj = dense(self.compute, width, ("heads", "embed"), weights=self.cfg.weights, name="proj")
        return proj(rearrange(out, "b n h d -> b n (h d)"))


class Block(nn.Module):
    cfg: VisionConfig
    compute: Compute
    tokens: int = 0  # of a clip, behind which lies padding; 0: none does

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        x = constrain(x, None, None, "width")
        norm1, norm2 = (layer_norm(self.compute, 1e-6, name=f"norm{i}") for i in (1, 2))
        x = x + Attention(self.cfg, self.compute, self.tokens, name="attn")(norm1(x))
        linear = functools.partial(dense, self.compute, weights=self.cfg.weights)
        hidden = linear(int(x.shape[-1] * self.cfg.mlp_ratio), ("embed", "mlp"), name="fc1")(norm2(x))
        return x + linear(x.shape[-1], ("mlp", "embed"), name="fc2")(gelu(hidden)), None


class VideoEncoder(nn.Module):
    cfg: VisionConfig
    compute: Compute

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Normalised pixels float[B, T, S, S, 3] -> features dtype[B, N, D].

        T = 1 is a still image, with a position table of its own.
        """
        cfg = self.cfg
        frames = pixels.shape[1]
        patches = rearrange(
            pixels, "b t (h p) (w q) c -> b (t h w) (p q c)", p=cfg.patch_size, q=cfg.patch_size
        ).astype(jnp.dtype(self.compute.dtype))
        x = dense(self.compute, cfg.hidden_size, ("conv_in", "embed"), name="patch_embed")(patches)
        pretrained = 1 if frames == 1 else cfg.pretrained_frames
        table = sinusoid_table(cfg.grid, frames, cfg.hidden_size, cfg.pretrained_grid, pretrained)
        x = x + table.astype(x.dtype)
        self.sow("intermediates", "embedded", x)
        blocks: Any = nn.scan(
            remat(Block, self.compute.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=cfg.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        count, padding = x.shape[1], -x.shape[1] % LANES
        if target_platform() == "tpu" and padding <= count // 32:
            # once here, in place of before and behind the attention of every layer
            x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
        x, _ = blocks(cfg, self.compute, count, name="layers")(x, None)
        x = constrain(x[:, :count], None, None, "width")
        return layer_norm(self.compute, 1e-12, name="norm")(x)
