"""Products of few rows with a large matrix, as decoding a token at a time makes them."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from virst_jax.ops.platform import target_platform

ROWS = 8  # of a tile of a TPU's registers


def with_rows(product: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """The product of dtype[..., I] with a matrix, dtype[..., O]; on TPUs of at least ROWS rows, zeros behind the given.

    The compiler turns the product of a single row into multiplications and sums of the vector unit, which take two to
    three times as long as reading the matrix does. Eight rows go to the matrix unit, and take that time alone.
    """
    count = math.prod(x.shape[:-1])
    if target_platform() != "tpu" or count >= ROWS:
        return product(x)
    padded = jnp.pad(x.reshape(count, -1), ((0, ROWS - count), (0, 0)))
    y = product(jax.lax.optimization_barrier(padded))  # without it the compiler takes the zeros out again
    return y[:count].reshape(*x.shape[:-1], *y.shape[1:])
