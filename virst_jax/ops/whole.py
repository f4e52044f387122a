"""Arrays that the compiler makes once, and does not fold into each operation that reads them.

A TPU computes what it has folded into a product's operand again for every tile of the product's result. For the
activations of an MLP, with their exponentials, that takes as long as the product.
"""

from typing import TypeVar

import jax

T = TypeVar("T")


@jax.custom_vjp
def whole(x: T) -> T:
    """An array, or a tree of arrays, that is made once, and whose gradient is made once."""
    return jax.lax.optimization_barrier(x)


@jax.custom_vjp
def whole_gradient(x: T) -> T:
    """An array, or a tree of arrays, whose gradient is made once."""
    return x


def _gradient(_: None, gradient: T) -> tuple[T]:
    return (jax.lax.optimization_barrier(gradient),)


whole.defvjp(lambda x: (jax.lax.optimization_barrier(x), None), _gradient)
whole_gradient.defvjp(lambda x: (x, None), _gradient)
