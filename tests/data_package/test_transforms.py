"""Pixels and masks against the release's."""

import numpy as np
import pytest

from helpers.places import PARITY
from virst_jax.data import transforms
from virst_jax.errors import UserError


@pytest.fixture(scope="module")
def case():
    with np.load(PARITY / "transforms.npz") as arrays:
        return dict(arrays)


def channels_first(pixels, stride):
    return np.moveaxis(pixels, -1, 1)[:, :, ::stride, ::stride]


def test_vlm_pixels_are_those_of_the_release(case):
    pixels = transforms.vlm_pixels(case["video"], 448)
    assert pixels.shape == (2, 448, 448, 3)
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(channels_first(pixels, 8), case["vlm"])


def test_bilinear_sam_pixels_are_those_of_the_release(case):
    pixels = transforms.sam_pixels(case["video"], 1024, "bilinear")
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(channels_first(pixels, 16), case["sam_bilinear"])


def test_bicubic_sam_pixels_are_those_of_the_release(case):
    pixels = transforms.sam_pixels(case["video"][:1])
    assert pixels.shape == (1, 1024, 1024, 3)
    expected = np.moveaxis(case["sam_track_unnormalised"], 0, -1)
    expected = (expected - transforms.MEAN) / transforms.STD
    np.testing.assert_array_equal(pixels[0, ::16, ::16], expected)
    assert np.abs(pixels - transforms.sam_pixels(case["video"][:1], resample="bilinear")).max() > 0.02


def test_pixels_are_normalised_after_resizing(case):
    resized = transforms.resize_frames(case["video"], 64, "bicubic")
    assert resized.dtype == np.uint8
    np.testing.assert_array_equal(transforms.normalize(resized), transforms.vlm_pixels(case["video"], 64))
    grey = transforms.normalize(np.full((1, 1, 3), 255, np.uint8))
    np.testing.assert_allclose(grey[0, 0], [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225], rtol=1e-6)


@pytest.mark.parametrize(
    ("frames", "size", "resample", "says"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), 16, "bicubic", "uint8 array"),
        (np.zeros((8, 8, 3), np.uint8), 16, "bicubic", "uint8 array"),
        (np.zeros((2, 8, 8, 4), np.uint8), 16, "bicubic", "uint8 array"),
        (np.zeros((0, 8, 8, 3), np.uint8), 16, "bicubic", "uint8 array"),
        (np.zeros((2, 8, 8, 3), np.uint8), 0, "bicubic", "at least 1 pixel"),
        (np.zeros((2, 8, 8, 3), np.uint8), 16, "nearest", "unknown resampling 'nearest'"),
    ],
)
def test_bad_frames_are_refused(frames, size, resample, says):
    with pytest.raises(UserError, match=says):
        transforms.sam_pixels(frames, size, resample)


def test_masks_are_those_of_the_release(case):
    masks = transforms.masks_to_size(case["masks"], 1024)
    assert masks.shape == (2, 1024, 1024)
    assert masks.dtype == np.uint8
    expected = np.unpackbits(case["mask_1024"]).reshape(2, 256, 256)
    np.testing.assert_array_equal(masks[:, ::4, ::4], expected)


def test_masks_of_any_kind_and_rank(case):
    expected = transforms.masks_to_size(case["masks"], 32)
    assert 0 < expected.mean() < 1
    for masks in (case["masks"].astype(bool), 255 * case["masks"], case["masks"].astype(np.float32)):
        np.testing.assert_array_equal(transforms.masks_to_size(masks, 32), expected)
    np.testing.assert_array_equal(transforms.masks_to_size(case["masks"][None, :, None], 32), expected[None, :, None])
    np.testing.assert_array_equal(transforms.masks_to_size(case["masks"][0], 32), expected[0])


def test_bad_masks_are_refused():
    with pytest.raises(UserError, match=r"shape \[..., H, W\]"):
        transforms.masks_to_size(np.zeros(4), 8)
    with pytest.raises(UserError, match="with pixels"):
        transforms.masks_to_size(np.zeros((2, 0, 4)), 8)
    with pytest.raises(UserError, match="at least 1 pixel"):
        transforms.masks_to_size(np.zeros((2, 4, 4)), 0)


@pytest.mark.torch
@pytest.mark.parametrize("shape", [(37, 51), (240, 427), (540, 960), (130, 300)])
@pytest.mark.parametrize("size", [64, 256])
def test_masks_are_those_of_torch(shape, size):
    torch = pytest.importorskip("torch")
    height, width = shape
    y, x = np.mgrid[:height, :width]
    blob = ((y - 0.4 * height) / 0.3 / height) ** 2 + ((x - 0.6 * width) / 0.25 / width) ** 2 < 1
    mask = blob ^ (np.random.default_rng(0).random(shape) > 0.98)
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(mask[None, None].astype(np.float32)), size=(size, size), mode="bilinear", antialias=True
    )
    expected = torch.round(resized)[0, 0].numpy()
    differing = (transforms.masks_to_size(mask, size) != expected).mean()
    assert differing < 3e-4  # values of one half up to rounding
