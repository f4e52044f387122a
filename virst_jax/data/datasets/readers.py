"""Readers of frames and masks: small picklable objects with the signatures of `Video.read_frames` and `read_masks`.

Axes: n frames asked for, H height, W width. A position counts the expressions of a video.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from virst_jax.data.datasets.files import (
    find_image,
    find_mask,
    image_files,
    image_size,
    read_binary,
    read_image,
    read_labels,
)
from virst_jax.data.datasets.json_index import JsonMembers, Span, read_span
from virst_jax.errors import UserError
from virst_jax.io.json_files import Json
from virst_jax.io.masks import Size, decode_mask
from virst_jax.io.names import find_entry

VOID = 255  # pixels of a label map of objects that are left out


@dataclass(frozen=True)
class FrameFiles:
    """Frames of a video, each in a file of FOLDER; `names` are the files' names without suffix."""

    folder: str
    names: tuple[str, ...]
    files: tuple[str, ...]

    def path(self, index: int) -> str:
        if not 0 <= index < len(self.files):
            raise UserError(f"{self.folder}: frame {index} was asked for, the video has {len(self.files)}")
        return os.path.join(self.folder, self.files[index])

    def size(self) -> Size:
        """Height and width of the first frame, from its header."""
        return image_size(self.path(0))

    def __call__(self, indices: Sequence[int]) -> np.ndarray:
        return stack_frames([self.path(i) for i in indices])


def find_frames(images: str | Path, video: str, names: Sequence[str]) -> FrameFiles:
    """The files of a video's frames, FOLDER/VIDEO/NAME.jpg, or with another suffix in small or large letters.

    Raises:
      UserError: there are two files of one frame, or two names lead to one file.
    """
    folder = find_entry(images, video)
    files = image_files(folder)
    found = [find_image(folder, files, name, ".jpg") for name in names]
    if len({stem for _, stem in found}) != len(found):
        raise UserError(f"{folder}: two names in the list of frames lead to one file; correct the list")
    return FrameFiles(folder, tuple(stem for _, stem in found), tuple(file for file, _ in found))


def stack_frames(paths: Sequence[str]) -> np.ndarray:
    """Images of one size: uint8[n, H, W, 3].

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
            codes = self.codes(anno_id)
            for row, index in zip(out, indices, strict=True):
                if codes[index]:
                    row |= decode_mask(codes[index], self.size, f"{self.where(anno_id)}, frame {index}")
        return out

    def codes(self, anno_id: str) -> list[Any]:
        """The codes of an annotation, one or null a frame, as they are in the file.

        Raises:
          UserError: there is no list of as many.
        """
        return _codes(self.masks[anno_id], self.num_frames, self.where(anno_id))

    def where(self, anno_id: str) -> str:
        """The place of an annotation, for messages."""
        return f"{self.masks.path}: annotation {anno_id}"


@dataclass(frozen=True)
class SpanMasks:
    """Masks of a list of codes, one a frame, at a place of a JSON file. Every position is the same mask."""

    path: str
    span: Span
    key: str  # of the list within the value there
    num_frames: int
    size: Size

    def __call__(self, position: int, indices: Sequence[int]) -> np.ndarray:
        codes = _codes(read_span(self.path, self.span)[self.key], self.num_frames, f"{self.path}: {self.key}")
        out = np.zeros((len(indices), *self.size), bool)
        for row, index in zip(out, indices, strict=True):
            if codes[index]:
                row |= decode_mask(codes[index], self.size, f"{self.path}: {self.key}, frame {index}")
        return out


@dataclass(frozen=True)
class LabelMasks:
    """Masks of label maps FOLDER/NAME.png, in which an expression means some of the values."""

    folder: str
    names: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]  # per expression
    size: Size
    of_objects: bool = False  # values are objects, counted from 1, and not classes

    def __call__(self, position: int, indices: Sequence[int]) -> np.ndarray:
        out = np.zeros((len(indices), *self.size), bool)
        for row, index in zip(out, indices, strict=True):
            labels = self.labels(index)
            for value in self.values[position]:
                row |= labels == value
        return out

    def labels(self, index: int) -> np.ndarray:
        """All objects of a frame: int32[H, W], 0 is background."""
        path = find_mask(self.folder, self.names[index])
        labels = _sized(read_labels(path), self.size, path)
        if self.of_objects:
            high = int(labels.max())
            if high > VOID:
                raise UserError(f"{path}: holds the value {high}; objects are numbered from 1 to {VOID - 1}")
            if high == VOID and not ((labels > 0) & (labels < VOID)).any() and (labels == VOID).mean() > 0.001:
                raise UserError(
                    f"{path}: holds 0 and {VOID} as the mask of one object does; objects are numbered from 1"
                )
        return labels


@dataclass(frozen=True)
class BinaryMasks:
    """Masks as images in a folder per expression: FOLDER/NAME.png, or with another suffix."""

    folders: tuple[str, ...]  # per expression
    names: tuple[str, ...]
    size: Size

    def __call__(self, position: int, indices: Sequence[int]) -> np.ndarray:
        out = np.zeros((len(indices), *self.size), bool)
        for row, index in zip(out, indices, strict=True):
            path = find_mask(self.folders[position], self.names[index])
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
            segmentation = read_span(self.path, span)["segmentation"]
            if segmentation.value:  # the release takes an empty one for an empty mask
                mask |= decode_mask(segmentation.value, self.size, f"{self.path}: annotation at byte {span[0]}")
        return np.repeat(mask[None], len(indices), axis=0)


def _codes(stated: Json, num_frames: int, where: str) -> list[Any]:
    codes = stated.value
    if not isinstance(codes, list) or len(codes) != num_frames:
        count = len(codes) if isinstance(codes, list) else "no list of"
        raise UserError(f"{where}: {count} masks for {num_frames} frames; get the file again")
    return codes


def _sized(mask: np.ndarray, size: Size, path: str) -> np.ndarray:
    if mask.shape != size:
        raise UserError(f"{path}: a mask of {_by(mask.shape)} pixels for frames of {_by(size)}")
    return mask


def _only_frame(path: str, indices: Sequence[int]) -> None:
    if any(i != 0 for i in indices):
        raise UserError(f"{path}: frame {max(indices)} was asked for, a still image has one")


def _by(shape: Sequence[int]) -> str:
    return f"{shape[0]}x{shape[1]}"
