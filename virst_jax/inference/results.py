"""What segmenting a video gives: masks, scores, and how they were found.

Axes: N expressions, T frames, H, W size of the video.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from virst_jax.errors import UserError
from virst_jax.inference.plan import Plan
from virst_jax.io import exports, visualize
from virst_jax.io.video import open_video


@dataclass(frozen=True, eq=False)
class FrameMasks:
    """One frame's outcome."""

    index: int  # number of the frame
    masks: np.ndarray  # bool[N, H, W]
    scores: np.ndarray  # float32[N], logits: the object is there where it is above 0

    def __repr__(self) -> str:
        count, height, width = self.masks.shape
        return f"FrameMasks(index={self.index}, masks=bool[{count}, {height}, {width}], scores={self.scores.round(2)})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FrameMasks):
            return NotImplemented
        mine, theirs = (self.masks, self.scores), (other.masks, other.scores)
        return self.index == other.index and all(np.array_equal(a, b) for a, b in zip(mine, theirs))

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The masks of a video. Equal are results of the same masks and scores, however long they took."""

    expressions: tuple[str, ...]
    masks: np.ndarray  # bool[N, T, H, W]; of segment_image bool[N, H, W]
    scores: np.ndarray  # float32[N, T], logits: the object is there where it is above 0; of segment_image float32[N]
    plan: Plan
    fps: float  # 0: unknown
    timings: Mapping[str, float]  # seconds by stage

    @property
    def anchors(self) -> tuple[int, ...]:
        """Numbers of the anchors' frames."""
        return self.plan.anchor_frames

    @property
    def _by_frame(self) -> tuple[np.ndarray, np.ndarray]:
        """Masks bool[N, T, H, W] and scores float32[N, T], also of an image."""
        still = self.masks.ndim == 3
        return (self.masks[:, None], self.scores[:, None]) if still else (self.masks, self.scores)

    def mask_set(self, name: str = "video") -> exports.MaskSet:
        """As `virst_jax.io.exports` writes it; objects are numbered from 1 in the order of the expressions."""
        masks, scores = self._by_frame
        count = masks.shape[1]
        return exports.MaskSet(
            name,
            list(self.expressions),
            list(range(1, len(self.expressions) + 1)),
            [f"{i:05d}" for i in range(count)],
            (masks.shape[2], masks.shape[3]),
            self.fps,
            [i / self.fps for i in range(count)] if self.fps > 0 else None,
            [[round(float(score), 4) for score in row] for row in scores],
            lambda frame: masks[:, frame],
        )

    def save(
        self, out: str | os.PathLike[str], format: str = "coco", *, video: Any = None, name: str = "video"
    ) -> Path:
        """Writes the masks to a new folder in one of `virst_jax.io.exports.FORMATS`.

        Args:
          video: what was segmented; "webm-alpha" shows it.
          name: of the video, for files and folders.

        Raises:
          UserError: an unknown format, a folder that exists, or a video where one is needed that is none or another.
        """
        reader = None if video is None else open_video(video)
        return exports.export(format, self.mask_set(name), Path(out), reader)

    def to_coco(self) -> dict[str, Any]:
        """COCO's JSON as a dictionary: a frame is an image, `track_id` joins the frames of an object."""
        return exports.coco(self.mask_set())

    def plot(self, frame: int = 0, image: np.ndarray | None = None, *, legend: bool = True) -> Image.Image:
        """A frame with the masks in colours.

        Args:
          frame: its number.
          image: uint8[H, W, 3], the frame itself; None: black.
          legend: name the expressions below it.

        Raises:
          UserError: there is no such frame, or an image of another size.
        """
        shown, size = self._frame(frame), self.masks.shape[-2:]
        pixels = np.zeros((*size, 3), np.uint8) if image is None else np.asarray(image)
        if pixels.shape != (*size, 3) or pixels.dtype != np.uint8:
            raise UserError(f"the image is {pixels.dtype}{list(pixels.shape)}; give uint8[{size[0]}, {size[1]}, 3]")
        painted = visualize.overlay(pixels, shown)
        if legend:
            painted = np.concatenate([painted, visualize.legend(self.expressions, size[1])])
        return Image.fromarray(painted)

    def crop(self, image: np.ndarray, index: int = 0, frame: int = 0) -> Image.Image | None:
        """What an expression means, cut out of a frame, transparent around it; None where nothing was found.

        Args:
          image: uint8[H, W, 3], the frame.
          index: of the expression, counted from 0.
          frame: its number.

        Raises:
          UserError: there is no such frame or expression, or an image of another size.
        """
        shown = self._frame(frame)
        if not 0 <= index < len(shown):
            raise UserError(f"there is no expression {index}; the result has 0 to {len(shown) - 1}")
        mask, pixels = shown[index], np.asarray(image)
        if pixels.shape != (*mask.shape, 3) or pixels.dtype != np.uint8:
            raise UserError(f"the image is {pixels.dtype}{list(pixels.shape)}; give uint8{[*mask.shape, 3]}")
        if not mask.any():
            return None
        left, top, width, height = exports.box_of(mask)
        rgba = np.concatenate([pixels, mask[..., None].astype(np.uint8) * 255], -1)
        return Image.fromarray(rgba[top : top + height, left : left + width])

    def _frame(self, frame: int) -> np.ndarray:
        masks, _ = self._by_frame
        if not 0 <= frame < masks.shape[1]:
            raise UserError(f"there is no frame {frame}; the result has frames 0 to {masks.shape[1] - 1}")
        shown: np.ndarray = masks[:, frame]
        return shown

    def __repr__(self) -> str:
        shape = ", ".join(map(str, self.masks.shape))
        masks, _ = self._by_frame
        found = masks.any((2, 3)).sum(1)
        seen = ", ".join(f"{text!r}: {n}" for text, n in zip(self.expressions, found))
        return f"Segmentation(masks=bool[{shape}], expressions={list(self.expressions)}, found in frames {{{seen}}})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Segmentation):
            return NotImplemented
        mine, theirs = ((x.expressions, x.plan, x.fps) for x in (self, other))
        return mine == theirs and all(
            np.array_equal(a, b) for a, b in ((self.masks, other.masks), (self.scores, other.scores))
        )

    __hash__ = None  # type: ignore[assignment]
