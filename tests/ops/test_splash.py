"""The attention kernel of TPUs, interpreted: its blocks, its gradient, and what is kept for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.kernels import kernels
from virst_jax.ops import splash
from virst_jax.ops.attention import attention

KEYS = 5000  # eight blocks of 640


@pytest.mark.parametrize(("length", "block"), [(100, 128), (1088, 384), (3136, 640), (4096, 512), (36936, 640)])
def test_blocks_of_the_kernel(length: int, block: int) -> None:
    assert splash._block(length) == block


@pytest.mark.parametrize(("length", "block", "keys"), [(128, 128, 128), (5120, 640, 1280), (640 * 7, 640, 640)])
def test_blocks_of_its_gradient_divide_the_keys(length: int, block: int, keys: int) -> None:
    assert splash._gradient_block(length, block) == keys


def loss(impl: str, mask: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.sin(attention(q, k, v, key_mask=mask, impl=impl)).sum()


def arrays() -> tuple[jax.Array, list[jax.Array]]:
    rng = np.random.default_rng(0)
    shapes = ((2, 130, 1, 16), (2, KEYS, 1, 16), (2, KEYS, 1, 8))
    return jnp.asarray(rng.random((2, KEYS)) < 0.7), [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]


def test_the_gradient_of_queries_is_summed_over_blocks_of_keys() -> None:
    mask, (q, k, v) = arrays()
    found, expected = (
        jax.jit(jax.grad(functools.partial(loss, impl, mask), (0, 1, 2)))(q, k, v) for impl in ("splash", "plain")
    )
    for one, other in zip(found, expected):
        np.testing.assert_allclose(one, other, atol=2e-5 * np.abs(other).max())


@pytest.mark.parametrize(("kept", "forward"), [(None, 2), (splash.RESIDUALS, 1)])
def test_what_is_kept_is_not_computed_again(kept: str | None, forward: int) -> None:
    mask, (q, k, v) = arrays()
    policy = None if kept is None else jax.checkpoint_policies.save_only_these_names(kept)
    again = jax.checkpoint(lambda *x: loss("splash", mask, *x), policy=policy)
    names = kernels(jax.make_jaxpr(jax.value_and_grad(again, (0, 1, 2)))(q, k, v).jaxpr)
    assert sum("fwd" in name for name in names) == forward
    assert sum("dkv" in name for name in names) == 1 == len(names) - forward
