"""Images from files: the one place that decodes them, whatever is wrong said in one line with the file's name.

A header is checked before anything is decoded, so that a small file cannot ask for gigabytes. Nothing is clipped or cut
off in silence: 16-bit values are scaled, floats and animations are taken only where their meaning is known.

Axes: H height, W width, 3 RGB.
"""

import contextlib
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from virst_jax.errors import UserError
from virst_jax.io.atomic import reason
from virst_jax.io.regular import require_file

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
MAX_PIXELS = 89_478_485  # from here on Pillow warns; 9,459 x 9,459
ANIMATED = ("GIF", "PNG", "WEBP", "TIFF")  # formats whose further images are frames or pages, not previews
ORIENTATION = 0x0112  # EXIF's number of the tag
_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    OverflowError,
    NotImplementedError,
    EOFError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
    UnidentifiedImageError,
    Image.DecompressionBombError,
)  # what Pillow raises for damaged files

Source = str | Path | bytes


def read_image(source: Source, *, name: str = "", upright: bool = True, remedy: str = "copy it again") -> np.ndarray:
    """A still image, uint8[H, W, 3] (RGB).

    Grey and palette images become RGB, transparency is left out, 16-bit values and floats of 0 to 1 are scaled.

    Args:
      source: a path, or the contents of a file.
      name: what messages call it; the path by default.
      upright: turn it as its EXIF orientation says; data sets are read as they are stored.
      remedy: what messages advise for a damaged file.

    Raises:
      UserError: missing, no regular file, no image, truncated, too large, an animation, or values of unknown scale.
    """
    with opened(source, name=name, remedy=remedy) as image:
        _refuse_animation(image, _called(source, name))
        return to_rgb(decoded(source, image, name=name, remedy=remedy, upright=upright), _called(source, name))


def read_size(
    source: Source, *, name: str = "", upright: bool = True, remedy: str = "copy it again"
) -> tuple[int, int]:
    """Height and width of an image, from its header.

    Raises:
      UserError: missing, no regular file, no image, or too large.
    """
    with opened(source, name=name, remedy=remedy) as image:
        turned = upright and _orientation(image) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


def read_values(source: Source, *, name: str = "", remedy: str = "copy it again") -> tuple[np.ndarray, str]:
    """A still image's own values and Pillow's name of its mode: of a palette image the indices, no conversion.

    Returns:
      uint8, uint16, int32, float32 or bool [H, W] or [H, W, channels]; the mode ("P", "L", "RGBA", "I;16", ...).

    Raises:
      UserError: as `read_image`, but values of any scale are given.
    """
    with opened(source, name=name, remedy=remedy) as image:
        _refuse_animation(image, _called(source, name))
        mode = image.mode
        return np.array(decoded(source, image, name=name, remedy=remedy, upright=False)), mode


def num_frames(source: Source, *, name: str = "", remedy: str = "copy it again") -> int:
    """Frames of an image file: 1 of a still image, more of an animation or of a TIFF with pages.

    Raises:
      UserError: as `read_size`.
    """
    with opened(source, name=name, remedy=remedy) as image:
        return _num_frames(image)


@contextlib.contextmanager
def opened(source: Source, *, name: str = "", remedy: str = "copy it again") -> Iterator[Image.Image]:
    """An image whose header is read and whose size is within bounds; nothing is decoded yet.

    Raises:
      UserError: missing, no regular file, no image, or too large.
    """
    called = _called(source, name)
    content: Any = io.BytesIO(source) if isinstance(source, bytes) else Path(source)
    if isinstance(content, Path):
        require_file(content, f"check the path, or {remedy}")
    try:
        image = Image.open(content)
    except Image.DecompressionBombError as error:
        raise UserError(f"{called}: has more than {MAX_PIXELS:,} pixels; give a smaller image") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{called}: cannot be read as an image (unknown kind, or damaged); {remedy}") from error
    except _ERRORS as error:
        raise UserError(f"{called}: cannot be read as an image ({reason(error)}); {remedy}") from error
    with image:
        if image.width * image.height > MAX_PIXELS:
            raise UserError(
                f"{called}: {image.width}x{image.height} pixels, more than {MAX_PIXELS:,}; give a smaller image"
            )
        yield image


