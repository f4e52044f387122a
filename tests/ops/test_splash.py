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
    assert splash.block_length(length) == block


@pytest.mark.parametrize(("length", "block", "keys"), [(128, 128, 128), (5120, 640, 1280), (640 * 7, 640, 640)])
def test_blocks_of_its_gradient_divide_the_keys(length: int, block: int, keys: int) -> None:
    assert splash.gradient_block_length(length, block) == keys


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


def broken_where_unseen(mask: jax.Array, x: jax.Array) -> jax.Array:
    """Not a number in the gradient's blocks of keys that no row sees: a kernel that reads them cannot hide it."""
    unseen = jnp.repeat(~splash.blocks_seen(jnp.pad(mask, ((0, 0), (0, 5120 - KEYS))), 1280), 1280)[:KEYS]
    return jnp.where(unseen[None, :, None, None], jnp.nan, x)


@pytest.mark.parametrize("seen", [[(700, 1000)], [(0, 600), (3000, 4000)], [(1900, 1930), (4990, 5000)], []])
@pytest.mark.parametrize("videos", [False, True], ids=["one video", "several videos"])
def test_blocks_that_no_row_sees_are_passed_over(seen: list[tuple[int, int]], videos: bool) -> None:
    _, (q, k, v) = arrays()
    mask = jnp.zeros((2, KEYS), bool)
    for i, (start, stop) in enumerate(seen):
        mask = mask.at[i % 2 :, start:stop].set(True)  # the first row sees fewer, the second all

    def gradients(impl: str, mask: jax.Array, *x: jax.Array) -> list[jax.Array]:
        def outcome(*x: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = attention(*x, key_mask=mask, impl=impl)
            return jnp.sin(out).sum(), out

        (_, out), found = jax.value_and_grad(outcome, (0, 1, 2), has_aux=True)(*x)
        return [out, *found]

    broken = [q, broken_where_unseen(mask, k), broken_where_unseen(mask, v)]
    masks, given, whole = [mask], [broken], [[q, k, v]]
    if videos:  # the blocks of one are not those of the other
        masks.append(jnp.roll(mask, 2000, axis=1))
        given.append([q, *(broken_where_unseen(masks[1], x) for x in (k, v))])
        whole.append([q, k, v])
    stacked = [jnp.stack(x) for x in zip(*given)]
    found = jax.jit(jax.vmap(functools.partial(gradients, "splash")))(jnp.stack(masks), *stacked)
    for i, (mask, x) in enumerate(zip(masks, whole)):
        for one, other in zip(found, jax.jit(functools.partial(gradients, "plain"))(mask, *x)):
            np.testing.assert_allclose(one[i], other, atol=2e-5 * max(1e-9, float(np.abs(other).max())))
