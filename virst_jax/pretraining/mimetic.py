"""Random attention weights with the structure of pretrained ones: queries match similar keys, values pass through.

Source: Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers" (2023), here for grouped queries: the
products W_q W_k^T and W_v W_o of a head begin near multiples of the identity, because both factors share their numbers.
"""

import flax.traverse_util
import jax
import jax.numpy as jnp

from virst_jax.config import VirstConfig
from virst_jax.types import PyTree

KEPT = 0.5  # factor of the random output projections
QUIET = 0.2  # factor of the second fusion's residual branches, so that prompts begin as projected hidden states
# equal query and key biases of the memory attention: rotary embeddings then give nearby places the largest logits
NEARBY = 3.0
# factor of queries and keys of the video encoder: a patch's content is small beside its position embedding
SHARPER = 2.0


def mimic_attention(params: PyTree, cfg: VirstConfig) -> PyTree:
    """Mimetic initialisation of random parameters of a Virst.

    In language model, video encoder and mask decoder, a query head takes the kernel of its key head, and an output
    projection adds the transposed kernel of its values. The residual branches of the second fusion are scaled down, and
    memory attention prefers nearby places.
    """
    flat, llm = flax.traverse_util.flatten_dict(params, sep="/"), cfg.llm
    q, k, v, o = (f"llm/layers/attn/{name}_proj/kernel" for name in "qkvo")
    layers, width = flat[q].shape[:2]
    repeats = llm.num_heads // llm.num_kv_heads

    def by_query_head(kernel: jax.Array) -> jax.Array:
        return jnp.repeat(kernel.reshape(layers, width, llm.num_kv_heads, llm.head_dim), repeats, axis=2)

    flat[q] = by_query_head(flat[k]).reshape(flat[q].shape)
    flat[o] = KEPT * flat[o] + by_query_head(flat[v]).transpose(0, 2, 3, 1).reshape(flat[o].shape)
    qkv, out = "vision/layers/attn/qkv/kernel", "vision/layers/attn/proj/kernel"
    _, keys, values = jnp.moveaxis(flat[qkv], 2, 0)
    flat[qkv] = jnp.stack([SHARPER * keys, SHARPER * keys, values], axis=2)
    flat[out] = KEPT * flat[out] + values.swapaxes(1, 2)
    for path in [path for path in flat if path.startswith("sam2/mask_decoder/") and path.endswith("/q_proj/kernel")]:
        q, k, v, o = (path.replace("q_proj", f"{name}_proj") for name in ("q", "k", "v", "out"))
        flat[q] = flat[k]
        flat[o] = KEPT * flat[o] + flat[v].T
    for path in [path for path in flat if path.startswith("second_fusion/layer")]:
        if path.endswith(("/o_proj/kernel", "/out_proj/kernel", "/fc2/kernel")):
            flat[path] = QUIET * flat[path]
    for name in "qk":
        flat[f"sam2/memory_attention/layers/cross_attn/{name}_proj/bias"] += NEARBY
    return flax.traverse_util.unflatten_dict(flat, sep="/")