def decoded(
    source: Source, image: Image.Image, *, name: str = "", remedy: str = "copy it again", upright: bool = False
) -> Image.Image:
    """An opened image with its pixels read, turned upright if so asked.

    Raises:
      UserError: truncated or damaged.
    """
    try:
        image.load()
        return ImageOps.exif_transpose(image) if upright and _orientation(image) != 1 else image
    except _ERRORS as error:
        how = "truncated" if "truncated" in str(error) else "damaged"
        raise UserError(
            f"{_called(source, name)}: {how}, cannot be read as an image ({reason(error)}); {remedy}"
        ) from error


def to_rgb(image: Image.Image, name: str) -> np.ndarray:
    """A decoded image's colours, uint8[H, W, 3].

    Raises:
      UserError: its values have no known scale.
    """
    if image.mode.startswith("I;16"):
        return np.repeat(scaled_16_bit(np.asarray(image))[..., None], 3, axis=2)
    if image.mode == "I":
        values = np.asarray(image)
        low, high = int(values.min()), int(values.max())
        if image.format not in ("PNG", "PPM") or low < 0 or high > 65535:  # these two hold 16 bits at most
            raise UserError(
                f"{name}: integers of 32 bits ({low} to {high}), whose scale is not known; save it in 8 bits"
            )
        return np.repeat(scaled_16_bit(values)[..., None], 3, axis=2)
    if image.mode == "F":
        return np.repeat(scaled_floats(np.asarray(image), name)[..., None], 3, axis=2)
    try:
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except ValueError as error:
        raise UserError(f"{name}: an image of mode {image.mode} is not supported; save it as RGB in 8 bits") from error


def scaled_16_bit(values: np.ndarray) -> np.ndarray:
    """Values of 0 to 65535 as uint8, rounded."""
    return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def scaled_floats(values: np.ndarray, name: str) -> np.ndarray:
    """Values of 0 to 1 as uint8, rounded.

    Raises:
      UserError: values outside, or no numbers.
    """
    low, high = float(values.min()), float(values.max())
    if not (low >= 0.0 and high <= 1.0):  # NaN is neither
        raise UserError(f"{name}: floats of {low:g} to {high:g}; give floats of 0 to 1, or integers of 8 bits")
    return np.round(values * 255).astype(np.uint8)


def frames(path: Path, *, remedy: str = "copy it again") -> Iterator[tuple[np.ndarray, float]]:
    """The frames of an animation or the pages of a TIFF one after another, and how long each is shown, in seconds.

    Raises:
      UserError: as `read_image`, or the frames differ in size.
    """
    with opened(path, remedy=remedy) as image:
        size, hidden = image.size, int(_has_default(image))
        for index in range(_num_frames(image)):
            try:
                image.seek(index + hidden)
            except _ERRORS as error:
                raise UserError(f"{path}: damaged after frame {index} ({reason(error)}); {remedy}") from error
            if image.size != size:
                raise UserError(f"{path}: its pages differ in size; give frames of one size as files of their own")
            whole = decoded(path, image, name=f"{path} (frame {index})", remedy=remedy, upright=True)
            yield to_rgb(whole, str(path)), float(image.info.get("duration", 0) or 0) / 1000


def _refuse_animation(image: Image.Image, called: str) -> None:
    count = _num_frames(image)
    if count > 1:
        what = f"{count} pages" if image.format == "TIFF" else f"an animation of {count} frames"
        raise UserError(f"{called}: {what} where one image is expected; give it as a video, or save its frames apart")


def _num_frames(image: Image.Image) -> int:
    if image.format not in ANIMATED:
        return 1  # the second image of a camera's JPEG (MPO) is a preview or another eye's view
    try:
        count = int(getattr(image, "n_frames", 1))
        return max(1, count - int(_has_default(image)))
    except _ERRORS:
        return 1  # damaged behind the first: decoding tells


def _has_default(image: Image.Image) -> bool:
    """Whether an APNG begins with an image for programs that know no animations; Pillow counts it as a frame."""
    return image.format == "PNG" and bool(image.info.get("default_image"))


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":
        return 1  # Pillow turns these itself, size and pixels
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except _ERRORS:
        return 1  # a damaged EXIF block does not spoil the image


def _called(source: Source, name: str) -> str:
    return name or ("image" if isinstance(source, bytes) else str(source))
