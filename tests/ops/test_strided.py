"""ops.strided against XLA's convolution, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from virst_jax.ops.strided import folded_convolution, strided_convolution


def plain(x, kernel, stride, padding):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), ((padding, padding),) * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.parametrize(
    ("height", "width", "size", "stride", "padding"),
    [(16, 12, 3, 2, 1), (15, 9, 3, 2, 1), (8, 8, 2, 2, 0), (12, 16, 4, 4, 0), (11, 10, 4, 3, 2)],
)
def test_strided_convolution(height, width, size, stride, padding):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, height, width, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(size, size, 3, 5)), jnp.float32)
    given = rng.normal(size=plain(x, kernel, stride, padding).shape).astype(np.float32)

    def loss(f):
        return lambda x, kernel: (f(x, kernel, stride, padding) * given).sum()

    np.testing.assert_array_equal(strided_convolution(x, kernel, stride, padding), plain(x, kernel, stride, padding))
    ours = jax.grad(loss(strided_convolution), (0, 1))(x, kernel)
    for mine, theirs in zip(ours, jax.grad(loss(plain), (0, 1))(x, kernel), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5 * float(jnp.abs(theirs).max()))


@pytest.mark.parametrize(
    ("height", "width", "size", "stride", "padding"),
    [(32, 28, 7, 4, 3), (15, 9, 3, 2, 1), (8, 12, 4, 4, 0), (11, 10, 4, 3, 2)],
)
def test_folded_convolution(height, width, size, stride, padding):
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(2, height, width, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(size, size, 3, 5)), jnp.float32)
    theirs = plain(x, kernel, stride, padding)
    ours = folded_convolution(x, kernel, stride, padding)
    np.testing.assert_allclose(ours, theirs, atol=1e-6 * float(jnp.abs(theirs).max()))


def test_each_image_of_vmap_has_its_own_gradient():
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(4, 1, 8, 8, 2)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 2, 3)), jnp.float32)

    def gradient(f):
        return jax.vmap(jax.grad(lambda kernel, x: (f(x, kernel, 2, 1) ** 2).sum()), (None, 0))(kernel, x)

    theirs = gradient(plain)
    np.testing.assert_allclose(gradient(strided_convolution), theirs, atol=1e-5 * float(jnp.abs(theirs).max()))
