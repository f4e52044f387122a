"""Spatio-temporal fusion: [SEG] tokens read the tracker's image features, before and after the language model.

Axes: B conversations, N [SEG] tokens, T segmentation frames, H, W feature grid, G = reduced grid side, K = T*G*G keys,
C fusion width, D width of the language model, h heads.
Source: model/seg_prompter.py.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from virst_jax.config import Compute, FusionConfig
from virst_jax.models.layers import Dropout, conv, default_init, dense, gelu, layer_norm, with_axes
from virst_jax.ops import dropout
from virst_jax.ops.attention import attention
from virst_jax.ops.position import rotate_pairs, spacetime_angles


class SpatialReduce(nn.Module):
    """Three stride-2 convolutions: the grid shrinks eightfold."""

    compute: Compute
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """dtype[B, T, H, W, C] -> dtype[B, K, C], with G = H / 8"""
        batch = x.shape[0]
        x = rearrange(x, "b t h w c -> (b t) h w c")
        for i in range(3):
            x = nn.relu(conv(self.compute, self.features, 3, stride=2, padding=1, name=f"conv{i}")(x))
        return rearrange(x, "(b t) h w c -> b (t h w) c", b=batch)


class FusedAttention(nn.Module):
    """Multi-head attention with one projection for queries, keys and values (torch.nn.MultiheadAttention)."""

    compute: Compute
    num_heads: int
    dropout: float = 0.0  # of the weights

    @nn.compact
    def __call__(self, q: jax.Array, kv: jax.Array, deterministic: bool = True) -> jax.Array:
        """q dtype[B, S, D], kv dtype[B, K, D] -> dtype[B, S, D]"""
        width = q.shape[-1]
        dtype, param_dtype = jnp.dtype(self.compute.dtype), jnp.dtype(self.compute.param_dtype)
        init = with_axes(default_init, "embed", "qkv", "heads")
        kernel = self.param("kernel", init, (width, 3, width), param_dtype).astype(dtype)
        bias = self.param("bias", with_axes(nn.initializers.zeros, "qkv", "heads"), (3, width), param_dtype).astype(
            dtype
        )
        projected = (x.astype(dtype) @ kernel[:, i] + bias[i] for i, x in enumerate((q, kv, kv)))
        heads = (rearrange(x, "b n (h d) -> b n h d", h=self.num_heads) for x in projected)
        rng = None if deterministic or not self.dropout else self.make_rng("dropout")
        out = attention(*heads, impl=self.compute.attention, dropout=self.dropout, rng=rng)
        out = rearrange(out, "b n h d -> b n (h d)")
        return dense(self.compute, width, ("heads", "embed"), name="out_proj")(out)


class RotaryCrossAttention(nn.Module):
    """Cross-attention with time-only rotation of queries and space-time rotation of keys."""

    compute: Compute
    num_heads: int
    dropout: float = 0.0  # of the weights

    @nn.compact
    def __call__(
        self, q: jax.Array, kv: jax.Array, frames: int, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """q dtype[B, N*T, C], kv dtype[B, K, C] -> dtype[B, N*T, C] and frame scores float32[B, T].

        A frame's score is the mean weight of its keys over heads, queries and positions.
        """
        width = q.shape[-1]
        grid = math.isqrt(kv.shape[1] // frames)
        projected = (
            dense(self.compute, width, ("embed", "heads"), name=f"{name}_proj")(x)
            for name, x in (("q", q), ("k", kv), ("v", kv))
        )
        q, k, v = (rearrange(x, "b n (h d) -> b n h d", h=self.num_heads) for x in projected)
        head_dim = width // self.num_heads
        q_angles = np.tile(spacetime_angles(frames, 1, head_dim), (q.shape[1] // frames, 1))
        q, k = rotate_pairs(q, q_angles), rotate_pairs(k, spacetime_angles(frames, grid, head_dim))
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        weights = nn.softmax(logits / math.sqrt(head_dim))
        scores = rearrange(weights, "b h q (t g) -> b t (h q g)", t=frames).mean(-1)
        if self.dropout and not deterministic:
            weights = dropout.drop(weights, self.dropout, self.make_rng("dropout"))
        out = rearrange(jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v), "b q h d -> b q (h d)")
        return dense(self.compute, width, ("heads", "embed"), name="o_proj")(out), scores


class FusionLayer(nn.Module):
    cfg: FusionConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array, frames: int, deterministic: bool) -> tuple[jax.Array, jax.Array]:
        width = x.shape[-1]
        norm = [layer_norm(self.compute, name=f"norm{i}") for i in range(1, 4)]
        drop = functools.partial(Dropout(self.cfg.dropout), deterministic=deterministic)
        y = FusedAttention(self.compute, self.cfg.num_heads, self.cfg.dropout, name="self_attn")(x, x, deterministic)
        x = norm[0](x + drop(y))
        cross = RotaryCrossAttention(self.compute, self.cfg.num_heads, self.cfg.dropout, name="cross_attn")
        y, scores = cross(x, keys, frames, deterministic)
        x = norm[1](x + drop(y))
        y = gelu(dense(self.compute, 4 * width, ("embed", "mlp"), name="fc1")(x))
        x = norm[2](x + drop(dense(self.compute, width, ("mlp", "embed"), name="fc2")(y)))
        return x, scores


class SecondFusion(nn.Module):
    """Turns the language model's hidden states at [SEG] into prompts for every frame."""

    cfg: FusionConfig
    compute: Compute
    features: int

    def setup(self) -> None:
        self.seg_proj = dense(self.compute, self.features, ("embed", "heads"))

    def project(self, seg_hidden: jax.Array) -> jax.Array:
        """dtype[..., D] -> dtype[..., C]"""
        return self.seg_proj(seg_hidden)

    @nn.compact
    def __call__(
        self, seg_hidden: jax.Array, maps: jax.Array, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """dtype[B, N, D], maps dtype[B or 1, T, H, W, C] -> prompts dtype[B, N, T, C] and scores float32[B, T]."""
        frames, count = maps.shape[1], seg_hidden.shape[1]
        if frames > self.cfg.max_frames:
            raise ValueError(f"{frames} segmentation frames are more than fusion.max_frames = {self.cfg.max_frames}")
        keys = SpatialReduce(self.compute, self.features, name="reduce")(maps)
        keys = layer_norm(self.compute, name="key_norm")(keys)
        keys = jnp.broadcast_to(keys, (len(seg_hidden), *keys.shape[1:]))
        x = jnp.repeat(self.project(seg_hidden), frames, axis=1)
        for i in range(self.cfg.num_layers):
            x, scores = FusionLayer(self.cfg, self.compute, name=f"layer{i}")(x, keys, frames, deterministic)
        return rearrange(x, "b (n t) c -> b n t c", n=count), scores


class InitialFusion(nn.Module):
    """Adds to the input embeddings of [SEG] what they read from the image features, through a gate."""

    cfg: FusionConfig
    compute: Compute
    features: int

    @nn.compact
    def __call__(self, seg_embeds: jax.Array, maps: jax.Array) -> jax.Array:
        """seg_embeds dtype[B, N, D], maps dtype[B or 1, T, H, W, C] -> dtype[B, N, D]"""
        keys = SpatialReduce(self.compute, self.features, name="reduce")(maps)
        keys = layer_norm(self.compute, name="key_norm")(keys)
        keys = dense(self.compute, seg_embeds.shape[-1], ("conv_in", "embed"), name="image_proj")(keys)
        q = layer_norm(self.compute, name="norm_q")(seg_embeds)
        kv = layer_norm(self.compute, name="norm_kv")(keys)
        kv = jnp.broadcast_to(kv, (len(q), *kv.shape[1:]))
        fused = FusedAttention(self.compute, self.cfg.num_heads, name="attn")(q, kv)
        gate = self.param("gate", with_axes(nn.initializers.constant(0.1)), (), jnp.dtype(self.compute.param_dtype))
        return seg_embeds + gate.astype(fused.dtype) * fused
