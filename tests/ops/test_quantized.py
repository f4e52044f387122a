"""Kernels as integers with scales, and products of few rows."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from virst_jax.errors import UserError
from virst_jax.ops import few_rows, quantized

SHAPES = [((), (256, 24)), ((3,), (96, 3, 16)), ((2,), (37, 5))]


def kernel(lead, shape) -> np.ndarray:
    w = np.random.default_rng(len(shape)).standard_normal((*lead, *shape)).astype(np.float32)
    w[..., 0] = 0  # an output channel without weights
    w[..., 1] *= 1e4
    return w


@pytest.mark.parametrize(("lead", "shape"), SHAPES)
@pytest.mark.parametrize("kind", quantized.DTYPES)
def test_rounding_is_by_half_a_scale_at_most(kind, lead, shape):
    w = kernel(lead, shape)
    values, scale = quantized.quantize(w, kind, len(lead))
    stored, scales = quantized.stored_shapes(shape, kind)
    assert (values.dtype, scale.dtype) == (quantized.DTYPES[kind], np.float32)
    assert (values.shape, scale.shape) == ((*lead, *stored), (*lead, *scales))
    assert abs(values.astype(np.int8)).max() == quantized.LARGEST[kind]
    back = quantized.dequantize(values, scale, len(lead))
    assert back.shape == w.shape
    assert not back[..., 0].any()
    rows = shape[0] // (1 if kind == "int8" else scales[0])
    steps = np.repeat(np.expand_dims(scale, len(lead)) if kind == "int8" else scale, rows, axis=len(lead))
    # the quotient and the product round in float32
    assert (abs(back - w) <= steps * (0.5 + 2**-15)).all()
    again = quantized.quantize(back, kind, len(lead))
    np.testing.assert_array_equal(again[0], values)


def test_groups_are_as_large_as_may_be():
    assert [quantized.num_groups(n) for n in (128, 3584, 18944, 96, 130, 131)] == [1, 28, 148, 1, 2, 131]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", quantized.DTYPES)
def test_product_is_that_of_the_dequantized_kernel(kind, dtype):
    w = kernel((), (256, 24))
    values, scale = quantized.quantize(w, kind)
    x = np.random.default_rng(1).standard_normal((2, 5, 256)).astype(np.float32).astype(dtype)
    found = quantized.Quantized(jnp.asarray(values), jnp.asarray(scale)).product(jnp.asarray(x))
    assert found.dtype == jnp.float32
    back = quantized.dequantize(values, scale).astype(np.float64)
    expected = x.astype(np.float64) @ back
    # int4's kernel is rounded to dtype once it is scaled; all else is exact up to float32's sums of 256 terms
    error = (2**-9 if kind == "int4" and dtype == "bfloat16" else 0) + 256 * 2**-24
    assert (abs(found - expected) <= error * (abs(x.astype(np.float64)) @ abs(back))).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_of_a_frozen_product(dtype):
    values, scale = (jnp.asarray(x) for x in quantized.quantize(kernel((), (256, 24)), "int8"))
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((2, 5, 256)), dtype)
    y, gradient = jax.vjp(lambda x: quantized.frozen_product(x, values, scale), x)
    of_result = jnp.asarray(rng.standard_normal(y.shape), dtype)
    (of_x,) = gradient(of_result)
    assert (y.dtype, of_x.dtype) == (x.dtype, x.dtype)
    back = quantized.dequantize(np.asarray(values), np.asarray(scale)).astype(np.float64)
    error = (
        2**-7 if dtype == "bfloat16" else 256 * 2**-24
    )  # results, and operands of the gradient, are rounded to dtype
    wide_x, wide_y = np.asarray(x, np.float64), np.asarray(of_result, np.float64)
    assert (abs(np.asarray(y, np.float64) - wide_x @ back) <= error * (abs(wide_x) @ abs(back))).all()
    assert (abs(np.asarray(of_x, np.float64) - wide_y @ back.T) <= error * (abs(wide_y) @ abs(back.T))).all()


def test_kernels_side_by_side():
    values, scale = map(jnp.asarray, quantized.quantize(kernel((), (96, 3, 16)), "int4"))
    x = jnp.ones((2, 96))
    whole = quantized.Quantized(values, scale)
    for i in range(3):
        np.testing.assert_allclose(whole.outputs(i).product(x), whole.product(x)[:, i], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(bad):
    w = kernel((), (256, 24))
    w[3, 5] = bad
    with pytest.raises(UserError, match="llm/kernel: holds values that are not finite"):
        quantized.quantize(w.astype(ml_dtypes.bfloat16), "int8", where="llm/kernel")


@pytest.mark.parametrize("leading", [(1, 1), (2, 3), (9,)])
def test_rows_are_added_for_tpus_and_taken_away(monkeypatch, leading):
    x, w = jnp.asarray(kernel((), (*leading, 16))), jnp.asarray(kernel((), (16, 4)))
    seen = []

    def product(rows):
        seen.append(rows.shape)
        return rows @ w

    plain = few_rows.with_rows(product, x)
    monkeypatch.setattr(few_rows, "target_platform", lambda: "tpu")
    np.testing.assert_allclose(few_rows.with_rows(product, x), plain, rtol=1e-6)
    assert seen == [(*leading, 16), (9, 16) if leading == (9,) else (few_rows.ROWS, 16)]
