"""Arrays that are made once: they change nothing but what the compiler may fold."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.kernels import equations
from helpers.qwen2 import SMALL, prompt, random_params
from virst_jax.config import Compute
from virst_jax.models.qwen2 import Qwen2
from virst_jax.ops.whole import whole, whole_gradient


def barriers(function: Callable[..., object], *arguments: object) -> int:
    program = jax.make_jaxpr(function)(*arguments).jaxpr
    return sum(e.primitive.name == "optimization_barrier" for e in equations(program))


@pytest.mark.parametrize(("made", "forward"), [(whole, 1), (whole_gradient, 0)])
def test_values_and_gradients_stay(made: Callable[[jax.Array], jax.Array], forward: int) -> None:
    x = jnp.linspace(-2, 2, 7)

    def plain(x: jax.Array) -> jax.Array:
        return jnp.sin(jnp.square(x)).sum()

    def function(x: jax.Array) -> jax.Array:
        return jnp.sin(made(jnp.square(x))).sum()

    np.testing.assert_array_equal(jax.jit(function)(x), jax.jit(plain)(x))
    np.testing.assert_allclose(jax.jit(jax.grad(function))(x), jax.grad(plain)(x), rtol=1e-6)
    rows = jnp.stack([x, 2 * x])
    np.testing.assert_allclose(jax.vmap(jax.grad(function))(rows), jax.vmap(jax.grad(plain))(rows), rtol=1e-6)
    assert barriers(function, x) == forward
    assert barriers(jax.grad(function), x) == forward + 1


def test_only_training_keeps_products_apart() -> None:
    model, params = Qwen2(SMALL, Compute()), random_params(SMALL)
    embeds, mask = prompt(SMALL, (5,), 5)

    def run(deterministic: bool) -> Callable[..., object]:
        return lambda params: model.apply({"params": params}, embeds, mask, deterministic=deterministic)

    assert barriers(run(True), params) == 0
    assert barriers(run(False), params) > 0
