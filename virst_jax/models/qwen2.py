"""Qwen2, the language model: a scanned stack of decoder layers, with adapters and a cache for decoding.

Axes: B batch, S tokens of a call, M slots of the cache, N layers, H query heads, G key and value heads, D width of
the residual stream, W width of a head.
Source: model/videochat/modeling_qwen2_flash.py; the same network as transformers' Qwen2ForCausalLM.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from virst_jax.config import FLOAT, Compute, QwenConfig
from virst_jax.errors import UserError
from virst_jax.models.layers import LAYER_INPUT, QuantizedDense, default_init, remat, with_axes
from virst_jax.models.lora import PROJECTED, LoraDense
from virst_jax.ops.attention import attention
from virst_jax.ops.constrain import constrain
from virst_jax.ops.few_rows import with_rows
from virst_jax.ops.packing import Packing, pack, unpack
from virst_jax.ops.platform import target_platform
from virst_jax.ops.rounding import rounded
from virst_jax.ops.whole import whole, whole_gradient


@flax.struct.dataclass
class Cache:
    """Keys and values of what was read so far; the slot of a token is its index in the sequence.

    k, v: dtype[N, B, M, G, W].
    mask: bool[B, M], the slots that hold a valid token.
    length: int32[B], the slot of each row's next token.
    empty: known when tracing; the first tokens attend to themselves alone.
    """

    k: jax.Array
    v: jax.Array
    mask: jax.Array
    length: jax.Array
    empty: bool = flax.struct.field(pytree_node=False, default=False)


def init_cache(cfg: QwenConfig, compute: Compute, batch: int, max_length: int) -> Cache:
    """An empty cache for `max_length` tokens a row, in compute.dtype."""
    shape = (cfg.num_layers, batch, max_length, cfg.num_kv_heads, cfg.head_dim)
    zeros = jnp.zeros(shape, jnp.dtype(compute.dtype))
    return Cache(zeros, zeros, jnp.zeros((batch, max_length), bool), jnp.zeros((batch,), jnp.int32), empty=True)


def rotary_table(positions: jax.Array, width: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, float32[..., width // 2], of the rotary embedding at int[...] positions."""
    frequencies = 1.0 / theta ** (np.arange(0, width, 2, dtype=np.float64) / width)
    angles = positions[..., None].astype(jnp.float32) * frequencies.astype(np.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rotate_halves(x: jax.Array, cos: jax.Array, sin: jax.Array, rounding: str = "late") -> jax.Array:
    """Rotates dtype[B, S, heads, W] by tables float32[B or 1, S, W // 2]: element i pairs with i + W // 2.

    In float32 and rounded once; as the release, with tables, products and sums rounded to dtype.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    if rounding == "release":

        def wide(y: jax.Array) -> jax.Array:
            return rounded(y, x.dtype).astype(jnp.float32)

        cos, sin = wide(cos), wide(sin)
        halves = [wide(first * cos) - wide(second * sin), wide(second * cos) + wide(first * sin)]
        return rounded(jnp.concatenate(halves, axis=-1), x.dtype)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class RmsNorm(nn.Module):
    compute: Compute
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """dtype[..., D] -> dtype[..., D], in float32 up to the learned scale."""
        dtype, param_dtype = jnp.dtype(self.compute.dtype), jnp.dtype(self.compute.param_dtype)
        scale = self.param("scale", with_axes(nn.initializers.ones, "norm"), (x.shape[-1],), param_dtype)
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        if self.compute.rounding == "release":
            return rounded(scale.astype(dtype).astype(y.dtype) * rounded(y, dtype).astype(y.dtype), dtype)
        return scale.astype(dtype) * y.astype(dtype)


class Attention(nn.Module):
    cfg: QwenConfig
    compute: Compute

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: tuple[jax.Array, jax.Array] | None,
        mask: jax.Array | None,
        rotary: tuple[jax.Array, jax.Array],
        slots: jax.Array | None,
        is_prefill: bool,
        deterministic: bool,
        prefix_len: int,
        packing: Packing | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """See Block; returns dtype[B, S, D] and the cache."""
        cfg = self.cfg
        project = functools.partial(LoraDense, self.compute, lora=cfg.lora, weights=cfg.weights)
        kv_width = cfg.num_kv_heads * cfg.head_dim
        q = project(cfg.num_heads * cfg.head_dim, ("embed", "heads"), name="q_proj")(x, deterministic)
        k = project(kv_width, ("embed", "kv_heads"), name="k_proj")(x, deterministic)
        v = project(kv_width, ("embed", "kv_heads"), name="v_proj")(x, deterministic)
        if cache is not None and target_platform() == "tpu":
            # few tokens: for layouts that suit what follows the compiler would transpose the kernels, in every call
            q, k, v = jax.lax.optimization_barrier((q, k, v))
        q, k, v = (rearrange(y, "b s (h w) -> b s h w", w=cfg.head_dim) for y in (q, k, v))
        q, k, v = (constrain(y, None, None, "heads", None) for y in (q, k, v))
        q, k = (rotate_halves(y, *rotary, self.compute.rounding) for y in (q, k))
        first = 0  # of x's positions among the keys
        if cache is not None and slots is None:
            first = cache[0].shape[1]
            ahead = (jnp.broadcast_to(y, (x.shape[0], *y.shape[1:])).astype(k.dtype) for y in cache)
            k, v = (jnp.concatenate(both, axis=1) for both in zip(ahead, (k, v)))
            cache = None
        elif cache is not None:
            rows = jnp.arange(x.shape[0])[:, None]
            # padding may lie behind the last slot
            cache = (
                cache[0].at[rows, slots].set(k.astype(cache[0].dtype), mode="drop"),
                cache[1].at[rows, slots].set(v.astype(cache[1].dtype), mode="drop"),
            )
            if not is_prefill:
                k, v = cache
        impl = "eager" if self.compute.rounding == "release" else self.compute.attention
        if prefix_len and mask is not None:
            out = _attend_behind(q, k, v, mask, prefix_len, packing, impl)
        else:
            positions = first + jnp.arange(x.shape[1])[None] if first else None if is_prefill else slots
            out = attention(q, k, v, key_mask=mask, causal=True, q_positions=positions, impl=impl)
        out = rearrange(out, "b s h w -> b s (h w)")
        out = project(cfg.hidden_size, ("heads", "embed"), use_bias=False, name="o_proj")(out, deterministic)
        return out, cache


class Mlp(nn.Module):
    cfg: QwenConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """dtype[B, S, D] -> dtype[B, S, D]"""
        cfg = self.cfg
        project = functools.partial(LoraDense, self.compute, lora=cfg.lora, use_bias=False, weights=cfg.weights)
        gate = project(cfg.intermediate_size, ("embed", "mlp"), name="gate_proj")(x, deterministic)
        up = project(cfg.intermediate_size, ("embed", "mlp"), name="up_proj")(x, deterministic)
        if not deterministic:  # the gradients of both come from exponentials
            gate, up = whole_gradient(gate), whole_gradient(up)
        if self.compute.rounding == "release":
            wide, dtype = jnp.promote_types(gate.dtype, jnp.float32), gate.dtype
            gate = rounded(nn.silu(gate.astype(wide)), dtype)
            product = rounded(gate.astype(wide) * up.astype(wide), dtype)
        else:
            product = nn.silu(gate) * up
        product = product if deterministic else whole(product)
        hidden = constrain(product, None, None, "hidden")
        return project(cfg.hidden_size, ("mlp", "embed"), name="down_proj")(hidden, deterministic)


class Block(nn.Module):
    cfg: QwenConfig
    compute: Compute

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: tuple[jax.Array, jax.Array] | None,
        mask: jax.Array | None,
        rotary: tuple[jax.Array, jax.Array],
        slots: jax.Array | None,
        is_prefill: bool,
        deterministic: bool,
        return_input: bool,
        prefix_len: int,
        packing: Packing | None,
    ) -> tuple[jax.Array, tuple[tuple[jax.Array, jax.Array] | None, jax.Array | None]]:
        """A decoder layer.

        Args:
          x: dtype[B, S, D].
          cache: this layer's keys and values, dtype[B, M, G, W] each; None: without.
          mask: bool[B, keys], the valid keys: of x itself when `is_prefill`, else of the cache.
          rotary: tables of x's positions.
          slots: int[B, S], where x goes in the cache; None: x stays behind it, and the cache may have one row for all.
          is_prefill: x attends to itself, not to the cache (there is none, or it is empty).
          prefix_len: 0, or as in Qwen2.after_prefix, where x and mask are described.
          packing: of what follows the prefix; None: each row has positions of its own.

        Returns:
          dtype[B, S, D]; the cache with x in it, and x if `return_input`.
        """
        x = checkpoint_name(constrain(x, None, None, "width"), LAYER_INPUT)
        norms = (RmsNorm(self.compute, self.cfg.rms_norm_eps, name=n) for n in ("input_norm", "post_norm"))
        # in training, the norms' gradients are not folded into the products whose results they take
        once: Callable[[jax.Array], jax.Array] = (lambda x: x) if deterministic else whole_gradient
        input_norm, post_norm = norms
        attended, cache = Attention(self.cfg, self.compute, name="attn")(
            once(input_norm(x)), cache, mask, rotary, slots, is_prefill, deterministic, prefix_len, packing
        )
        y = self._add(x, attended)
        y = self._add(y, Mlp(self.cfg, self.compute, name="mlp")(once(post_norm(y)), deterministic))
        return y, (cache, x if return_input else None)

    def _add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        if self.compute.rounding != "release":
            return x + y
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return rounded(x.astype(wide) + y.astype(wide), x.dtype)


class Qwen2(nn.Module):
    cfg: QwenConfig
    compute: Compute

    def setup(self) -> None:
        cfg, compute = self.cfg, self.compute
        dtype, param_dtype = jnp.dtype(compute.dtype), jnp.dtype(compute.param_dtype)
        self.embed_tokens = nn.Embed(
            cfg.vocab_size,
            cfg.hidden_size,
            dtype=dtype,
            param_dtype=param_dtype,
            embedding_init=with_axes(nn.initializers.normal(0.02), "vocab", "embed"),
        )
        broadcast = nn.broadcast
        layers: Any = nn.scan(
            remat(Block, compute.remat, (PROJECTED,), static_argnums=(6, 7, 8, 9)),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, *(broadcast,) * 8),
            length=cfg.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        self.layers = layers(cfg, compute)
        self.norm = RmsNorm(compute, cfg.rms_norm_eps)
        if cfg.weights != FLOAT:  # int4 would move the choice among so many tokens
            axes = ("embed", "vocab")
            quantized = QuantizedDense(compute, cfg.vocab_size, axes, "int8", use_bias=False, wide=True)
            self.lm_head: Any = quantized
            return
        accumulate: Callable[..., jax.Array] = functools.partial(
            jax.lax.dot_general, preferred_element_type=jnp.promote_types(dtype, jnp.float32)
        )
        self.lm_head = nn.Dense(
            cfg.vocab_size,
            use_bias=False,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=with_axes(default_init, "embed", "vocab"),
            dot_general=accumulate,
        )

    def embed(self, ids: jax.Array) -> jax.Array:
        """int[B, S] -> dtype[B, S, D]"""
        return constrain(self.embed_tokens(ids), None, None, "width")

    def logits(self, hidden: jax.Array) -> jax.Array:
        """dtype[..., D] -> float32[..., vocab]; rounded to dtype in between only as the release does it."""
        logits = with_rows(self.lm_head, hidden)
        if self.compute.rounding == "release":
            logits = rounded(logits, jnp.dtype(self.compute.dtype)).astype(logits.dtype)
        return constrain(logits, *(None,) * (logits.ndim - 1), "vocab")

    def __call__(
        self,
        embeds: jax.Array,
        mask: jax.Array | None,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
        deterministic: bool = True,
        return_layers: bool = False,
    ) -> Any:
        """Runs the layers.

        Args:
          embeds: dtype[B, S, D].
          mask: bool[B, S], the valid tokens; None: all. Rows are padded on the right.
          positions: int[B, S] for the rotary embedding; None: the index in the sequence.
          cache: what was read before. A row's tokens go behind those it has; its length then grows up to its last
            valid token, so padding is overwritten by the next call. Tokens past the last slot are dropped.
          deterministic: False: the adapters' dropout is on, and an rng "dropout" is needed.
          return_layers: also return each layer's input.

        Returns:
          Hidden states after the final norm, dtype[B, S, D]; behind it the new cache if one is given and the
          layers' inputs dtype[N, B, S, D] if asked for.

        Raises:
          UserError: more tokens than the cache has slots.
        """
        batch, num_tokens, _ = embeds.shape
        mask = None if mask is None else mask.astype(bool)
        slots, valid, kv = None, mask, None
        if cache is not None:
            num_slots = cache.mask.shape[1]
            if num_tokens > num_slots:
                raise UserError(
                    f"{num_tokens} tokens do not fit a cache of {num_slots}; make it with a larger max_length"
                )
            kv = (cache.k, cache.v)
            slots = cache.length[:, None] + jnp.arange(num_tokens)
            added = jnp.ones((batch, num_tokens), bool) if mask is None else mask
            in_cache = cache.mask.at[jnp.arange(batch)[:, None], slots].set(added, mode="drop")
            if not cache.empty:
                valid = in_cache
            count = jnp.max(jnp.where(added, jnp.arange(1, num_tokens + 1), 0), axis=1)
        if positions is None:
            positions = jnp.arange(num_tokens)[None] if slots is None else slots
        rotary = rotary_table(positions, self.cfg.head_dim, self.cfg.rope_theta)
        is_prefill = cache is None or cache.empty
        x = embeds.astype(jnp.dtype(self.compute.dtype))
        x, (kv, inputs) = self.layers(x, kv, valid, rotary, slots, is_prefill, deterministic, return_layers, 0, None)
        hidden = self.norm(constrain(x, None, None, "width"))
        if self.is_initializing():  # `init` through this method makes all parameters
            self.logits(self.embed(jnp.zeros((1, 1), jnp.int32)))
        result: tuple[Any, ...] = (hidden,)
        if cache is not None:
            result += (Cache(kv[0], kv[1], in_cache, cache.length + count.astype(jnp.int32)),)
        if return_layers:
            result += (inputs,)
        return result if len(result) > 1 else hidden

    def after_cache(
        self, embeds: jax.Array, mask: jax.Array, cache: Cache, return_layers: bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        """Runs the layers on rows that all go on where the one row of a cache ends, and keeps nothing of them.

        Args:
          embeds: dtype[B, S, D].
          mask: bool[B, S], the valid tokens, padded on the right.
          cache: of one row, which is not copied for the others.
          return_layers: also return each layer's input.

        Returns:
          Hidden states after the final norm, dtype[B, S, D], and the layers' inputs dtype[N, B, S, D] if asked for.
        """
        known = jnp.broadcast_to(cache.mask, (len(mask), cache.mask.shape[1]))
        valid = jnp.concatenate([known, mask.astype(bool)], axis=1)
        positions = cache.length[:, None] + jnp.arange(embeds.shape[1])
        rotary = rotary_table(positions, self.cfg.head_dim, self.cfg.rope_theta)
        x = embeds.astype(jnp.dtype(self.compute.dtype))
        x, (_, inputs) = self.layers(x, (cache.k, cache.v), valid, rotary, None, False, True, return_layers, 0, None)
        return self.norm(constrain(x, None, None, "width")), inputs

    def after_prefix(
        self,
        prefix: jax.Array,
        rest: jax.Array,
        mask: jax.Array,
        deterministic: bool = True,
        places: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Runs the layers on rows with a common prefix, which goes through them once.

        All positions stand in one row, those of the prefix first, so that the layers' products are large.

        Args:
          prefix: dtype[1, P, D], without padding.
          rest: dtype[B, R, D], what follows in each row; packed: dtype[1, Q, D].
          mask: bool[B, R], the valid tokens, padded on the right.
          places: int32[B, R], where in the packed row each row's tokens stand, -1: there is none; None: rest is not
            packed. Only attention takes the rows apart.

        Returns:
          Hidden states after the final norm, dtype[1, P, D] and as rest.
        """
        prefix_len, (rows, length), width = prefix.shape[1], mask.shape, prefix.shape[2]
        packing = None if places is None else Packing.of(places, rest.shape[1])
        own = jnp.tile(jnp.arange(length), rows) if packing is None else jnp.maximum(packing.origins, 0) % length
        positions = jnp.concatenate([jnp.arange(prefix_len), prefix_len + own])
        rotary = rotary_table(positions[None], self.cfg.head_dim, self.cfg.rope_theta)
        x = jnp.concatenate([prefix, rest.reshape(1, -1, width)], axis=1).astype(jnp.dtype(self.compute.dtype))
        x, _ = self.layers(x, None, mask.astype(bool), rotary, None, True, deterministic, False, prefix_len, packing)
        hidden = self.norm(constrain(x, None, None, "width"))
        return hidden[:, :prefix_len], hidden[:, prefix_len:].reshape(rest.shape)


def _attend_behind(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, prefix_len: int, packing: Packing | None, impl: str
) -> jax.Array:
    """Causal attention of Qwen2.after_prefix: dtype[1, P + B * R or P + Q, heads, W] of queries, keys and values."""
    rows, length = mask.shape
    out = attention(*(x[:, :prefix_len] for x in (q, k, v)), causal=True, impl=impl)
    if packing is None:
        own = [x[:, prefix_len:].reshape(rows, length, *x.shape[2:]) for x in (q, k, v)]
    else:
        own = [unpack(x[0, prefix_len:], packing) for x in (q, k, v)]
    keys, values = (
        jnp.concatenate([jnp.broadcast_to(x[:, :prefix_len], (rows, prefix_len, *x.shape[2:])), y], axis=1)
        for x, y in zip((k, v), own[1:])
    )
    rest = attention(
        own[0],
        keys,
        values,
        key_mask=jnp.concatenate([jnp.ones((rows, prefix_len), bool), mask], axis=1),
        causal=True,
        q_positions=prefix_len + jnp.arange(length)[None],
        impl=impl,
    )
    rest = rest.reshape(1, -1, *rest.shape[2:]) if packing is None else pack(rest, packing)[None]
    return jnp.concatenate([out, rest], axis=1)
