"""Random attention that begins as pretrained attention looks: like attends to like, and passes on what it is.

Source: Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers" (2023), here for grouped queries: the
products W_q W_k^T and W_v W_o of a head begin near multiples of the identity, since the two share their numbers.
"""

from typing import Any

import jax.numpy as jnp

from virst_jax.config import QwenConfig
from virst_jax.optim import flatten, unflatten

KEPT = 0.5  # of the random output projection


def mimic_attention(params: Any, cfg: QwenConfig) -> Any:
    """Parameters of a Virst with random ones in its language model -> the same with likened projections.

    A query head takes the kernel of the key head that it reads; an output projection gains its values' transposed.
    """
    flat = flatten(params)
    q, k, v, o = (f"llm/layers/attn/{name}_proj/kernel" for name in "qkvo")
    layers, width = flat[q].shape[:2]
    repeats = cfg.num_heads // cfg.num_kv_heads

    def by_query_head(kernel: Any) -> Any:
        return jnp.repeat(kernel.reshape(layers, width, cfg.num_kv_heads, cfg.head_dim), repeats, axis=2)

    flat[q] = by_query_head(flat[k]).reshape(flat[q].shape)
    flat[o] = KEPT * flat[o] + by_query_head(flat[v]).transpose(0, 2, 3, 1).reshape(flat[o].shape)
    return unflatten(flat)
