"""Dropout from sixteen random bits a number."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p

from virst_jax.ops.whole import whole

DRAWS = 2**16  # a number is kept with a probability of so many parts
PIECES = 4  # numbers that one pass of the generator decides: it gives 64 bits


def keep_mask(rng: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """bool[shape], each true with a probability of 1 - `rate`, rounded to a multiple of 2^-16.

    `jax.random.bernoulli` spends a pass of the generator, and half of its bits, on every number. In training with
    adapters, a TPU spent a sixth of its products' time on it, by the compiler's estimates.

    Args:
      rng: a jax.random key.
      rate: share of the numbers that is dropped, in [0, 1).
    """
    limit = round((1 - rate) * DRAWS)
    if not shape or jax.random.key_impl(rng) != "threefry2x32":
        return jax.random.bits(rng, shape, jnp.uint16).astype(jnp.uint32) < limit
    *rows, width = shape
    piece = -(-width // PIECES)
    first, second = jax.random.key_data(rng)
    row = jax.lax.broadcasted_iota(jnp.uint32, (math.prod(rows), piece), 0)
    column = jax.lax.broadcasted_iota(jnp.uint32, (math.prod(rows), piece), 1)
    # the compiler would run the generator again for each of the pieces
    words = whole(tuple(threefry2x32_p.bind(first, second, row, column)))
    halves = [half for word in words for half in (word >> 16, word & (DRAWS - 1))]
    mask = jnp.concatenate([half < limit for half in halves], axis=1)[:, :width]
    return whole(mask.reshape(shape))  # and put them together again in each operation that reads the mask


def hardware_key(rng: jax.Array) -> jax.Array:
    """A key of the generator that accelerators have in hardware, drawn from a jax.random key.

    Its bits depend on how their array is split over devices, and on the kind of device.
    """
    return jax.random.wrap_key_data(jax.random.bits(rng, (4,), jnp.uint32), impl="rbg")


def drop(x: jax.Array, rate: float, rng: jax.Array) -> jax.Array:
    """`x` with a share of its numbers set to zero; the others are divided by what is left of one.

    Args:
      x: dtype[...].
      rate: see `keep_mask`; at 1 nothing is left.
    """
    if rate == 0:
        return x
    if rate == 1:
        return jnp.zeros_like(x)
    return jnp.where(keep_mask(rng, rate, x.shape), x / (1 - rate), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def drop_relu(x: jax.Array, rate: float, rng: jax.Array | None) -> jax.Array:
    """`drop` of what is positive in `x`, whose gradient is read from its result alone.

    What is left is where the result is not zero. The gradients of the two, one by one, take a mask each. A TPU's
    compiler packs these masks into bytes, and by its estimates that takes longer than the products beside it.

    Args:
      x: dtype[...].
      rate: see `drop`.
      rng: a jax.random key; None: `rate` is 0.
    """
    x = jax.nn.relu(x)
    return x if rng is None else drop(x, rate, rng)


def _drop_relu(x: jax.Array, rate: float, rng: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    out = whole(drop_relu(x, rate, rng))  # the compiler would make masks of what it was made from
    return out, out


def _drop_relu_gradient(rate: float, out: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None]:
    left = gradient / (1 - rate) if rate < 1 else gradient
    return jnp.where(out > 0, left, 0).astype(out.dtype), None


drop_relu.defvjp(_drop_relu, _drop_relu_gradient)
