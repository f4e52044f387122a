import jax
import numpy as np
import pytest

from virst_jax.data.transforms import height_comes_first, resize_frames
from virst_jax.ops.position import axial_angles, rotate_pairs, sinusoid_table, spacetime_angles
from virst_jax.ops.resize import byte_matrix, resize_bytes, resize_maps, resize_matrix


@pytest.mark.torch
@pytest.mark.parametrize("size", [(5, 9), (16, 16), (3, 40), (7, 11)])
@pytest.mark.parametrize("method", ["bilinear", "bicubic", "antialias"])
def test_equals_torch(size, method):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).standard_normal((2, 3, 7, 11)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(x),
        size=size,
        mode="bicubic" if method == "bicubic" else "bilinear",
        align_corners=False,
        antialias=method == "antialias",
    )
    np.testing.assert_allclose(resize_maps(x, size, method), theirs.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["bilinear", "bicubic", "antialias"])
def test_keeps_constants_and_size(method):
    np.testing.assert_allclose(resize_matrix(7, 19, method).sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(resize_matrix(8, 8, method), np.eye(8), atol=1e-6)


def test_unknown_method_raises():
    with pytest.raises(ValueError, match="choose bilinear, bicubic or antialias"):
        resize_matrix(3, 4, "area")
    with pytest.raises(ValueError, match="choose bilinear or bicubic"):
        byte_matrix(3, 4, "antialias", 3)


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(200, 50), (50, 200)])
def test_bytes_are_those_of_pillow(size, method):
    """Whichever axis its version begins with: half of the bytes of this noise differ between the two."""
    side = 40
    frame = np.random.default_rng(0).choice([0, 255], (*size, 3)).astype(np.uint8)  # the cubic filter overshoots
    rows, columns = (byte_matrix(n, side, method, n) for n in size)
    both = [np.asarray(resize_bytes(frame, rows, columns, first)) for first in (False, True)]
    assert (both[0] != both[1]).mean() > 0.1
    found = both[height_comes_first(*size, side, method)]
    np.testing.assert_array_equal(found, resize_frames(frame[None], side, method)[0])


def test_rotation_depends_on_the_distance_alone():
    x = np.random.default_rng(0).standard_normal((2, 1, 8)).astype(np.float32)
    angles = axial_angles(1, 6, 8, 10000.0)

    def product(a: int, b: int) -> np.ndarray:
        q, k = (rotate_pairs(x[i : i + 1], angles[n : n + 1]) for i, n in ((0, a), (1, b)))
        return np.asarray((q * k).sum())

    np.testing.assert_allclose(product(1, 3), product(3, 5), rtol=1e-5)
    assert abs(product(1, 3) - product(1, 4)) > 1e-3


def test_unrotated_channels():
    angles = spacetime_angles(3, 2, 32)  # 5 pairs an axis, the last pair is free
    assert angles.shape == (12, 16)
    assert not angles[:, 15].any()
    assert not spacetime_angles(3, 1, 32)[:, 5:].any()


@pytest.mark.torch
def test_interpolates_the_position_table_as_torch_does():
    torch = pytest.importorskip("torch")
    plain = sinusoid_table(14, 4, 8)
    cube = torch.from_numpy(plain).reshape(4, 14, 14, 8).permute(0, 3, 1, 2)
    wide = torch.nn.functional.interpolate(cube, size=(20, 20), mode="bicubic", align_corners=False)
    np.testing.assert_allclose(
        sinusoid_table(20, 4, 8), wide.permute(0, 2, 3, 1).reshape(-1, 8).numpy(), rtol=1e-5, atol=1e-5
    )
    lines = wide.permute(2, 3, 1, 0).reshape(-1, 8, 4)
    longer = torch.nn.functional.interpolate(lines, size=6, mode="linear").reshape(20, 20, 8, 6).permute(3, 0, 1, 2)
    np.testing.assert_allclose(sinusoid_table(20, 6, 8), longer.reshape(-1, 8).numpy(), rtol=1e-5, atol=1e-5)


def test_rotations_keep_dtype_and_gradient():
    angles = axial_angles(2, 2, 8, 10000.0)
    x = np.ones((1, 4, 1, 8), np.float32)
    assert rotate_pairs(jax.numpy.asarray(x, "bfloat16"), angles).dtype == "bfloat16"
    gradient = jax.grad(lambda x: (rotate_pairs(x, angles) ** 2).sum())(x)
    np.testing.assert_allclose(gradient, 2 * x, rtol=1e-5)  # a rotation keeps lengths
