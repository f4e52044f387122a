import jax
import jax.numpy as jnp
import numpy as np
import pytest

from virst_jax.ops.depthwise import shifted_depthwise


def convolution(x, kernel):
    return jax.lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
        precision="highest",
    )


@pytest.mark.parametrize(
    ("shape", "size"), [((2, 9, 7, 3), 7), ((1, 4, 4, 2), 3), ((1, 3, 5, 2), 5), ((2, 16, 5, 2), 7)]
)
def test_equals_xlas_convolution_with_its_gradients(shape, size):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((size, size, shape[-1])), jnp.float32)
    weight = jnp.asarray(rng.standard_normal(shape), jnp.float32)

    def value_and_gradients(function):
        return jax.value_and_grad(lambda x, k: (function(x, k) * weight).sum(), argnums=(0, 1))(x, kernel)

    ours, theirs = value_and_gradients(shifted_depthwise), value_and_gradients(convolution)
    np.testing.assert_allclose(shifted_depthwise(x, kernel), convolution(x, kernel), rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)
