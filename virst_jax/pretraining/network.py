"""What the pretraining losses ask of the network: functions of a bound `Virst`.

`model.apply({"params": params}, *args, method=function)` calls them with the bound module as first argument.

Axes: B clips or conversations, P patches of a clip, N [SEG] tokens, V visual tokens, W words, T frames, H, W feature
grid, C fusion width, D width of the language model, S side of the video encoder's image.
"""

import math

import jax
import jax.numpy as jnp

from virst_jax.models.virst import Virst

COSINE_SCALE = 24.0  # of cosines that serve as logits


def unit(x: jax.Array) -> jax.Array:
    """Vectors [..., D] scaled to length 1."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-6)


def patch_logits(model: Virst, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits of the words that each patch shows, before patches are merged.

    A logit is the cosine of the projected patch and the word's embedding, times COSINE_SCALE.

    Args:
      pixels: normalised clips float[B, frames, S, S, 3].

    Returns:
      float32[B, P, vocab], and the projected patches float32[B, P, D].
    """
    patches = model.projector(model.vision(pixels), pixels.shape[1], merge=False).astype(jnp.float32)
    words = model.llm.embed_tokens.embedding.astype(jnp.float32)
    return COSINE_SCALE * unit(patches) @ unit(words).T, patches


def cell_logits(model: Virst, maps: jax.Array) -> jax.Array:
    """Logits of the words that each cell of the tracker's features dtype[..., C] shows: float32[..., vocab].

    A logit is the cosine of the cell and the second fusion's projection of the word's direction (see
    lm_head_directions), times COSINE_SCALE.
    """
    words = model.second_fusion.project(lm_head_directions(model)).astype(jnp.float32)
    return COSINE_SCALE * unit(maps.astype(jnp.float32)) @ unit(words).T


def lm_head_directions(model: Virst) -> jax.Array:
    """For each word, the hidden state of typical length for which the head gives it the largest logit: its row of the
    head, scaled. float32[vocab, D]."""
    rows = model.llm.lm_head.variables["params"]["kernel"].T.astype(jnp.float32)
    return math.sqrt(rows.shape[-1]) * unit(rows)  # normalised hidden states have this length


def prompts_of_words(model: Virst, words: jax.Array, maps: jax.Array) -> jax.Array:
    """Prompts dtype[B, N, T, C] of the second fusion, with words' directions as hidden states of [SEG].

    Args:
      words: int[B, N]; negative: a hidden state of zeros.
      maps: dtype[B or 1, T, H, W, C].
    """
    hidden = jnp.where((words >= 0)[..., None], lm_head_directions(model)[jnp.maximum(words, 0)], 0)
    return model.second_fusion(hidden, maps)[0]


def embed_words(model: Virst, words: jax.Array) -> jax.Array:
    """Visual tokens made of words: the sum of the words' embeddings over the root of their number.

    words: int[..., V, W], negative where there are fewer -> dtype[..., V, D].
    """
    given = words >= 0
    table = model.llm.embed(jnp.maximum(words, 0).reshape(1, -1)).reshape(*words.shape, -1)
    total = jnp.where(given[..., None], table, 0).sum(-2)
    return total / jnp.sqrt(jnp.maximum(given.sum(-1, keepdims=True), 1)).astype(total.dtype)
