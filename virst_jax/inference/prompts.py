"""What a person points at, checked: clicks, boxes and masks in pixels of the video.

Axes: P clicks, H, W size of the video, R side of the tracker's image.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from virst_jax.errors import UserError
from virst_jax.models.sam2.prompt_encoder import BOX_CORNERS
from virst_jax.models.sam2.prompted import PromptTokens
from virst_jax.ops.resize import resize_matrix

FOREGROUND, BACKGROUND = 1, 0  # labels of clicks
FEWEST_SLOTS = 4  # clicks are padded to this number, or to the next power of two


@dataclass(frozen=True, eq=False)
class Clicks:
    """Clicks on one frame, and the box that may come before them."""

    coords: np.ndarray  # float32[P, 2], (x, y) in pixels of the video
    labels: np.ndarray  # int32[P], 1 foreground, 0 background
    box: np.ndarray | None = None  # float32[4], (x0, y0, x1, y1)

    @property
    def count(self) -> int:
        """Points that the network reads; a box is two."""
        return len(self.coords) + (2 if self.box is not None else 0)

    def after(self, earlier: "Clicks") -> "Clicks":
        """These clicks behind earlier ones."""
        coords, labels = (np.concatenate([getattr(x, name) for x in (earlier, self)]) for name in ("coords", "labels"))
        return dataclasses.replace(earlier, coords=coords, labels=labels)

    def tokens(self, size: tuple[int, int], side: int) -> PromptTokens:
        """As the network reads them, in pixels of its image, padded to a bucket."""
        corners = np.zeros((0, 2), np.float32) if self.box is None else self.box.reshape(2, 2)
        coords = np.concatenate([corners, self.coords])
        labels = np.concatenate([np.array(BOX_CORNERS[: len(corners)], np.int32), self.labels])
        slots = max(FEWEST_SLOTS, 1 << (len(coords) - 1).bit_length())
        padding = slots - len(coords)
        scaled = coords / np.array([size[1], size[0]], np.float32) * np.float32(side)
        return PromptTokens(
            jnp.asarray(np.pad(scaled, ((0, padding), (0, 0)))[None]),
            jnp.asarray(np.pad(labels, (0, padding))[None]),
            jnp.asarray([len(coords)], jnp.int32),
        )


@dataclass(frozen=True, eq=False)
class GivenMask:
    """The mask of an object on one frame."""

    mask: np.ndarray  # bool[H, W]


@dataclass(frozen=True)
class Sentence:
    """An anchor that a sentence has set."""

    text: str


Prompt = Clicks | GivenMask | Sentence


def check_clicks(
    size: tuple[int, int],
    points: Sequence[Sequence[float]] | np.ndarray | None,
    labels: Sequence[int] | np.ndarray | None,
    box: Sequence[float] | np.ndarray | None,
) -> Clicks:
    """Clicks and a box that lie within a video of this height and width.

    Args:
      points: number[P, 2], (x, y) in pixels.
      labels: 1 (or True) on the object, 0 beside it; None: all on it.
      box: (x0, y0, x1, y1) in pixels.

    Raises:
      UserError: neither points nor box, other shapes or labels, or something outside of the frame.
    """
    if points is None and box is None:
        raise UserError("no prompt was given: give points, a box or a mask")
    coords = _numbers([] if points is None else points, "points", "a list of (x, y)")
    if coords.size == 0:
        coords = coords.reshape(0, 2)
    if coords.ndim == 1 and coords.shape == (2,):
        coords = coords[None]
    if coords.ndim != 2 or coords.shape[1] != 2:
        raise UserError(f"points have the shape {list(coords.shape)}; give a list of (x, y)")
    if not len(coords) and box is None:
        raise UserError("no point was given: give one at least, or a box")
    for x, y in coords:
        if not (0 <= x < size[1] and 0 <= y < size[0]):
            raise UserError(
                f"the point ({x:g}, {y:g}) lies outside of the frame of {size[1]}x{size[0]} pixels; "
                "points are (x, y), counted from 0 at the top left"
            )
    return Clicks(coords, _labels(labels, len(coords)), None if box is None else _box(size, box))


def _numbers(given: Any, name: str, wanted: str) -> np.ndarray:
    try:
        array = np.asarray(given, np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} are {str(given)[:60]}; give {wanted}") from error
    if not np.isfinite(array).all():
        raise UserError(f"{name} are {str(given)[:60]}; give finite numbers")
    return array


def _labels(labels: Sequence[int] | np.ndarray | None, count: int) -> np.ndarray:
    if labels is None:
        return np.full(count, FOREGROUND, np.int32)
    given = np.atleast_1d(_numbers(labels, "labels", "one of 0 and 1 for each point"))
    if given.shape != (count,):
        raise UserError(f"{given.size} labels were given for {count} points; give one for each")
    if not np.isin(given, (FOREGROUND, BACKGROUND)).all():
        raise UserError(f"labels are {given.tolist()}; give 1 for points on the object and 0 for points beside it")
    return given.astype(np.int32)


def _box(size: tuple[int, int], box: Sequence[float] | np.ndarray) -> np.ndarray:
    given = _numbers(box, "boxes", "(x0, y0, x1, y1)")
    if given.shape != (4,):
        raise UserError(f"a box has the shape {list(given.shape)}; give (x0, y0, x1, y1)")
    x0, y0, x1, y1 = (float(x) for x in given)
    shown = f"({x0:g}, {y0:g}, {x1:g}, {y1:g})"
    if x1 <= x0 or y1 <= y0:
        raise UserError(f"the box {shown} has no area; give left, top, right and bottom, as (x0, y0, x1, y1)")
    if min(x0, y0) < 0 or x1 > size[1] or y1 > size[0]:
        raise UserError(
            f"the box {shown} leaves the frame, which is {size[1]} pixels wide and {size[0]} high; cut it to the frame"
        )
    return given


def check_mask(size: tuple[int, int], mask: Any) -> GivenMask:
    """A mask of the video's size: bool[H, W], or numbers that are above 0 on the object.

    Raises:
      UserError: another shape.
    """
    try:
        array = np.asarray(mask)
    except (TypeError, ValueError) as error:
        raise UserError("the mask is no array; give bool[H, W]") from error
    if array.ndim != 2 or array.dtype.kind not in "buif":
        raise UserError(f"the mask is {array.dtype}{list(array.shape)}; give bool[H, W]")
    if array.shape != tuple(size):
        raise UserError(
            f"the mask is {array.shape[1]}x{array.shape[0]} pixels, the video {size[1]}x{size[0]}; give one of its size"
        )
    return GivenMask(array > 0)


def mask_for_network(mask: np.ndarray, side: int) -> np.ndarray:
    """A mask bool[H, W] as the tracker takes it: float32[1, R, R] of 0 and 1.

    Source: sam2_video_predictor.py, add_new_mask (bilinear with antialiasing, set from one half on).
    """
    if mask.shape == (side, side):
        return mask.astype(np.float32)[None]
    rows, columns = (resize_matrix(length, side, "antialias") for length in mask.shape)
    return (rows @ mask.astype(np.float32) @ columns.T >= 0.5).astype(np.float32)[None]
