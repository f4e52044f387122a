"""SAM's mask decoder: a two-way transformer between prompt tokens and image, then masks, scores, pointers.

Axes: B objects, N tokens, H, W feature grid, S = H*W, C width, M masks (1 + num_multimask), L mask side (4H).
Source: model/sam2/modeling/sam/{mask_decoder,transformer}.py.
"""

import dataclasses

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange

from virst_jax.config import Compute, Sam2Config
from virst_jax.models.layers import Mlp, default_init, dense, gelu, layer_norm, with_axes
from virst_jax.ops.attention import attention


@flax.struct.dataclass
class Masks:
    """Output of the decoder, or the part of it that was chosen."""

    logits: jax.Array  # float32[B, M, L, L]
    ious: jax.Array  # float32[B, M], predicted
    tokens: jax.Array  # dtype[B, M, C], source of object pointers
    object_score: jax.Array  # float32[B, 1], logit of the object being there


class Attention(nn.Module):
    """Multi-head attention between two sequences, optionally in a narrower space."""

    compute: Compute
    num_heads: int
    inner: int

    @nn.compact
    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, key_mask: jax.Array | None = None) -> jax.Array:
        projected = (
            dense(self.compute, self.inner, ("embed", "heads"), name=f"{name}_proj")(x)
            for name, x in (("q", q), ("k", k), ("v", v))
        )
        heads = (rearrange(x, "b n (h d) -> b n h d", h=self.num_heads) for x in projected)
        out = attention(*heads, key_mask=key_mask, impl=self.compute.attention)
        out = rearrange(out, "b n h d -> b n (h d)")
        return dense(self.compute, q.shape[-1], ("heads", "embed"), name="out_proj")(out)


