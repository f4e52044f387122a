"""Frames that come one by one and are seen once: the sentence is read again on a window that slides along.

Every `stride` frames one is kept for the window, with its pixels for the language model and its features for the
fusion. Every `every` frames the sentence is read on the newest of them, as a whole video is read: what the fusion gives
for some of these frames are new anchors. In between, frames are tracked with these anchors and the memories of the
frames before, as in `stream`. All anchors lie in the past, and all shapes stay the same.

Frames that are dropped are not there for the tracker: it numbers those that are computed.

Axes: N expressions, H, W size of the frames, F segmentation frames, S side of the video encoder's image.
"""

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from virst_jax.config import VirstConfig
from virst_jax.data.frames import eval_anchors, segmentation_frames
from virst_jax.data.prompts import Tokenizer
from virst_jax.errors import UserError
from virst_jax.inference.plan import Options, Plan, check_options
from virst_jax.inference.reading import anchor_positions, read_expressions
from virst_jax.inference.steps import ExpressionBatch, Network
from virst_jax.inference.survey import say_nothing
from virst_jax.inference.texts import check_expressions
from virst_jax.inference.tiles import MaskTiles
from virst_jax.io.live_source import FrameQueue, LiveSource, SourceFrame
from virst_jax.models.sam2.sam2 import Features

LATE = ("drop", "block")
EVERY, WINDOWS, ROOM = 30, 4, 4  # frames between readings, readings that a window spans, frames that may wait
_ENDLESS = 1 << 20  # frames of a video whose end nobody knows: more than the tracker looks back
_FASTEST, _BINS, _GROWTH = 1e-4, 1600, 1.01  # of a histogram of seconds: 0.1 ms up to 800 s in steps of 1 %


@dataclass(frozen=True)
class LiveOptions:
    """How a stream is read.

    Attributes:
      every: frames that are computed from one reading of the sentence to the next.
      window: frames that a reading looks back on; None: `WINDOWS` times `every`.
      late: what happens to frames that come faster than they are computed: "drop": the oldest that wait are left out;
        "block": the source waits; None: "drop" for cameras and network streams, which do not wait, otherwise "block".
      room: how many frames may wait.
      seed: of the wording around the expressions.

    Raises:
      UserError: a number out of range, or an unknown way.
    """

    every: int = EVERY
    window: int | None = None
    late: str | None = None
    room: int = ROOM
    seed: int = 0

    def __post_init__(self) -> None:
        given = {"every": self.every, "room": self.room, "window": 1 if self.window is None else self.window}
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise UserError(f"{name} is {value!r}; give a whole number of frames, 1 or more")
        if self.late is not None and self.late not in LATE:
            raise UserError(f"late is {self.late!r}; choose {' or '.join(LATE)}")


@dataclass(frozen=True, eq=False)
class LiveFrame:
    """One frame's outcome.

    Attributes:
      index: its number in the source, where dropped frames count.
      time: seconds from the first frame on, as the source states them; None: unknown.
      image: uint8[H, W, 3].
      masks: bool[N, H, W].
      scores: float32[N], logits: the object is there where it is above 0.
      latency: seconds from when it was decoded until its masks were there.
      dropped: frames that were left out since the one before.
      is_reading: the sentence was read on it.
    """

    index: int
    time: float | None
    image: np.ndarray
    masks: np.ndarray
    scores: np.ndarray
    latency: float
    dropped: int
    is_reading: bool

    def __repr__(self) -> str:
        count, height, width = self.masks.shape
        return (
            f"LiveFrame(index={self.index}, masks=bool[{count}, {height}, {width}], scores={self.scores.round(2)}, "
            f"latency={1000 * self.latency:.0f} ms, dropped={self.dropped})"
        )


@dataclass(frozen=True)
class LiveStats:
    """How a stream is doing; latencies in seconds, nan without frames."""

    frames: int
    dropped: int
    readings: int
    seconds: float  # from the first frame to the last
    p50: float
    p95: float
    longest: float

    def __str__(self) -> str:
        rate = f", {self.frames / self.seconds:.1f} a second" if self.seconds > 0 else ""
        if not self.frames:
            return "no frame came"
        return (
            f"{self.frames} frames{rate}, {self.dropped} dropped; latency {1000 * self.p50:.0f} ms (median), "
            f"{1000 * self.p95:.0f} ms (95 %), {1000 * self.longest:.0f} ms (longest)"
        )


