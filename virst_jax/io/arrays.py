"""Videos and images that Python users have in memory, in whatever layout and type, as uint8[T, H, W, 3].

Axes: T frames, H height, W width, C channels.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from virst_jax.errors import UserError
from virst_jax.io import images

CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
EXPECTED = (
    "an array [T, H, W, 3] (also [T, 3, H, W], grey [T, H, W] or RGBA) of integers of 0 to 255 or floats of 0 to 1"
)


def video(frames: object) -> np.ndarray:
    """Frames uint8[T, H, W, 3] of an array or tensor.

    Raises:
      UserError: another number of axes or channels, or values of unknown scale.
    """
    array = _array(frames)
    if array.ndim == 3 and array.shape[-1] in (3, 4):
        raise UserError(f"a video must be {EXPECTED}, not one image {_named(array)}; add an axis for its frames")
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or (array.shape[-1] not in CHANNELS and array.shape[1] not in CHANNELS):
        raise UserError(f"a video must be a file, a folder of frames or {EXPECTED}, not {_named(array)}")
    if array.shape[-1] not in CHANNELS:
        array = np.moveaxis(array, 1, -1)
    if 0 in array.shape:
        raise UserError(f"the video is empty: an array of shape {list(array.shape)}; give at least one frame")
    return _rgb(_bytes(array, "the video"))


def to_image(image: object) -> np.ndarray:
    """One image uint8[H, W, 3] of an array, tensor or PIL image.

    Raises:
      UserError: another number of axes or channels, or values of unknown scale.
    """
    if isinstance(image, Image.Image):
        return images.to_rgb(images.decoded(b"", image, name="the image", upright=True), "the image")
    array = _array(image)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim == 3 and array.shape[-1] not in CHANNELS and array.shape[0] in CHANNELS:
        array = np.moveaxis(array, 0, -1)
    if array.ndim != 3 or array.shape[-1] not in CHANNELS:
        wanted = "a file or an array [H, W, 3] (also [3, H, W], grey, RGBA)"
        raise UserError(f"an image must be {wanted}, not {_named(array)}")
    if 0 in array.shape:
        raise UserError(f"the image is empty: an array of shape {list(array.shape)}")
    return _rgb(_bytes(array, "the image"))


def stack(frames: Sequence[object]) -> np.ndarray:
    """Frames uint8[T, H, W, 3] of single ones: arrays, tensors, PIL images or paths of images.

    Raises:
      UserError: none, frames that differ in size, or what `to_image` refuses.
    """
    if not frames:
        raise UserError("the video is empty: a list without frames; give at least one")
    whole = [images.read_image(f) if isinstance(f, (str, Path)) else to_image(f) for f in frames]
    for number, frame in enumerate(whole):
        if frame.shape != whole[0].shape:
            have, want = frame.shape[1::-1], whole[0].shape[1::-1]
            raise UserError(
                f"frame {number} of the list has {have[0]}x{have[1]} pixels where the first has {want[0]}x{want[1]}; "
                "give frames of one size"
            )
    return np.stack(whole)


def is_image(value: object) -> bool:
    """Whether this is a PIL image, which is iterable in no useful way."""
    return isinstance(value, Image.Image)


def _array(value: object) -> np.ndarray:
    if hasattr(value, "detach"):  # a tensor of PyTorch, which may belong to a graph or a device
        value = value.detach().cpu()
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"a {type(value).__name__} cannot be read as an array ({images.reason(error)})") from error
    if array.dtype.kind not in "uif" and array.dtype.name != "bfloat16":
        raise UserError(f"an array of {array.dtype} cannot be read as images; give {EXPECTED}")
    return array


def _bytes(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.uint16:
        if array.max() <= 255:
            raise UserError(
                f"{name}: uint16 of 0 to {array.max()} may be 8 or 16 bits; give uint8, or floats of 0 to 1"
            )
        return images.scaled_16_bit(array)
    if array.dtype.kind in "ui":
        low, high = int(array.min()), int(array.max())
        if low < 0 or high > 255:
            raise UserError(f"{name}: {array.dtype} of {low} to {high} have no known scale; give integers of 0 to 255")
        return array.astype(np.uint8)
    return images.scaled_floats(array.astype(np.float32, copy=False), name)


def _rgb(array: np.ndarray) -> np.ndarray:
    if array.shape[-1] == 1:
        return np.repeat(array, 3, axis=-1)
    return array[..., :3]


def _named(array: np.ndarray) -> str:
    return f"{array.dtype}{list(array.shape)}"
