"""Rounding to a narrow float type where a program says so, and nowhere else.

A compiler may leave out a conversion to bfloat16 between two operations that it fuses. `rounded` is never left out.
"""

import jax
import jax.numpy as jnp


def rounded(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Values of any float type rounded to the numbers of `dtype`, as dtype[...]."""
    info = jnp.finfo(dtype)
    if info.bits >= 32:
        return x.astype(dtype)
    return jax.lax.reduce_precision(x.astype(jnp.float32), info.nexp, info.nmant).astype(dtype)
