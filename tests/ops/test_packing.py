"""ops.packing against plain indexing, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from virst_jax.ops.packing import Packing, pack, unpack

LENGTH = 12
PLACES = np.full((4, 5), -1, np.int32)  # rows of 3, 5 and 1 tokens, and one without
PLACES[0, :3], PLACES[1], PLACES[3, 0] = np.arange(3), 3 + np.arange(5), 8


def plain_unpack(x, packing):
    return jnp.where((packing.places >= 0)[..., None, None], x[packing.places], 0)


def plain_pack(x, packing):
    rows, columns = jnp.divmod(packing.origins, x.shape[1])
    return jnp.where((packing.origins >= 0)[:, None, None], x[rows, columns], 0)


def test_where_packed_tokens_come_from():
    origins = Packing.of(jnp.asarray(PLACES), LENGTH).origins
    assert origins.tolist() == [0, 1, 2, 5, 6, 7, 8, 9, 15, -1, -1, -1]


@pytest.mark.parametrize(
    ("ours", "theirs", "shape"), [(unpack, plain_unpack, (LENGTH, 2, 3)), (pack, plain_pack, (*PLACES.shape, 2, 3))]
)
def test_values_and_gradients(ours, theirs, shape):
    rng = np.random.default_rng(0)
    packing = Packing.of(jnp.asarray(PLACES), LENGTH)
    x = jnp.asarray(rng.normal(size=(2, *shape)), jnp.float32)
    given = jnp.asarray(rng.normal(size=theirs(x[0], packing).shape), jnp.float32)

    def each(function):
        return jax.vmap(lambda x: function(x, packing))

    np.testing.assert_array_equal(each(ours)(x), each(theirs)(x))
    gradient, expected = (jax.grad(lambda x, f=f: (each(f)(x) * given).sum())(x) for f in (ours, theirs))
    np.testing.assert_array_equal(gradient, expected)
    assert float(jnp.abs(gradient).sum()) > 1
    assert "scatter" not in str(jax.make_jaxpr(jax.grad(lambda x: (each(ours)(x) * given).sum()))(x))


def test_there_and_back():
    packing = Packing.of(jnp.asarray(PLACES), LENGTH)
    x = jnp.arange(LENGTH, dtype=jnp.float32)
    np.testing.assert_array_equal(pack(unpack(x, packing), packing), np.where(np.arange(LENGTH) < 9, x, 0))
