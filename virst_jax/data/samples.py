"""What every data set gives: videos with expressions, and questions about videos. Pixels are read when asked for.

Axes: T frames of a video, n frames asked for, H height, W width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Expression:
    """A sentence and the object or objects that it means."""

    text: str
    id: str = "0"  # as the data set names it; unique within its video
    category: str = ""  # of a benchmark's or generator's own division, such as "referring" or "motion"
    answer: str = ""  # the object in words, where that is known, such as "red circle"
    explanation: str = ""  # why it is meant, or an answer in words to a question: ReasonSeg's


@dataclass(frozen=True)
class Video:
    """A video, or a still image (one frame), with expressions that can be segmented in it.

    read_frames: frame numbers -> uint8[n, H, W, 3], RGB.
    read_masks: an expression's position and frame numbers -> bool[n, H, W]; None: the masks are not public.
    read_objects: frame numbers -> uint8[n, H, W], the object that each pixel shows, counted from 1, and 0 for none of
      them; None: not known. `objects` has the words for each, such as ("red", "circle", "left").
    """

    name: str
    num_frames: int
    size: tuple[int, int]  # height, width
    expressions: tuple[Expression, ...]
    read_frames: Callable[[Sequence[int]], np.ndarray]
    read_masks: Callable[[int, Sequence[int]], np.ndarray] | None
    frame_names: tuple[str, ...] = ()  # as submissions name them; empty: numbers of five digits
    is_image: bool = False
    read_objects: Callable[[Sequence[int]], np.ndarray] | None = None
    objects: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Question:
    """Questions about a video or a still image, answered in text. `read_frames` as in Video."""

    name: str
    num_frames: int
    turns: tuple[tuple[str, str], ...]  # question, answer
    read_frames: Callable[[Sequence[int]], np.ndarray]
    is_image: bool = False


class Source(Protocol):
    """Random access to the samples of a data set; the same index always gives the same sample."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Video | Question: ...
