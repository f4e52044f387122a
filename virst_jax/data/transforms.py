"""Frames and masks as the network takes them, in numpy and PIL.

Axes: T frames, H height, W width, S side of the network's square image, 3 RGB. Frames are uint8, channels last.
The video VLM and the tracker read frames resized by bicubic, the segmentation features (of the spatio-temporal
fusion) frames resized by bilinear interpolation; all are stretched to a square.
"""

import functools

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from virst_jax.config import PIXEL_MEAN, PIXEL_STD
from virst_jax.errors import UserError

MEAN = np.array(PIXEL_MEAN, np.float32)
STD = np.array(PIXEL_STD, np.float32)

RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def vlm_pixels(frames: ArrayLike, size: int = 448) -> np.ndarray:
    """Frames for the video encoder: bicubic, normalised.

    Follows model/videochat/vision_tower_builder.py, UMTImageProcessor.

    Args:
      frames: uint8[T, H, W, 3].
      size: S.

    Returns:
      float32[T, S, S, 3].

    Raises:
      UserError: `frames` is no such array, or `size` is below 1.
    """
    return normalize(resize_frames(frames, size, "bicubic"))


def sam_pixels(frames: ArrayLike, size: int = 1024, resample: str = "bicubic") -> np.ndarray:
    """Frames for the segmentation model's image encoder, normalised.

    'bilinear' follows data/transforms.py, SAM2Transform (segmentation features); 'bicubic' follows
    model/sam2/utils/misc.py, load_video_frames (tracking).

    Args:
      frames: uint8[T, H, W, 3].
      size: S.
      resample: 'bilinear' or 'bicubic'.

    Returns:
      float32[T, S, S, 3].

    Raises:
      UserError: `frames` is no such array, `size` is below 1 or `resample` is unknown.
    """
    return normalize(resize_frames(frames, size, resample))


def resize_frames(frames: ArrayLike, size: int, resample: str) -> np.ndarray:
    """Frames stretched to size x size by PIL: a quarter of the bytes of `sam_pixels`, to be normalised later.

    Args:
      frames: uint8[T, H, W, 3].
      size: S.
      resample: 'bilinear' or 'bicubic'.

    Returns:
      uint8[T, S, S, 3].

    Raises:
      UserError: `frames` is no such array, `size` is below 1 or `resample` is unknown.
    """
    frames = np.asarray(frames)
    check_frames(frames, size, resample)
    out = np.empty((len(frames), size, size, 3), np.uint8)
    for i, frame in enumerate(frames):
        out[i] = np.asarray(Image.fromarray(frame).resize((size, size), RESAMPLE[resample]))
    return out


@functools.lru_cache(maxsize=64)
def height_comes_first(height: int, width: int, size: int, resample: str) -> bool:
    """Whether Pillow resizes the height of frames before their width; it rounds to bytes behind each.

    Versions before 13 begin with the width, 13 begins with the height of many tall frames. So it is asked, with noise.
    """
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    method = RESAMPLE[resample]
    wide = noise.resize((size, height), method)
    return noise.resize((size, size), method).tobytes() != wide.resize((size, size), method).tobytes()


def check_frames(frames: np.ndarray, size: int, resample: str) -> None:
    """Refuses what `resize_frames` cannot resize.

    Raises:
      UserError: see there.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise UserError(
            f"frames must be a non-empty uint8 array [T, H, W, 3], not {frames.dtype}{list(frames.shape)}; "
            "convert them to 8-bit RGB"
        )
    _check_size(size)
    if resample not in RESAMPLE:
        raise UserError(f"unknown resampling {resample!r}: choose {' or '.join(RESAMPLE)}")


def normalize(pixels: np.ndarray) -> np.ndarray:
    """8-bit RGB scaled to 0..1, then to ImageNet's mean 0 and standard deviation 1.

    Args:
      pixels: uint8[..., 3].

    Returns:
      float32[..., 3].
    """
    x = pixels.astype(np.float32)
    x /= 255  # rounds as the release does for every byte; a float32 product with 1/255 does not
    x -= MEAN
    x /= STD
    return x


def masks_to_size(masks: ArrayLike, size: int) -> np.ndarray:
    """Masks stretched to size x size: bilinear, with antialiasing where it shrinks, set where above one half.

    Several objects of one expression are resized first and united after.
    Follows data/transforms.py, SAM2MaskTransform (torchvision's resize of an 8-bit tensor). It sums in float32,
    PIL in float64: pixels whose value is one half up to rounding may differ, which takes a noise-like mask that
    shrinks (less than 0.03 % of its pixels).

    Args:
      masks: bool or number [..., H, W], set where above 0.
      size: S.

    Returns:
      uint8[..., S, S] of 0 and 1.

    Raises:
      UserError: `masks` has fewer than two axes or no pixel, or `size` is below 1.
    """
    masks = np.asarray(masks)
    if masks.ndim < 2 or 0 in masks.shape[-2:]:
        raise UserError(f"masks must have shape [..., H, W] with pixels, not {list(masks.shape)}")
    _check_size(size)
    flat = (masks > 0).reshape(-1, *masks.shape[-2:])
    out = np.zeros((len(flat), size, size), np.uint8)
    for i, mask in enumerate(flat):
        if mask.any():
            image = Image.fromarray(mask.astype(np.float32))
            out[i] = np.rint(np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)))
    return out.reshape(*masks.shape[:-2], size, size)


def _check_size(size: int) -> None:
    if size < 1:
        raise UserError(f"the image size must be at least 1 pixel, not {size}")
