"""The fused cross-entropy against optax's, differentiated by JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from virst_jax.ops import cross_entropy as module
from virst_jax.ops.cross_entropy import cross_entropy, piece_size

WIDTH, VOCABULARY, POSITIONS = 16, 37, 50
BOTH = (True, True)


def case(share: float = 0.4, seed: int = 0) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(seed)
    kernel, hidden = rng.standard_normal((WIDTH, VOCABULARY)), 2 * rng.standard_normal((POSITIONS, WIDTH))
    weight = rng.random(POSITIONS) * (rng.random(POSITIONS) < share)
    target = rng.integers(VOCABULARY, size=POSITIONS)
    return jnp.float32(kernel), jnp.float32(hidden), jnp.int32(target), jnp.float32(weight)


def plain(kernel: jax.Array, hidden: jax.Array, target: jax.Array, weight: jax.Array) -> jax.Array:
    return (weight * optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, target)).sum()


@pytest.mark.parametrize("budget", [2**26, 8 * VOCABULARY, 1])
def test_loss_and_gradients_are_those_of_the_plain_formula(budget, monkeypatch):
    """In one piece, in pieces of eight positions, and one position at a time."""
    monkeypatch.setattr(module, "BUDGET", budget)
    given = case()
    expected, gradients = jax.value_and_grad(plain, argnums=(0, 1))(*given)
    total, of_kernel, of_hidden = jax.jit(lambda *x: cross_entropy(*x, BOTH))(*given)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    np.testing.assert_allclose(of_kernel, gradients[0], atol=1e-5)
    np.testing.assert_allclose(of_hidden, gradients[1], atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_or_everything_counts(share):
    given = case(share)
    expected, gradients = jax.value_and_grad(plain, argnums=(0, 1))(*given)
    total, of_kernel, of_hidden = cross_entropy(*given, BOTH)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    np.testing.assert_allclose(of_kernel, gradients[0], atol=1e-5)
    np.testing.assert_allclose(of_hidden, gradients[1], atol=1e-6)
    assert bool(of_kernel.any()) == bool(share)


def test_positions_without_weight_are_not_looked_at():
    kernel, hidden, target, weight = case()
    spoilt = jnp.where(weight[:, None] > 0, hidden, jnp.nan)
    for one, two in zip(
        cross_entropy(kernel, hidden, target, weight, BOTH), cross_entropy(kernel, spoilt, target, weight, BOTH)
    ):
        np.testing.assert_array_equal(one, two)


def test_what_is_not_wanted_is_left_out():
    total, of_kernel, of_hidden = cross_entropy(*case(), (False, True))
    assert of_kernel is None
    assert of_hidden is not None
    assert float(total) == pytest.approx(float(cross_entropy(*case(), (False, False))[0]))


def test_narrow_kernels_sum_in_float32():
    kernel, hidden, target, weight = case()
    narrow = kernel.astype(jnp.bfloat16)
    total, of_kernel, of_hidden = cross_entropy(narrow, hidden.astype(jnp.bfloat16), target, weight, BOTH)
    expected, gradients = jax.value_and_grad(plain, argnums=(0, 1))(
        narrow.astype(jnp.float32), hidden.astype(jnp.bfloat16).astype(jnp.float32), target, weight
    )
    assert (total.dtype, of_kernel.dtype, of_hidden.dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    # what logits get as gradients is rounded to bfloat16, 8 bits
    np.testing.assert_allclose(of_kernel, gradients[0], atol=2**-8 * np.abs(gradients[0]).max())
    np.testing.assert_allclose(of_hidden, gradients[1], atol=2**-7 * np.abs(gradients[1]).max())


def test_sizes_of_pieces():
    assert piece_size(2000, 151_647) == 384
    assert piece_size(50, 151_647) == 50
    assert piece_size(0, 151_647) == 1
