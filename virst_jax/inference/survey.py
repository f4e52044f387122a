"""The first pass over a video: how many frames it has, and those that the network reads before it tracks.

Which frames are sampled depends on how many there are. A file states a number that may be wrong, so that the sample is
taken for that number while all frames are counted; only if they are others, the sampled ones are read again.

Axes: R side of an image that the network reads.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from virst_jax.config import VirstConfig
from virst_jax.errors import UserError
from virst_jax.inference.plan import Options, Plan, plan_frames
from virst_jax.inference.resizing import Resize, resize_on_host
from virst_jax.io.reader import Reader

Progress = Callable[[str, int, int], None]
VLM, FUSION, TRACKER = "vlm", "fusion", "tracker"


@dataclass(frozen=True)
class Use:
    """What frames are resized for."""

    frames: frozenset[int]
    side: int
    method: str


@dataclass(frozen=True, eq=False)
class Sampled:
    """A frame as one of the networks reads it."""

    number: int
    use: str  # VLM, FUSION or TRACKER
    image: np.ndarray  # uint8[R, R, 3]


@dataclass(frozen=True, eq=False)
class Survey:
    """What the first pass gives: at the release's size at most 140 MB."""

    num_frames: int
    plan: Plan
    pixels: Sequence[Sampled]  # in the order of the video


def say_nothing(stage: str, done: int, total: int) -> None: ...


def take_survey(
    cfg: VirstConfig,
    reader: Reader,
    options: Options,
    progress: Progress = say_nothing,
    *,
    pixels: bool = True,
    resize: Resize = resize_on_host,
) -> Survey:
    """Reads a video once.

    Args:
      pixels: take the sampled frames; otherwise they are only counted.
      resize: of the sampled frames.

    Raises:
      UserError: the video is damaged, or an anchor is none of its frames.
    """
    progress("decode", 0, 0)
    if not pixels:
        count = reader.num_frames
        return Survey(count, plan_frames(cfg, count, options), ())
    guessed, taken = _guess(cfg, reader, options), []
    if guessed is not None:
        taken = _collect(reader.survey, frame_uses(cfg, guessed, options), resize, progress)
    count = reader.num_frames
    plan = plan_frames(cfg, count, options)
    if plan != guessed:
        taken = _collect(reader.pick, frame_uses(cfg, plan, options), resize, progress)
    if {x.number for x in taken if x.use == VLM} != set(plan.sampled):
        raise UserError(f"{reader.name}: the video ended early; was it changed while it was read?")
    return Survey(count, plan, taken)


def _guess(cfg: VirstConfig, reader: Reader, options: Options) -> Plan | None:
    """The plan for as many frames as are expected; None: there is none for so many."""
    # drawing must not change the caller's generators: they are drawn from when the number is known
    options = dataclasses.replace(options, release_random=copy.deepcopy(options.release_random))
    with contextlib.suppress(UserError):
        return plan_frames(cfg, reader.expected_frames(), options)
    return None


def _collect(
    pick: Callable[[Sequence[int]], Iterable[np.ndarray]],
    uses: Mapping[str, Use],
    resize: Resize,
    progress: Progress,
) -> list[Sampled]:
    taken, total = [], sum(len(use.frames) for use in uses.values())
    for done, x in enumerate(_resized(pick, uses, resize), 1):
        taken.append(x)
        progress("decode", done, total)
    return taken


def _resized(
    pick: Callable[[Sequence[int]], Iterable[np.ndarray]], uses: Mapping[str, Use], resize: Resize
) -> Iterator[Sampled]:
    numbers = sorted(frozenset[int]().union(*(use.frames for use in uses.values())))
    frames = iter(pick(numbers))
    for number, frame in zip(numbers, frames):
        for name, use in uses.items():
            if number in use.frames:
                # they wait in the host's memory, wherever they are resized
                yield Sampled(number, name, np.asarray(resize(frame, use.side, use.method)))
    for _ in frames:  # on to the video's end, so that its frames are counted
        pass


def frame_uses(cfg: VirstConfig, plan: Plan, options: Options) -> dict[str, Use]:
    """Which frames are read by the language model, the fusion and the tracker, and how they are resized."""
    side, fusion = cfg.sam2.image_size, frozenset(plan.segmentation)
    return {
        VLM: Use(frozenset(plan.sampled), cfg.vision.image_size, "bicubic"),
        FUSION: Use(fusion if options.exact else frozenset(), side, "bilinear"),
        # anchors are tracked frames; without `exact` the fusion reads features of tracked frames
        TRACKER: Use(frozenset(plan.anchor_frames) if options.exact else fusion, side, "bicubic"),
    }