class Latencies:
    """A histogram, so that percentiles of a stream without end take no memory; they are right to 1 %."""

    def __init__(self) -> None:
        self._counts = np.zeros(_BINS, np.int64)
        self.longest = 0.0

    def add(self, seconds: float) -> None:
        place = math.log(max(seconds, _FASTEST) / _FASTEST) / math.log(_GROWTH)
        self._counts[min(int(place), _BINS - 1)] += 1
        self.longest = max(self.longest, seconds)

    def percentile(self, share: float) -> float:
        """Seconds that this share of the frames took at most; nan without frames."""
        total = self._counts.cumsum()
        if not total[-1]:
            return math.nan
        place = int(np.searchsorted(total, share * total[-1]))
        return min(_FASTEST * _GROWTH ** (place + 1), self.longest)


@dataclass(frozen=True, eq=False)
class _Kept:
    """A frame of the window."""

    number: int
    pixels: np.ndarray  # uint8[S, S, 3]
    features: Features


class _Tracking:
    """The window, the last reading, and the memories: everything but where frames come from."""

    def __init__(
        self, network: Network, tokenizer: Tokenizer, expressions: Sequence[str], options: LiveOptions, run: Options
    ):
        cfg = network.cfg
        self.network, self.tokenizer, self.expressions, self.run = network, tokenizer, expressions, run
        self.every = options.every
        self.stride = max(1, (options.window or WINDOWS * options.every) // cfg.max_video_frames)
        self.readings = 0
        self._window: deque[_Kept] = deque(maxlen=cfg.max_video_frames)
        self._batches: list[ExpressionBatch] = []
        self._number = 0
        self._tiles: MaskTiles | None = None

    def advance(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        """The masks and scores of the next frame, and whether the sentence was read on it."""
        network, cfg, number = self.network, self.network.cfg, self._number
        pixels = network.resize(image, cfg.sam2.image_size, "bicubic")
        (features,) = network.encode_batch([pixels], 1)
        reads = number % self.every == 0
        if reads or number % self.stride == 0:
            seen = np.asarray(network.resize(image, cfg.vision.image_size, "bicubic"))
            kept = _Kept(number, seen, features)
            if reads:
                self._read([*self._window, kept][-cfg.max_video_frames :])
            if number % self.stride == 0:
                self._window.append(kept)
        if self._tiles is None or self._tiles.size != image.shape[:2]:
            self._tiles = MaskTiles((image.shape[0], image.shape[1]), cfg.sam2.low_res_size)
        outcomes = []
        for batch in self._batches:
            out = network.advance(batch, [features], number, _ENDLESS, 1).prediction
            tiles = [[network.resize_masks(out.low_res, *m) for m in row] for row in self._tiles.matrices]
            outcomes.append((tiles, out.object_score))
        counts = [batch.count for batch in self._batches]
        masks = [self._tiles.join(tiles)[0, :n] for n, (tiles, _) in zip(counts, outcomes)]
        scores = [np.asarray(score)[0, :n] for n, (_, score) in zip(counts, outcomes)]
        self._number += 1
        return np.concatenate(masks), np.concatenate(scores), reads

    def _read(self, window: list[_Kept]) -> None:
        """Reads the sentence on the window; of a young stream, frames are there several times."""
        network, cfg = self.network, self.network.cfg
        plan, chosen = window_plan(cfg, [kept.number for kept in window])
        taken = [window[i] for i in chosen]
        clips = np.stack([kept.pixels for kept in taken])
        clips = clips.reshape(-1, cfg.vision.clip_frames, *clips.shape[1:])
        features = {kept.number: kept.features for kept in window}
        visual = network.encode_visual(clips, len(clips))
        maps = [features[number].top for number in plan.segmentation]
        prompts = read_expressions(
            network,
            self.tokenizer,
            self.expressions,
            self.run,
            visual,
            len(clips),
            maps,
            anchor_positions(cfg, plan),
            say_nothing,
        )
        frames = plan.anchor_frames
        batches = [
            network.start([features[n] for n in frames], frames, prompt, cfg.max_anchors, count)
            for count, prompt in prompts
        ]
        for new, old in zip(batches, self._batches):
            new.bank = old.bank  # what it remembers of the last frames holds
        self._batches = batches
        self.readings += 1


def window_plan(cfg: VirstConfig, numbers: Sequence[int]) -> tuple[Plan, list[int]]:
    """The frames of a window as a video's sample; of a short window, some are taken several times.

    Args:
      numbers: of its frames, rising, at most cfg.max_video_frames.

    Returns:
      The plan, and the positions in the window that are sampled. The newest frame is an anchor.
    """
    most = cfg.max_video_frames
    chosen = [len(numbers) - 1 - (most - 1 - i) * len(numbers) // most for i in range(most)]
    sampled = tuple(numbers[i] for i in chosen)
    picked = segmentation_frames(most, cfg.max_seg_frames)
    picked[-1] = most - 1
    segmentation = tuple(sampled[i] for i in picked)
    anchors = tuple(eval_anchors(len(segmentation), cfg.frames_per_anchor))
    return Plan(sampled, segmentation, anchors if len(anchors) > 1 else (len(segmentation) - 1,)), chosen


class LiveStream:
    """Yields the LiveFrame of each frame that is computed, until the source ends. `Model.live` makes one.

    The source is opened when the first frame is asked for, or by `open`; before that, all steps are compiled. Memory
    does not grow. `close`, or the end of a `with` block, ends the thread that reads.

    Args:
      network, tokenizer: of the model.
      source, format, options: as of `LiveSource`.
      expressions: one or many.
      settings: how it is read.
      run: as of `SegmentationStream`; `seed` is taken from the settings.

    Raises:
      UserError: bad expressions or settings. While it runs: the source cannot be opened, or it breaks off, behind all
        frames that came before that.

    Attributes:
      expressions: as they are read.
    """

    def __init__(
        self,
        network: Network,
        tokenizer: Tokenizer,
        source: Any,
        expressions: str | Sequence[str],
        settings: LiveOptions,
        run: Options,
        format: str | None = None,
        options: dict[str, str] | None = None,
    ):
        self.expressions = check_expressions(tokenizer, expressions)
        check_options(network.cfg, run)
        self._given, self._format, self._options = source, format, options
        self._settings = settings
        self._make = lambda: _Tracking(network, tokenizer, self.expressions, settings, run)
        self._tracking: _Tracking | None = None
        self._source: LiveSource | None = None
        self._queue: FrameQueue | None = None
        self._latencies = Latencies()
        self._frames, self._last, self._dropped, self._span = 0, -1, 0, (0.0, 0.0)
        self._stopped = False

    def prepare(self) -> None:
        """Compiles all steps, by way of a grey frame, so that frames need not wait for it."""
        trial = self._make()
        side = trial.network.cfg.sam2.image_size
        grey = np.full((side, side, 3), 128, np.uint8)
        for _ in range(2):
            trial.advance(grey)
        self._tracking = self._make()

    def open(self) -> LiveSource:
        """Opens the source, whose frames are read from now on.

        Raises:
          UserError: it cannot be opened.
        """
        if self._source is None:
            if self._tracking is None:
                self.prepare()
            self._source = LiveSource(self._given, self._format, self._options)
            late = self._settings.late or ("drop" if self._source.is_paced else "block")
            self._queue = FrameQueue(self._source, self._settings.room, late == "drop")
        return self._source

    @property
    def stats(self) -> LiveStats:
        """Of the frames so far."""
        latencies, (begin, end) = self._latencies, self._span
        return LiveStats(
            self._frames,
            self._dropped,
            self._tracking.readings if self._tracking else 0,
            end - begin,
            latencies.percentile(0.5),
            latencies.percentile(0.95),
            latencies.longest,
        )

    def __iter__(self) -> "LiveStream":
        return self

    def __next__(self) -> LiveFrame:
        if self._stopped:
            raise StopIteration
        self.open()
        assert self._queue is not None
        frame = self._queue.get()
        if frame is None:
            self.close()
            raise StopIteration
        return self._segment(frame)

    def _segment(self, frame: SourceFrame) -> LiveFrame:
        assert self._tracking is not None
        masks, scores, reads = self._tracking.advance(frame.image)
        if not np.isfinite(scores).all():
            raise UserError(
                f"the network gives no numbers for frame {frame.index}; the model is damaged, or try --dtype float32"
            )
        dropped = frame.index - self._last - 1
        now = time.monotonic()
        self._span = (self._span[0] if self._frames else frame.arrived, now)
        self._frames, self._last, self._dropped = self._frames + 1, frame.index, self._dropped + dropped
        self._latencies.add(now - frame.arrived)
        return LiveFrame(frame.index, frame.time, frame.image, masks, scores, now - frame.arrived, dropped, reads)

    def stop(self) -> None:
        """Ends the stream behind the frame that is at work. May be called by another thread or a signal's handler."""
        self._stopped = True
        if self._queue is not None:
            self._queue.stop()

    def close(self) -> None:
        """Ends the stream and its thread."""
        self.stop()
        if self._queue is not None:
            self._queue.close()

    def __enter__(self) -> "LiveStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        shown = self._source.name if self._source else self._given
        return f"LiveStream({shown!r}, expressions={list(self.expressions)}, {self.stats})"
