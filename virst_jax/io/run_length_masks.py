"""Masks of a video kept as run lengths and decoded when they are looked at.

Axes: N objects, T frames, H, W size.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from virst_jax.io.masks import decode_mask, encode_mask

Code = Any  # of COCO's forms


class RunLengthMasks:
    """Behaves as bool[N, T, H, W] for reading: indices, slices, `np.asarray`. An index decodes what it asks for only.

    Args:
      codes: of each object one code for each frame.
      size: height, width.
      where: names an object for messages, by its place.
    """

    dtype, ndim = np.dtype(bool), 4

    def __init__(
        self, codes: Sequence[Sequence[Code]], num_frames: int, size: tuple[int, int], where: Callable[[int], str] = str
    ):
        self._codes, self._where = [list(row) for row in codes], where
        self.shape = (len(self._codes), num_frames, *size)

    @classmethod
    def of_frames(cls, frames: Iterator[np.ndarray], num_objects: int, size: tuple[int, int]) -> "RunLengthMasks":
        """Of masks bool[N, H, W], frame by frame."""
        codes: list[list[Code]] = [[] for _ in range(num_objects)]
        count = 0
        for masks in frames:
            count += 1
            for row, mask in zip(codes, masks):
                row.append({"size": list(size), "counts": encode_mask(mask)})
        return cls(codes, count, size)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes."""
        return sum(len(code["counts"]) for row in self._codes for code in row if isinstance(code, dict))

    def frame(self, number: int) -> np.ndarray:
        """The masks of a frame, bool[N, H, W].

        Raises:
          UserError: a code is damaged.
        """
        size = self.shape[2:]
        found = [decode_mask(row[number], size, self._where(i)) for i, row in enumerate(self._codes)]
        return np.stack(found) if found else np.zeros((0, *size), bool)

    def areas(self) -> np.ndarray:
        """Pixels of every mask, int64[N, T]; one frame is decoded at a time."""
        found = [self.frame(t).sum((1, 2)) for t in range(self.shape[1])]
        return np.array(found, np.int64).reshape(self.shape[1], self.shape[0]).T

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        parts = index if isinstance(index, tuple) else (index,)
        if any(part is Ellipsis or part is None for part in parts) or len(parts) > 4:
            parts = _without_ellipsis(parts)
        objects, frames = (*parts, slice(None), slice(None))[:2]
        rows, columns = (np.arange(length)[key] for length, key in zip(self.shape, (objects, frames)))
        size = self.shape[2:]
        decoded = np.zeros((*np.shape(rows), *np.shape(columns), *size), bool)
        flat = decoded.reshape(-1, *size)
        pairs = [(i, t) for i in np.atleast_1d(rows).reshape(-1) for t in np.atleast_1d(columns).reshape(-1)]
        for place, (i, t) in enumerate(pairs):
            flat[place] = decode_mask(self._codes[i][t], size, self._where(int(i)))
        rest = parts[2:]
        return decoded[(..., *rest, *[slice(None)] * (2 - len(rest)))] if rest else decoded

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or bool)

    def __eq__(self, other: object) -> Any:
        return np.asarray(self) == other

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"RunLengthMasks(bool{list(self.shape)}, {self.nbytes:,} bytes)"


def _without_ellipsis(parts: tuple[Any, ...]) -> tuple[Any, ...]:
    if None in [part for part in parts if part is None] or sum(part is Ellipsis for part in parts) > 1:
        raise IndexError("masks that are decoded when they are read take numbers, slices, lists and one ellipsis")
    given = [part for part in parts if part is not Ellipsis]
    if len(given) > 4:
        raise IndexError(f"{len(given)} indices for 4 axes")
    at = parts.index(Ellipsis) if Ellipsis in parts else len(given)
    return (*given[:at], *[slice(None)] * (4 - len(given)), *given[at:])
