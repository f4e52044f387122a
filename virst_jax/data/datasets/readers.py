"""Readers of frames and masks: small picklable objects with the signatures of `Video.read_frames` and `read_masks`.

Axes: n frames asked for, H height, W width. A position counts the expressions of a video.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco

from virst_jax.data.datasets.files import image_size, read_binary, read_image, read_labels
from virst_jax.data.datasets.json_index import JsonMembers, Span, read_span
from virst_jax.errors import UserError

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class FrameFiles:
    """Frames of a video: FOLDER/NAME.jpg. `folder` may hold slashes of a video's key."""

    folder: str
    names: tuple[str, ...]
    suffix: str = ".jpg"  # ".jpeg" or ".png" where somebody's own frames are such

    def path(self, index: int) -> str:
        if not 0 <= index < len(self.names):
            raise UserError(f"{self.folder}: frame {index} was asked for, the video has {len(self.names)}")
        return os.path.join(self.folder, self.names[index] + self.suffix)

    def size(self) -> Size:
        """Height and width of the first frame, from its header."""
        return image_size(self.path(0))

    def __call__(self, indices: Sequence[int]) -> np.ndarray:
        return stack_frames([self.path(i) for i in indices])


def stack_frames(paths: Sequence[str]) -> np.ndarray:
    """Pictures of one size: uint8[n, H, W, 3].

    Raises:
      UserError: one is missing, truncated or of another size than the first; names it.
    """
    frames = [read_image(path) for path in paths]
    for path, frame in zip(paths, frames, strict=True):
        if frame.shape != frames[0].shape:
            raise UserError(
                f"{path}: {_by(frame.shape)} pixels, but {os.path.basename(paths[0])} has {_by(frames[0].shape)}; "
                "the frames of a video must have one size"
            )
    return np.stack(frames) if frames else np.zeros((0, 0, 0, 3), np.uint8)


@dataclass(frozen=True)
class ImageFile:
    """A still image as a video of one frame."""

    path: str

    def __call__(self, indices: Sequence[int]) -> np.ndarray:
        _only_frame(self.path, indices)
        return stack_frames([self.path] * len(indices))


@dataclass(frozen=True)
class RleMasks:
    """Masks of a mask_dict.json: under an annotation's id a list with the code of every frame, or null.

    An expression means the union of its annotations; one without annotations means nothing.
    """

    masks: JsonMembers
    ids: tuple[tuple[str, ...], ...]  # of annotations, per expression
    num_frames: int
    size: Size

    def __call__(self, position: int, indices: Sequence[int]) -> np.ndarray:
        out = np.zeros((len(indices), *self.size), bool)
        for anno_id in self.ids[position]:
            codes = self.masks[anno_id]
            where = f"{self.masks.path}: annotation {anno_id}"
            if not isinstance(codes, list) or len(codes) != self.num_frames:
                count = len(codes) if isinstance(codes, list) else "no list"
                raise UserError(f"{where}: {count} masks for {self.num_frames} frames; get the file again")
            for row, index in zip(out, indices, strict=True):
                if codes[index]:
                    row |= decode_mask(codes[index], self.size, f"{where}, frame {index}")
        return out


@dataclass(frozen=True)
class SpanMasks:
    """Masks of a list of codes, one a frame, at a place of a JSON file. Every position is the same mask."""

    path: str
    span: Span
    key: str  # of the list within the value there
    size: Size

    def __call__(self, position: int, indices: Sequence[int]) -> np.ndarray:
        codes = read_span(self.path, self.span)[self.key]
        return np.stack([decode_mask(codes[i], self.size, f"{self.path}: frame {i}") for i in indices])


@dataclass(frozen=True)
class LabelMasks:
    """Masks of label pictures FOLDER/NAME.png, in which an expression means some of the values."""

    folder: str
    names: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]  # per expression
    size: Size

    def __call__(self, position: int, indices: Sequence[int]) -> np.ndarray:
        out = np.zeros((len(indices), *self.size), bool)
        for row, index in zip(out, indices, strict=True):
            labels = self.labels(index)
            for value in self.values[position]:
                row |= labels == value
        return out

    def labels(self, index: int) -> np.ndarray:
        """All objects of a frame: int32[H, W], 0 is background."""
        path = os.path.join(self.folder, f"{self.names[index]}.png")
        return _sized(read_labels(path), self.size, path)


@dataclass(frozen=True)
class BinaryMasks:
    """Masks of pictures of 0 and 255 in a folder per expression: FOLDER/NAME.png (or .jpg, .jpeg)."""

    folders: tuple[str, ...]  # per expression
    names: tuple[str, ...]
    size: Size

    def __call__(self, position: int, indices: Sequence[int]) -> np.ndarray:
        out = np.zeros((len(indices), *self.size), bool)
        for row, index in zip(out, indices, strict=True):
            stem = os.path.join(self.folders[position], self.names[index])
            path = next((stem + s for s in (".png", ".jpg", ".jpeg") if os.path.isfile(stem + s)), stem + ".png")
            row |= _sized(read_binary(path), self.size, path)
        return out


@dataclass(frozen=True)
class CocoMasks:
    """Masks of COCO annotations that lie in a JSON file: an expression means the union of some."""

    path: str
    spans: tuple[tuple[Span, ...], ...]  # of annotations, per expression
    size: Size

    def __call__(self, position: int, indices: Sequence[int]) -> np.ndarray:
        _only_frame(self.path, indices)
        mask = np.zeros(self.size, bool)
        for span in self.spans[position]:
            annotation = read_span(self.path, span)
            segmentation = annotation.get("segmentation")
            if segmentation:  # the release takes an empty one for an empty mask
                mask |= decode_mask(segmentation, self.size, f"{self.path}: annotation {annotation.get('id')}")
        return np.repeat(mask[None], len(indices), axis=0)


def decode_mask(code: Any, size: Size, where: str) -> np.ndarray:
    """A mask in one of COCO's forms: run lengths (compressed or not), polygons, or a list of run lengths.

    Raises:
      UserError: it is none of these, or of another size.
    """
    height, width = size
    try:
        if isinstance(code, dict):
            code = [code]
        if code and isinstance(code[0], dict):
            for one in code:
                if tuple(one["size"]) != size:
                    raise UserError(f"{where}: a mask of {_by(one['size'])} pixels for frames of {_by(size)}")
            packed = [coco.frPyObjects(c, height, width) if isinstance(c["counts"], list) else c for c in code]
        else:
            # three points at least, as pycocotools cannot draw less
            packed = coco.frPyObjects([p for p in code if len(p) >= 6], height, width)
        mask = np.zeros(size, bool)
        for one in packed:
            mask |= coco.decode(one).astype(bool)
    except UserError:
        raise
    except Exception as error:  # pycocotools raises all sorts
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{where}: not a mask in COCO's form ({type(error).__name__}: {reason})") from error
    return mask


def _sized(mask: np.ndarray, size: Size, path: str) -> np.ndarray:
    if mask.shape != size:
        raise UserError(f"{path}: a mask of {_by(mask.shape)} pixels for frames of {_by(size)}")
    return mask


def _only_frame(path: str, indices: Sequence[int]) -> None:
    if any(i != 0 for i in indices):
        raise UserError(f"{path}: frame {max(indices)} was asked for, a still image has one")


def _by(shape: Sequence[int]) -> str:
    return f"{shape[0]}x{shape[1]}"
