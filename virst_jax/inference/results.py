"""What segmenting a video gives: masks, scores, and how they were found.

Axes: N expressions, T frames, H, W size of the video.
"""

import base64
import functools
import html
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from virst_jax.errors import UserError
from virst_jax.inference.plan import Plan
from virst_jax.io import exports, foreign_labels, result_folder, visualize
from virst_jax.io.run_length_masks import RunLengthMasks
from virst_jax.io.video import open_video

THUMBNAILS, THUMBNAIL_SIDE = 4, 160


@dataclass(frozen=True, eq=False)
class FrameMasks:
    """One frame's outcome."""

    index: int  # number of the frame
    masks: np.ndarray  # bool[N, H, W]
    scores: np.ndarray  # float32[N], logits: the object is there where it is above 0
    soft: np.ndarray | None = None  # uint8[N, H, W], if asked for: probabilities of 0 to 255

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

    expressions: tuple[str, ...]  # one for each row of the masks: of instances, their sentence
    # bool[N, T, H, W]; of segment_image bool[N, H, W]. With `lazy`, and of `read_result`, it is RunLengthMasks
    masks: np.ndarray
    scores: np.ndarray  # float32[N, T], logits: the object is there where it is above 0; of segment_image float32[N]
    plan: Plan
    fps: float  # 0: unknown
    timings: Mapping[str, float]  # seconds by stage
    object_ids: tuple[int, ...] = ()  # of instances; empty: the expressions are numbered from 1
    soft: np.ndarray | None = None  # uint8[N, T, H, W], if asked for: probabilities of 0 to 255
    frame_names: tuple[str, ...] = ()  # empty: their numbers
    times: tuple[float, ...] | None = None  # of the frames, in seconds; None: by fps

    @property
    def ids(self) -> tuple[int, ...]:
        """Numbers of the objects, in the order of the masks."""
        return self.object_ids or tuple(range(1, len(self.expressions) + 1))

    @property
    def anchors(self) -> tuple[int, ...]:
        """Numbers of the anchors' frames."""
        return self.plan.anchor_frames

    @property
    def num_frames(self) -> int:
        """1 of an image."""
        return 1 if self.masks.ndim == 3 else self.masks.shape[1]

    def masks_of(self, frame: int) -> np.ndarray:
        """The masks bool[N, H, W] of a frame by its number.

        Raises:
          UserError: there is no such frame.
        """
        if not 0 <= frame < self.num_frames:
            raise UserError(f"there is no frame {frame}; the result has frames 0 to {self.num_frames - 1}")
        if isinstance(self.masks, RunLengthMasks):
            return self.masks.frame(frame)  # type: ignore[unreachable, unused-ignore]
        shown: np.ndarray = self.masks if self.masks.ndim == 3 else self.masks[:, frame]
        return shown

    def _scores_of(self, frame: int) -> np.ndarray:
        scores: np.ndarray = self.scores if self.scores.ndim == 1 else self.scores[:, frame]
        return scores

    @functools.cached_property
    def _found(self) -> np.ndarray:
        """In how many frames each object is seen, int[N]."""
        return np.sum([self.masks_of(t).any((1, 2)) for t in range(self.num_frames)], axis=0, dtype=int)

    def mask_set(self, name: str = "video") -> exports.MaskSet:
        """As `virst_jax.io.exports` writes it."""
        count, times = self.num_frames, self.times
        if times is None and self.fps > 0:
            times = tuple(i / self.fps for i in range(count))
        rows = self.scores.reshape(len(self.scores), count)
        return exports.MaskSet(
            name,
            list(self.expressions),
            list(self.ids),
            list(self.frame_names) or [f"{i:05d}" for i in range(count)],
            (self.masks.shape[-2], self.masks.shape[-1]),
            self.fps,
            None if times is None else list(times),
            [[None if np.isnan(score) else round(float(score), 4) for score in row] for row in rows],
            self.masks_of,
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
        shown, size = self.masks_of(frame), self.masks.shape[-2:]
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
        shown = self.masks_of(frame)
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

    def to_supervision(self, frame: int = 0) -> Any:
        """The objects on a frame as `supervision.Detections`: boxes, masks, confidences, tracker ids, class names.

        Raises:
          UserError: there is no such frame, or the package is missing (pip install 'virst-jax[supervision]').
        """
        return self._labels("supervision", frame)

    def to_fiftyone(self, frame: int = 0) -> Any:
        """The objects on a frame as `fiftyone.Detections`, for a sample or a frame of one.

        Raises:
          UserError: there is no such frame, or the package is missing (pip install 'virst-jax[fiftyone]').
        """
        return self._labels("fiftyone", frame)

    def _labels(self, package: str, frame: int) -> Any:
        given = (self.masks_of(frame), list(self.expressions), list(self.ids), self._scores_of(frame).tolist())
        try:
            return getattr(foreign_labels, f"{package}_detections")(*given)
        except ModuleNotFoundError as error:
            if error.name != package:
                raise
            raise UserError(f"{package} is not installed; pip install 'virst-jax[{package}]'") from error

    def __repr__(self) -> str:
        shape = ", ".join(map(str, self.masks.shape))
        seen = ", ".join(
            f"{text!r}{f' ({number})' if self.object_ids else ''}: {n}"
            for text, number, n in zip(self.expressions, self.ids, self._found)
        )
        return f"Segmentation(masks=bool[{shape}], frames in which each is found: {seen or 'nothing'})"

    def _repr_html_(self) -> str:
        """For notebooks: a table, and a few frames in colours on black."""
        rows = "".join(
            f"<tr><td>{number}</td><td style='text-align:left'>{html.escape(text)}</td>"
            f"<td>{n} of {self.num_frames}</td></tr>"
            for text, number, n in zip(self.expressions, self.ids, self._found)
        )
        last = self.num_frames - 1
        frames = sorted({round(i * last / (THUMBNAILS - 1)) for i in range(THUMBNAILS)})
        pictures = []
        for frame in frames:
            file = io.BytesIO()
            image = self.plot(frame, legend=False)
            image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
            image.save(file, format="PNG")
            code = base64.b64encode(file.getvalue()).decode()
            pictures.append(f"<img src='data:image/png;base64,{code}' title='frame {frame}'>")
        head = "<tr><th>object</th><th style='text-align:left'>expression</th><th>found in frames</th></tr>"
        return f"<table>{head}{rows}</table><div>{' '.join(pictures)}</div>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Segmentation):
            return NotImplemented
        mine, theirs = ((x.expressions, x.ids, x.plan, x.fps, x.masks.shape) for x in (self, other))
        return (
            mine == theirs
            and np.array_equal(self.scores, other.scores, equal_nan=True)
            and all(np.array_equal(self.masks_of(t), other.masks_of(t)) for t in range(self.num_frames))
        )

    __hash__ = None  # type: ignore[assignment]


def read_result(folder: str | os.PathLike[str]) -> Segmentation:
    """What `virst segment` or `virst track` has written to a folder. Masks are decoded when they are looked at.

    Raises:
      UserError: there is no whole result, or, when they are looked at, masks whose codes are damaged.
    """
    result = result_folder.read_result(Path(folder))
    masks, plan = result_folder.masks_of(result), result_folder.plan_of(result)
    count, segmentation = masks.shape[1], plan["segmentation_frames"]
    times = result_folder.times_of(result, count)
    marked = [record["object_id"].value is not None for record in result["objects"].elements()]
    shown = result_folder.mask_set(result)
    return Segmentation(
        tuple(shown.labels),
        cast(np.ndarray, masks),
        result_folder.as_scores(result_folder.scores_of(result), count),
        Plan(
            plan["sampled_frames"],
            segmentation,
            tuple(segmentation.index(frame) for frame in plan["anchors"] if frame in segmentation),
        ),
        shown.fps,
        {key: value.number() for key, value in result["timings"].members()} if "timings" in result else {},
        tuple(shown.object_ids) if any(marked) else (),
        frame_names=tuple(shown.frame_names),
        times=None if times is None else tuple(times),
    )
