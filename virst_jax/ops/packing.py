"""Rows of different lengths that stand one behind the other in one row, and apart again.

Each is a gather whose gradient is the other, because no two tokens share a place. XLA's own gradient of a gather is a
scatter, which TPUs compute one row after another.

Axes: O rows of R positions each, Q positions of the packed row.
"""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Packing:
    """Where tokens stand in the packed row, and where those of the packed row come from."""

    places: jax.Array  # int32[O, R], positions of the packed row, all different; -1: no token
    origins: jax.Array  # int32[Q], o * R + r of the token that stands here; -1: none

    @classmethod
    def of(cls, places: jax.Array, length: int) -> "Packing":
        """The packing into a row of `length` positions, Q."""
        # compared with each other, not scattered: a few hundred thousand bits, once for all layers
        found = jnp.arange(length)[:, None] == places.reshape(-1)
        return cls(places, jnp.where(found.any(1), found.argmax(1), -1).astype(jnp.int32))


def pack(x: jax.Array, packing: Packing) -> jax.Array:
    """dtype[O, R, ...] -> dtype[Q, ...]; zeros where no token stands."""
    return _picked(x.reshape(-1, *x.shape[2:]), packing.origins, packing.places.reshape(-1))


def unpack(x: jax.Array, packing: Packing) -> jax.Array:
    """dtype[Q, ...] -> dtype[O, R, ...]; zeros where there is no token."""
    picked = _picked(x, packing.places.reshape(-1), packing.origins)
    return picked.reshape(*packing.places.shape, *x.shape[1:])


@jax.custom_vjp
def _picked(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """Rows of dtype[n, ...] at int32[m], zeros where it is negative: dtype[m, ...].

    inverse: int32[n], where in `index` each row of x stands; negative: nowhere.
    """
    picked = jnp.take(x, jnp.maximum(index, 0), axis=0, mode="clip")
    return jnp.where((index >= 0).reshape(-1, *(1,) * (x.ndim - 1)), picked, 0)


_picked.defvjp(
    lambda x, index, inverse: (_picked(x, index, inverse), (index, inverse)),
    lambda kept, gradient: (_picked(gradient, kept[1], kept[0]), None, None),
)
