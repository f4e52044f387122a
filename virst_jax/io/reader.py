"""What every video is to the rest of the program: frames in order, their names and times.

Axes: T frames of the video, n frames asked for, H height, W width, 3 RGB.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from virst_jax.errors import UserError


@dataclass(frozen=True)
class VideoFormat:
    """How a file's images are meant to be shown, beside their pixels; numbers are FFmpeg's, 0 or 2: not stated."""

    sample_aspect: Fraction | None = None  # width over height of a pixel; None: square
    colorspace: int = 2
    color_range: int = 0
    color_primaries: int = 2
    color_trc: int = 2
    time_base: Fraction | None = None  # of the frames' times
    audio: Path | None = None  # the file that holds the sound


class Reader:
    """A video that can be read from its start any number of times. `open_video` makes one.

    A subclass gives the attributes, `num_frames`, `__iter__` and `pick`.

    Attributes:
      name: of the file or folder.
      size: height, width.
      fps: frames a second, on average; 0: unknown.
      still: a single image, not a video.
      format: what an overlay keeps of the file.
      damaged: numbers of the frames that may be wrong, as the file is damaged. They are an error unless the caller has
        asked to go on with them.
      num_lost: frames that could not be decoded at all and are left out; likewise.
      is_cut: the file ends too early; likewise.
    """

    name: str
    size: tuple[int, int]
    fps: float = 0.0
    still: bool = False
    format: VideoFormat = VideoFormat()
    damaged: Sequence[int] = ()
    num_lost: int = 0
    is_cut: bool = False

    @property
    def num_frames(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Iterator[np.ndarray]:
        """Frames uint8[H, W, 3] in order."""
        raise NotImplementedError

    def pick(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """The frames of these numbers, which must rise."""
        raise NotImplementedError

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """uint8[n, H, W, 3] of frame numbers in any order; repeats are fine."""
        check_indices(self.name, indices, self.count_up_to(max(indices, default=0) + 1))
        numbers = sorted(set(indices))
        found = dict(zip(numbers, self.pick(numbers)))
        return np.stack([found[i] for i in indices])

    def count_up_to(self, limit: int) -> int:
        """`num_frames`, but no more than `limit`: what lies behind is not looked at."""
        return min(limit, self.num_frames)

    def expected_frames(self) -> int:
        """As `num_frames`, or a guess where counting takes decoding the whole video."""
        return self.num_frames

    def survey(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """As `pick`, reading on to the video's end where that is needed to count its frames.

        Numbers that the video turns out not to have are left out: compare `num_frames` with what was expected.
        """
        return self.pick(indices)

    @property
    def frame_names(self) -> Sequence[str]:
        """Names of all frames, as their masks are named."""
        return self.names_of(range(self.num_frames))

    def names_of(self, indices: Sequence[int]) -> Sequence[str]:
        return [f"{i:05d}" for i in indices]

    def times_of(self, indices: Sequence[int]) -> Sequence[float] | None:
        """When the frames are shown, in seconds from the video's start; None: unknown."""
        return [i / self.fps for i in indices] if self.fps > 0 else None

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last; 0: unknown."""
        return self.num_frames / self.fps if self.fps > 0 else 0.0


def check_indices(name: str, indices: Sequence[int], num_frames: int) -> None:
    """Raises UserError if no frame is asked for, or one that the video does not have."""
    if not len(indices):
        raise UserError(f"{name}: no frame was asked for; name at least one")
    for index in indices:
        if not 0 <= index < num_frames:
            raise UserError(f"{name}: there is no frame {index}; the video has frames 0 to {num_frames - 1}")
