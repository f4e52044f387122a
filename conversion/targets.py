"""What recording and replaying training share. Needs no JAX."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

KEPT = 4096  # values of a tensor, at most


def thinned(tensor: np.ndarray, kept: int = KEPT) -> np.ndarray:
    """At most `kept` values of a tensor, evenly spaced in row-major order."""
    flat = tensor.reshape(-1)
    return np.ascontiguousarray(flat[:: max(1, -(-flat.size // kept))])


def ellipse_masks(ellipse: Mapping[str, Any], count: int, size: int) -> np.ndarray:
    """A drifting ellipse, absent on some frames, bool[count, size, size].

    ellipse: pairs of y and x in pixels, center, velocity (a frame) and radii; absent, numbers of frames.
    """
    (y0, x0), (dy, dx), (height, width) = (ellipse[key] for key in ("center", "velocity", "radii"))
    y, x = np.mgrid[:size, :size]
    masks = [((y - y0 - dy * t) / height) ** 2 + ((x - x0 - dx * t) / width) ** 2 < 1 for t in range(count)]
    return np.stack([mask & (t not in ellipse["absent"]) for t, mask in enumerate(masks)])


def scaled_ellipse(ellipse: Mapping[str, Any], height: int, width: int) -> dict[str, Any]:
    """An ellipse in shares of height and width, in pixels."""
    pixels = {key: [ellipse[key][0] * height, ellipse[key][1] * width] for key in ("center", "velocity", "radii")}
    return {**ellipse, **pixels}


def ellipse_mask(numbers: Sequence[int], height: int, width: int) -> np.ndarray:
    """bool[H, W]: centre y and x, radii in y and x; with a radius of 0 it is empty."""
    y0, x0, ry, rx = numbers
    y, x = np.mgrid[:height, :width]
    return ((y - y0) / max(ry, 1)) ** 2 + ((x - x0) / max(rx, 1)) ** 2 < min(ry, rx, 1)
