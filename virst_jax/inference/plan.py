"""How a video is run, and which of its frames are used for what.

Axes: F segmentation frames, A anchors.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from virst_jax.config import VirstConfig
from virst_jax.data.frames import eval_anchors, flex_frames, segmentation_frames
from virst_jax.errors import UserError

Seed = int | Sequence[int]
ReleaseRandom = tuple[np.random.RandomState, random.Random]


@dataclass(frozen=True)
class Options:
    """How a video is run; see api.Model and api.Model.segment."""

    seed: Seed = 0
    exact: bool = False
    anchors: Sequence[int] | None = None
    release_random: ReleaseRandom | None = None
    still: bool = False  # the video is a single image
    soft: bool = False  # give probabilities, too
    batch: int = 1  # frames that are encoded at a time
    chunk: int = 4  # frames that are tracked in one call
    group_size: int = 8  # expressions that are read and tracked in one call, a power of two


def call_sizes(on_cpu: bool, batch: int | None = None, group_size: int | None = None) -> tuple[int, int]:
    """How many frames are encoded, and how many expressions or objects are read and tracked, in one call.

    What is not given is one on CPUs. More frames are not faster there. More expressions save at most a quarter of the
    time of a small network and nothing of a large one, but every number of rows is compiled on its own, which takes
    longer than most videos.
    """
    return batch or (1 if on_cpu else 4), group_size or (1 if on_cpu else 8)


def padded_rows(count: int) -> int:
    """Rows of a call on `count` expressions or objects: a power of two, so that few numbers of rows are compiled."""
    return 1 << (count - 1).bit_length()


@dataclass(frozen=True)
class Plan:
    """Which frames of a video are used for what, by their numbers."""

    sampled: tuple[int, ...]  # read by the language model
    segmentation: tuple[int, ...]  # read by the fusion: F of them
    anchors: tuple[int, ...]  # positions among the segmentation frames: A of them

    @property
    def anchor_frames(self) -> tuple[int, ...]:
        return tuple(self.segmentation[i] for i in self.anchors)


def check_options(cfg: VirstConfig, options: Options) -> None:
    """Refuses options that fit no video at all.

    Raises:
      UserError: a seed that is no number, anchors that are none, too many or no frame numbers, or another option of a
        wrong type.
    """
    for name in ("exact", "still", "soft"):
        if not isinstance(getattr(options, name), (bool, np.bool_)):
            raise UserError(f"{name} is {getattr(options, name)!r}; give True or False")  # "no" would be taken for yes
    given = options.release_random
    kinds = (np.random.RandomState, random.Random)
    if given is not None and not (isinstance(given, tuple) and len(given) == 2 and all(map(isinstance, given, kinds))):
        raise UserError(f"release_random is {given!r}; give a pair of numpy.random.RandomState and random.Random")
    seed = options.seed
    parts = list(seed) if isinstance(seed, (Sequence, np.ndarray)) and not isinstance(seed, str) else [seed]
    if not parts or not all(_is_integer(part) for part in parts):
        raise UserError(f"the seed must be an integer or a list of integers, not {type(seed).__name__} {seed!r}")
    if min(parts) < 0:
        raise UserError(f"the seed is {seed!r}; give integers of 0 or more")
    anchors = options.anchors
    if anchors is None:
        return
    if not isinstance(anchors, (Sequence, np.ndarray)) or not all(_is_integer(frame) for frame in anchors):
        raise UserError(f"anchors must be a list of frame numbers, not {anchors!r}")
    if not 1 <= len(set(anchors)) <= cfg.max_anchors:
        raise UserError(f"{len(set(anchors))} anchors were given; give 1 to {cfg.max_anchors}")
    if min(anchors) < 0:
        raise UserError(f"anchor {min(anchors)} is no frame of a video; frames are numbered from 0")


def _is_integer(x: object) -> bool:
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)


def plan_frames(cfg: VirstConfig, num_frames: int, options: Options) -> Plan:
    """Chooses the frames.

    Raises:
      UserError: an anchor that the video does not have, or too many.
    """
    if options.still:
        return Plan((0,), (0,), (0,))
    draws, draw = options.release_random or (None, None)
    sampled = flex_frames(
        num_frames,
        options.seed,
        max_frames=cfg.max_video_frames,
        min_frames=min(8, cfg.max_video_frames),
        clip_frames=cfg.vision.clip_frames,
        release_random=draws,
    )
    chosen = [sampled[i] for i in segmentation_frames(len(sampled), cfg.max_seg_frames, release_random=draw)]
    if options.anchors is None:
        return Plan(tuple(sampled), tuple(chosen), tuple(eval_anchors(len(chosen), cfg.frames_per_anchor)))
    anchors = sorted({int(frame) for frame in options.anchors})
    if not 1 <= len(anchors) <= min(cfg.max_anchors, len(chosen)):
        raise UserError(f"{len(anchors)} anchors were given; give 1 to {min(cfg.max_anchors, len(chosen))}")
    for frame in anchors:
        if not 0 <= frame < num_frames:
            raise UserError(f"anchor {frame} is no frame of the video; it has frames 0 to {num_frames - 1}")
        # it takes the place of the nearest segmentation frame
        free = [i for i, other in enumerate(chosen) if other not in anchors or other == frame]
        chosen[min(free, key=lambda i: abs(chosen[i] - frame))] = frame
    chosen.sort()
    return Plan(tuple(sampled), tuple(chosen), tuple(chosen.index(frame) for frame in anchors))
