"""Text from the language model: one prefill, then one token at a time from the cache.

Axes: B batch, S tokens of the prompt, D width, V vocabulary, N new tokens.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from virst_jax.errors import UserError
from virst_jax.models.qwen2 import Cache, Qwen2, init_cache
from virst_jax.types import Params


def generate(
    model: Qwen2,
    params: Params,
    embeds: jax.Array,
    mask: jax.Array,
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    rng: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Continues prompts until every row has ended or `max_new_tokens` are there.

    A call compiles once for each shape, `max_new_tokens`, `eos_ids`, `top_k`, and kind of choice.

    Args:
      params: the model's parameters (without the key "params").
      embeds: dtype[B, S, D], prompts padded on the right.
      mask: bool[B, S], their valid tokens; at least one a row.
      max_new_tokens: N.
      eos_ids: tokens that end a row; none: no row ends.
      temperature: 0: the most probable token each time; above: logits are divided by it and a token is drawn.
      top_k: draw among the k most probable tokens only.
      top_p: draw among the fewest most probable tokens whose probabilities sum to at least top_p.
      rng: a jax.random key, for drawing. What row b draws does not depend on the other rows.

    Returns:
      tokens int32[B, N], behind a row's end filled with the first of `eos_ids`; lengths int32[B], with the
      token that ended the row.

    Raises:
      UserError: an argument is out of range, drawing without `rng`, or a prompt without tokens.
    """
    if max_new_tokens < 1:
        raise UserError(f"generate: max_new_tokens is {max_new_tokens}; give at least 1")
    if temperature < 0:
        raise UserError(f"generate: temperature is {temperature}; give 0 (most probable token) or more")
    if top_k is not None and top_k < 1:
        raise UserError(f"generate: top_k is {top_k}; give at least 1, or leave it out")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"generate: top_p is {top_p}; give a number above 0 and up to 1, or leave it out")
    if temperature > 0 and rng is None:
        raise UserError("generate: drawing tokens (temperature above 0) needs rng; give a jax.random key")
    known = not isinstance(mask, jax.core.Tracer) and getattr(mask, "is_fully_addressable", True)
    if known and not np.asarray(mask).any(axis=1).all():
        raise UserError("generate: the mask of a row is all False; give every row at least one token")
    sampling = None
    if temperature > 0:
        sampling = _Sampling(rng, jnp.float32(temperature), None if top_p is None else jnp.float32(top_p))
    return _generate(model, params, embeds, mask, sampling, max_new_tokens, tuple(eos_ids), top_k)


class _Sampling(NamedTuple):
    rng: Any
    temperature: jax.Array  # float32[]
    top_p: jax.Array | None  # float32[]


class _State(NamedTuple):
    step: jax.Array  # int32[], tokens chosen so far
    tokens: jax.Array  # int32[B, N]
    lengths: jax.Array  # int32[B]
    last: jax.Array  # int32[B], the newest token
    done: jax.Array  # bool[B]
    cache: Cache


@functools.partial(jax.jit, static_argnums=(0, 5, 6, 7))
def _generate(
    model: Qwen2,
    params: Params,
    embeds: jax.Array,
    mask: jax.Array,
    sampling: _Sampling | None,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    top_k: int | None,
) -> tuple[jax.Array, jax.Array]:
    run: Any = functools.partial(model.apply, {"params": params})
    batch, prompt_length, _ = embeds.shape

    def choose(hidden: jax.Array, step: jax.Array | int) -> jax.Array:
        """dtype[B, D] -> int32[B]"""
        logits = run(hidden, method=Qwen2.logits)
        if sampling is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = filter_logits(logits / sampling.temperature, top_k, sampling.top_p)
        key = jax.random.fold_in(sampling.rng, step)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)

    def ends(token: jax.Array) -> jax.Array:
        return jnp.isin(token, jnp.array(eos_ids, jnp.int32)) if eos_ids else jnp.zeros_like(token, bool)

    def unfinished(state: _State) -> jax.Array:
        return (state.step < max_new_tokens) & ~state.done.all()

    def advance(state: _State) -> _State:
        embedded = run(state.last[:, None], method=Qwen2.embed)
        # a finished row adds nothing to its cache
        hidden, cache = run(embedded, ~state.done[:, None], cache=state.cache)
        token = choose(hidden[:, 0], state.step)
        return _State(
            state.step + 1,
            state.tokens.at[:, state.step].set(jnp.where(state.done, state.tokens[:, state.step], token)),
            state.lengths + ~state.done,
            token,
            state.done | ends(token),
            cache,
        )

    cache = init_cache(model.cfg, model.compute, batch, prompt_length + max_new_tokens)
    hidden, cache = run(embeds, mask, cache=cache)
    first = choose(hidden[jnp.arange(batch), jnp.maximum(cache.length - 1, 0)], 0)
    tokens = jnp.full((batch, max_new_tokens), eos_ids[0] if eos_ids else 0, jnp.int32).at[:, 0].set(first)
    state = _State(jnp.int32(1), tokens, jnp.ones(batch, jnp.int32), first, ends(first), cache)
    state = jax.lax.while_loop(unfinished, advance, state)
    return state.tokens, state.lengths


def filter_logits(logits: jax.Array, top_k: int | None, top_p: jax.Array | float | None) -> jax.Array:
    """float32[B, V] with -inf for the tokens that top_k, then top_p, leave out; ties with the last one stay."""
    if top_k is not None:
        smallest = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if top_p is not None:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # the most probable token always stays: nothing comes before it
        smallest = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return logits
