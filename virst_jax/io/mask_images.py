"""Masks and label maps stored as images: which values of a PNG mean what.

Programs write masks as 0 and 255, as 0 and 1, as the colour of a palette, in 16 bits, or into the alpha channel. An
image whose meaning cannot be told is refused; none is read as empty for want of a value that was looked for.

Axes: H height, W width, C channels.
"""

from pathlib import Path

import numpy as np

from virst_jax.errors import UserError
from virst_jax.io.images import read_values

MASK_ADVICE = "a mask has 0 and 255, or 0 and 1"


def read_labels(source: str | Path | bytes, *, name: str = "", remedy: str = "copy it again") -> np.ndarray:
    """A label map (palette or grey image): int32[H, W], a palette's indices and not its colours.

    Raises:
      UserError: it is missing, truncated, or in colour.
    """
    called = name or str(source)
    values, mode = read_values(source, name=name, remedy=remedy)
    values = _without_alpha(values, mode, called)
    if values.ndim == 3:
        if (values != values[..., :1]).any():
            raise UserError(f"{called}: an image in colour; labels need a palette or a grey image")
        values = values[..., 0]
    if values.dtype.kind == "f":
        raise UserError(f"{called}: an image of floats; labels need a palette or a grey image")
    return values.astype(np.int32)


def read_binary(source: str | Path | bytes, *, name: str = "", remedy: str = "copy it again") -> np.ndarray:
    """A mask: bool[H, W]. Edges that are smoothed, as in JPEG files, are cut at one half.

    Raises:
      UserError: it is missing or truncated, or its values are not those of a mask.
    """
    called = name or str(source)
    values, mode = read_values(source, name=name, remedy=remedy)
    if mode == "P":
        return values != 0
    values = _without_alpha(values, mode, called)
    if values.ndim == 3:
        values = values.max(axis=2)  # any colour on black
    if values.dtype == bool:
        return values
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise UserError(f"{called}: holds values that are no numbers; {MASK_ADVICE}")
    low, high = float(values.min()), float(values.max())
    two = bool(((values == low) | (values == high)).all())
    if two and (low == 0 or low == high):
        return values != 0  # nothing and one other value, whatever it is
    if high < 128:
        what = f"{low:g} and {high:g}" if two else f"several values up to {high:g}"
        raise UserError(f"{called}: holds {what}, as if it showed several objects; {MASK_ADVICE}")
    return values > high / 2


def read_index(source: str | Path | bytes, *, name: str = "", remedy: str = "copy it again") -> np.ndarray:
    """An image's values, of a palette its indices: integers [H, W]; of one in colour its brightest channel.

    Raises:
      UserError: it is missing, damaged, or of floats.
    """
    called = name or str(source)
    values, mode = read_values(source, name=name, remedy=remedy)
    values = _without_alpha(values, mode, called)
    if values.ndim == 3:
        values = values.max(axis=2)
    if values.dtype.kind == "f":
        raise UserError(f"{called}: an image of floats; {MASK_ADVICE}")
    return values.astype(np.uint8) if values.dtype == bool else values


def _without_alpha(values: np.ndarray, mode: str, called: str) -> np.ndarray:
    """Values [H, W] or [H, W, C] without an alpha channel: its own values, where nothing else varies."""
    if mode not in ("LA", "RGBA", "La", "RGBa", "PA"):
        if values.ndim == 3 and mode != "RGB":
            raise UserError(f"{called}: an image of mode {mode}; masks and labels are grey, RGB or palette images")
        return values
    colors, alpha = values[..., :-1], values[..., -1]
    if (alpha == alpha.flat[0]).all():
        return colors[..., 0] if colors.shape[-1] == 1 else colors
    seen = colors[alpha > 0]
    if (seen == seen[0]).all():
        return alpha  # one colour on nothing
    raise UserError(f"{called}: both its colours and its alpha channel vary; save the mask as a grey image")