class TwoWayBlock(nn.Module):
    cfg: Sam2Config
    compute: Compute
    first: bool  # the first block's self-attention takes no positions and no residual

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        image: jax.Array,
        token_pos: jax.Array,
        image_pos: jax.Array,
        token_mask: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        cfg, width = self.cfg, self.cfg.hidden_size
        attend = {
            name: Attention(self.compute, cfg.decoder_heads, inner, name=name)
            for name, inner in (
                ("self_attn", width),
                ("token_to_image", width // 2),
                ("image_to_token", width // 2),
            )
        }
        norm = [layer_norm(self.compute, name=f"norm{i}") for i in range(1, 5)]
        if self.first:
            tokens = attend["self_attn"](tokens, tokens, tokens, token_mask)
        else:
            q = tokens + token_pos
            tokens = tokens + attend["self_attn"](q, q, tokens, token_mask)
        tokens = norm[0](tokens)
        tokens = norm[1](tokens + attend["token_to_image"](tokens + token_pos, image + image_pos, image))
        mlp = Mlp(self.compute, (cfg.decoder_mlp_dim, width), nn.relu, name="mlp")
        tokens = norm[2](tokens + mlp(tokens))
        seen = attend["image_to_token"](image + image_pos, tokens + token_pos, tokens, token_mask)
        image = norm[3](image + seen)
        return tokens, image


class Upscale(nn.Module):
    """Transposed convolution with kernel and stride 2."""

    compute: Compute
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """dtype[B, H, W, C] -> dtype[B, 2H, 2W, features]"""
        dtype, param_dtype = jnp.dtype(self.compute.dtype), jnp.dtype(self.compute.param_dtype)
        init = with_axes(default_init, "conv_in", "kernel", "kernel", "conv_out")
        kernel = self.param("kernel", init, (x.shape[-1], 2, 2, self.features), param_dtype)
        bias = self.param("bias", with_axes(nn.initializers.zeros, "conv_out"), (self.features,), param_dtype)
        y = jnp.einsum("bhwc,cpqo->bhpwqo", x.astype(dtype), kernel.astype(dtype)) + bias.astype(dtype)
        return rearrange(y, "b h p w q o -> b (h p) (w q) o")


class MaskDecoder(nn.Module):
    cfg: Sam2Config
    compute: Compute

    def setup(self) -> None:
        cfg, compute, width = self.cfg, self.compute, self.cfg.hidden_size
        dtype = jnp.dtype(compute.param_dtype)
        init = with_axes(nn.initializers.normal(1.0), "token", "embed")
        masks = 1 + cfg.num_multimask
        self.iou_token = self.param("iou_token", init, (1, width), dtype)
        self.mask_tokens = self.param("mask_tokens", init, (masks, width), dtype)
        self.object_token = self.param("object_token", init, (1, width), dtype)
        self.blocks = [TwoWayBlock(cfg, compute, first=i == 0) for i in range(cfg.decoder_layers)]
        self.final_attn = Attention(compute, cfg.decoder_heads, width // 2)
        self.final_norm = layer_norm(compute)
        self.upscale0 = Upscale(compute, width // 4)
        self.upscale_norm = layer_norm(compute, 1e-6)
        self.upscale1 = Upscale(compute, width // 8)
        self.hyper_mlps = [Mlp(compute, (width, width, width // 8)) for _ in range(masks)]
        self.iou_head = Mlp(compute, (cfg.iou_head_dim, cfg.iou_head_dim, masks), sigmoid_output=True)
        self.object_head = Mlp(compute, (width, width, 1))

    def __call__(
        self,
        image: jax.Array,
        image_pos: jax.Array,
        sparse: jax.Array,
        dense_prompt: jax.Array,
        high_res: tuple[jax.Array, jax.Array],
        sparse_mask: jax.Array | None = None,
    ) -> Masks:
        """All masks of every object.

        Args:
          image: dtype[B, H, W, C], features conditioned on memory.
          image_pos: float32[H, W, C].
          sparse: dtype[B, N, C], prompt tokens.
          dense_prompt: dtype[B, H, W, C].
          high_res: dtype[B or 1, 4H, 4W, C/8] and dtype[B or 1, 2H, 2W, C/4].
          sparse_mask: bool[B, N], which prompt tokens exist; None: all. The others change nothing.
        """
        batch, height, _, width = image.shape
        dtype = jnp.dtype(self.compute.dtype)
        learned = jnp.concatenate([self.object_token, self.iou_token, self.mask_tokens]).astype(dtype)
        tokens = jnp.concatenate([jnp.broadcast_to(learned, (batch, *learned.shape)), sparse.astype(dtype)], axis=1)
        mask = None
        if sparse_mask is not None:
            mask = jnp.pad(sparse_mask, ((0, 0), (learned.shape[0], 0)), constant_values=True)
        source = rearrange(image + dense_prompt, "b h w c -> b (h w) c")
        source_pos = rearrange(image_pos, "h w c -> 1 (h w) c").astype(dtype)

        state = tokens
        for block in self.blocks:
            state, source = block(state, source, tokens, source_pos, mask)
        state = self.final_norm(state + self.final_attn(state + tokens, source + source_pos, source))

        source = rearrange(source, "b (h w) c -> b h w c", h=height)
        fine, finer = high_res[1], high_res[0]
        upscaled = gelu(self.upscale_norm(self.upscale0(source) + fine))
        upscaled = gelu(self.upscale1(upscaled) + finer)

        mask_tokens = state[:, 2 : 2 + len(self.hyper_mlps)]
        hyper = jnp.stack([mlp(mask_tokens[:, i]) for i, mlp in enumerate(self.hyper_mlps)], axis=1)
        logits = jnp.einsum("bmc,bhwc->bmhw", hyper, upscaled, preferred_element_type=jnp.float32)
        return Masks(
            logits=logits,
            ious=self.iou_head(state[:, 1]).astype(jnp.float32),
            tokens=mask_tokens,
            object_score=self.object_head(state[:, 0]).astype(jnp.float32),
        )


def multimask(masks: Masks) -> Masks:
    """The masks of an ambiguous prompt: all but the first."""
    return dataclasses.replace(masks, logits=masks.logits[:, 1:], ious=masks.ious[:, 1:], tokens=masks.tokens[:, 1:])


def best_mask(masks: Masks) -> Masks:
    """The one mask with the highest predicted IoU, and its token."""
    best = masks.ious.argmax(-1)[:, None]
    return dataclasses.replace(
        masks,
        logits=jnp.take_along_axis(masks.logits, best[..., None, None], 1),
        ious=jnp.take_along_axis(masks.ious, best, 1),
        tokens=jnp.take_along_axis(masks.tokens, best[..., None], 1),
    )


def single_mask(masks: Masks, cfg: Sam2Config | None = None) -> Masks:
    """The first mask. With `cfg`, an unstable one gives way to the best of the others, as at inference.

    Stable: the area above +delta is at least the threshold's share of that above -delta.
    """
    single = dataclasses.replace(masks, logits=masks.logits[:, :1], ious=masks.ious[:, :1], tokens=masks.tokens[:, :1])
    if cfg is None:
        return single
    inner = (single.logits > cfg.stability_delta).sum((-2, -1)).astype(jnp.float32)
    outer = (single.logits > -cfg.stability_delta).sum((-2, -1)).astype(jnp.float32)
    stable = jnp.where(outer > 0, inner / jnp.maximum(outer, 1), 1.0) >= cfg.stability_threshold
    best = best_mask(multimask(masks))
    # the token stays the single mask's: pointers were trained with it
    return dataclasses.replace(
        single,
        logits=jnp.where(stable[..., None, None], single.logits, best.logits),
        ious=jnp.where(stable, single.ious, best.ious),
    )
