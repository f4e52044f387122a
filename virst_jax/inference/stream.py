"""A video and its expressions through the network, frame by frame, each frame encoded once.

The video is decoded twice. A survey counts its frames and takes those that are sampled from all of it, which the
language model and the fusion read; then it is read for tracking, by a thread that runs ahead. Features of sampled
frames are kept until tracking has passed them.

Axes: N expressions, O expressions of a batch, T frames, H, W size of the video, F segmentation frames, A anchors,
R side of the tracker's image, S side of the video encoder's image.
"""

import contextlib
import dataclasses
import functools
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Any

import jax
import numpy as np

from virst_jax.data.prompts import Tokenizer
from virst_jax.errors import UserError
from virst_jax.inference import resume
from virst_jax.inference.compiled import CompileWatch, watch_compiling
from virst_jax.inference.plan import Options, Plan, check_options
from virst_jax.inference.reading import anchor_positions, read_expressions
from virst_jax.inference.resizing import Pixels
from virst_jax.inference.results import FrameMasks
from virst_jax.inference.shared_batches import SharedBatches, StreamEncoder
from virst_jax.inference.steps import ExpressionBatch, Network
from virst_jax.inference.survey import FUSION, TRACKER, VLM, Progress, Survey, say_nothing, take_survey
from virst_jax.inference.texts import check_expressions
from virst_jax.inference.tiles import MaskTiles
from virst_jax.io import timeline
from virst_jax.io.video import Reader, prefetch
from virst_jax.models.sam2.sam2 import Features
from virst_jax.models.sam2.tracker import MemoryBank, Tracked

AHEAD = 8  # frames that the decoding thread may run ahead


@dataclass(frozen=True)
class Chunk:
    """Consecutive frames as they come out of the tracker."""

    start: int  # number of the first frame
    masks: np.ndarray  # bool[N, T, H, W]
    scores: np.ndarray  # float32[N, T], logits of the object's presence
    banks: tuple[MemoryBank, ...]  # memories of every batch behind this chunk: to go on from here
    soft: np.ndarray | None = None  # uint8[N, T, H, W], if asked for: probabilities of 0 to 255
    tracked: tuple[Tracked, ...] = ()  # of every batch, leading axis T, with memories, if asked for


def encode_in_order(
    encoder: StreamEncoder, frames: Iterable[tuple[int, Pixels | None]], known: MutableMapping[int, Features]
) -> Iterator[Features]:
    """Features of frames in order: numbers with pixels uint8[R, R, 3], or with None where they are in `known`.

    What is known is taken out of `known`.
    """
    for number, features in encoder.encode(frames):
        yield known.pop(number) if features is None else features


def propagate(
    network: Network,
    batches: Sequence[ExpressionBatch],
    features: Iterable[Features],
    num_frames: int,
    size: tuple[int, int],
    *,
    chunk: int = 4,
    start: int = 0,
    keep_tracked: bool = False,
    soft: bool = False,
) -> Iterator[Chunk]:
    """Tracks all expressions through a video; one chunk is computed while the one before is taken to the host.

    Args:
      features: of the frames from `start` on, in order.
      size: height and width of the masks.
      chunk: frames a compiled call takes; the results do not depend on it.
      start: number of the first frame; above 0, the batches' memories must be of the frames before.
      keep_tracked: also give what the tracker computed for every frame.
      soft: also give probabilities.

    Raises:
      UserError: there are fewer frames than `num_frames`.
    """
    tiles = MaskTiles(size, network.cfg.sam2.low_res_size)
    source = iter(features)
    waiting: Callable[[], Chunk] | None = None
    for first in range(start, num_frames, chunk):
        count = min(chunk, num_frames - first)
        taken = list(islice(source, count))
        if len(taken) < count:
            raise UserError(f"the video ended after {first + len(taken)} of {num_frames} frames; was it changed?")
        begun = time.perf_counter()
        with timeline.span("start tracking"):
            outcomes = [
                _start_chunk(network, b, tiles, taken, first, num_frames, chunk, keep_tracked, soft) for b in batches
            ]
            for array in jax.tree.leaves(outcomes):
                array.copy_to_host_async()
        if waiting is not None:
            yield waiting()
        rows, banks = [batch.count for batch in batches], tuple(batch.bank for batch in batches)
        waiting = functools.partial(_fetch, tiles, first, count, rows, outcomes, banks, begun)
    if waiting is not None:
        yield waiting()


def _start_chunk(
    network: Network,
    batch: ExpressionBatch,
    tiles: MaskTiles,
    features: Sequence[Features],
    first: int,
    num_frames: int,
    chunk: int,
    keep_tracked: bool,
    soft: bool,
) -> tuple[Any, Any, Tracked | None, jax.Array]:
    """Tracks a chunk: tiles of masks, tiles of probabilities, the whole outcome, scores; what is not wanted is None."""
    out = network.advance(batch, features, first, num_frames, chunk, keep_memory=keep_tracked)
    low_res = out.prediction.low_res
    masks = [[network.resize_masks(low_res, *matrices) for matrices in row] for row in tiles.matrices]
    blurred = [[network.soften_masks(low_res, *m) for m in row] for row in tiles.matrices] if soft else None
    return masks, blurred, out if keep_tracked else None, out.prediction.object_score


def _fetch(
    tiles: MaskTiles,
    first: int,
    count: int,
    rows: Sequence[int],
    outcomes: Sequence[tuple[Any, Any, Tracked | None, jax.Array]],
    banks: tuple[MemoryBank, ...],
    begun: float,
) -> Chunk:
    with timeline.span("wait for masks"):
        jax.block_until_ready(outcomes)
    timeline.flight(f"frames {first} to {first + count - 1}", begun)
    with timeline.span("download masks"):
        masks = [tiles.join(packed)[:count, :n].swapaxes(0, 1) for n, (packed, _, _, _) in zip(rows, outcomes)]
        soft = [
            tiles.join_soft(x)[:count, :n].swapaxes(0, 1) for n, (_, x, _, _) in zip(rows, outcomes) if x is not None
        ]
        scores = [np.asarray(score)[:count, :n].T for n, (_, _, _, score) in zip(rows, outcomes)]
        tracked = [
            jax.tree.map(lambda x, n=n: np.asarray(x)[:count, :n], t) for n, (_, _, t, _) in zip(rows, outcomes) if t
        ]
    blurred = np.concatenate(soft) if soft else None
    return Chunk(first, np.concatenate(masks), np.concatenate(scores), banks, blurred, tuple(tracked))


@contextlib.contextmanager
def _closing(items: Iterator[Any]) -> Iterator[Iterator[Any]]:
    """Ends an iterator that can be ended, such as a reader's generator, which then closes its file."""
    try:
        yield items
    finally:
        if hasattr(items, "close"):
            items.close()


@contextlib.contextmanager
def ahead(items: Generator[Any, None, None]) -> Iterator[Iterator[Any]]:
    """Items made by a thread that runs ahead; behind the block it has ended, and `items` are closed."""
    with contextlib.closing(items), contextlib.closing(prefetch(items, AHEAD)) as ready:
        yield ready


class Run:
    """The work behind a SegmentationStream, which holds it and which it does not know."""

    def __init__(
        self,
        network: Network,
        tokenizer: Tokenizer,
        reader: Reader,
        expressions: tuple[str, ...],
        options: Options,
        progress: Progress | None,
        state: resume.State | None,
        known: Mapping[int, Features] | None,
        survey: Survey | None,
        encoder: StreamEncoder | None,
    ):
        if survey is not None:
            self.survey = survey
        self.encoder = encoder or SharedBatches(network, options.batch).join()
        self.given = dict(known or {})
        self.network, self.tokenizer, self.reader, self.options = network, tokenizer, reader, options
        self.expressions = expressions
        self.timings = dict.fromkeys(("sample", "read", "anchors", "track", "compile"), 0.0)
        self.progress = told = progress or say_nothing
        self._watch = CompileWatch(lambda name: told(f"compile {name}", 0, 0))
        self._known: dict[int, Features] = {}
        self.first, self.batches = 0, list[ExpressionBatch]()
        if state is not None:
            self.first, self.batches = resume.unpack(state, network.steps, len(expressions))
        self._reached = (self.first, [batch.bank for batch in self.batches])

    @functools.cached_property
    def survey(self) -> Survey:
        """Given, or made when it is first asked for; without pixels where no frame is to be sampled any more."""
        with timeline.span("survey"):
            return take_survey(
                self.network.cfg,
                self.reader,
                self.options,
                self.progress,
                pixels=not self.batches,
                resize=self.network.resize,
            )

    @property
    def plan(self) -> Plan:
        return self.survey.plan

    @property
    def num_frames(self) -> int:
        return self.survey.num_frames

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            with watch_compiling(self._watch), timeline.span(stage):
                yield
        finally:
            self.timings[stage] += time.perf_counter() - start
            self.timings["compile"] = self._watch.seconds

    def prepare(self) -> None:
        """Everything before tracking: reads frames and expressions, segments the anchors. Done once."""
        plan = self.plan  # an anchor that is no frame of the video shows first
        if self.batches:
            return
        with self._timed("sample"):
            clips, tops, self._known = self._sample()
            maps = [tops[number] for number in plan.segmentation]
            visual = self.network.encode_visual(clips, self._visual_slots())
            jax.block_until_ready(visual)
        with self._timed("read"):
            anchors = anchor_positions(self.network.cfg, self.plan)
            prompts = read_expressions(
                self.network,
                self.tokenizer,
                self.expressions,
                self.options,
                visual,
                len(clips),
                maps,
                anchors,
                self.progress,
            )
        with self._timed("anchors"):
            features = [self._known[number] for number in plan.anchor_frames]
            slots = self.network.cfg.max_anchors
            self.batches = [
                self.network.start(features, plan.anchor_frames, prompt, slots, count) for count, prompt in prompts
            ]
            jax.block_until_ready([batch.anchors for batch in self.batches])
        self._reached = (0, [batch.bank for batch in self.batches])

    @property
    def features(self) -> Mapping[int, Features]:
        return self._known

    def _visual_slots(self) -> int:
        """Clips of the longest video: visual tokens are padded to theirs."""
        cfg = self.network.cfg
        return 1 if self.options.still else cfg.max_video_frames // cfg.vision.clip_frames

    def _sample(self) -> tuple[np.ndarray, dict[int, jax.Array], dict[int, Features]]:
        """Clips uint8[clips, frames, S, S, 3]; top maps of segmentation frames for the fusion; features of anchors."""
        given = {
            x.number: self.given[x.number] for x in self.survey.pixels if x.use == TRACKER and x.number in self.given
        }
        wanted = [x for x in self.survey.pixels if x.use != TRACKER or x.number not in given]
        pixels: dict[int, np.ndarray] = {}
        features: dict[str, dict[int, Features]] = {FUSION: {}, TRACKER: given}
        encoded = self.encoder.encode((x, None if x.use == VLM else x.image) for x in wanted)
        for done, (x, found) in enumerate(encoded, 1):
            if found is None:
                pixels[x.number] = x.image
            elif x.use == FUSION:  # nothing but the top map is read
                features[FUSION][x.number] = Features(found.top, found.top, found.top)
            else:
                features[TRACKER][x.number] = found
            self.progress("encode", done, len(wanted))
        self.survey = dataclasses.replace(self.survey, pixels=())  # they are read once
        clips = np.stack([pixels[number] for number in self.plan.sampled])
        length = 1 if self.options.still else self.network.cfg.vision.clip_frames
        tops = features[FUSION] if self.options.exact else features[TRACKER]
        return (
            clips.reshape(-1, length, *clips.shape[1:]),
            {number: x.top for number, x in tops.items()},
            features[TRACKER],
        )

    def pixels(self) -> Generator[tuple[int, Pixels | None], None, None]:
        """Numbers of the frames to track, and uint8[R, R, 3], None for those that are encoded already."""
        known, side = frozenset(self._known), self.network.cfg.sam2.image_size
        wanted = [number for number in range(self.first, self.num_frames) if number not in known]
        with _closing(self.reader.pick(wanted) if wanted else iter(())) as frames:
            for number in range(self.first, self.num_frames):
                if number in known:
                    yield number, None
                    continue
                with timeline.span("decode"):
                    frame = next(frames, None)
                if frame is None:  # the tracker says so
                    return
                with timeline.span("resize"):
                    resized = self.network.resize(frame, side, "bicubic")
                yield number, resized

    def frames(self) -> Generator[FrameMasks, None, None]:
        """All frames from `first` on; other streams wait for this one as long as it has not ended."""
        try:
            yield from self._frames()
        finally:
            self.encoder.leave()

    def _frames(self) -> Generator[FrameMasks, None, None]:
        self.prepare()
        if self.first >= self.num_frames:
            return
        network, options = self.network, self.options
        with ahead(self.pixels()) as pixels:
            features = encode_in_order(self.encoder, pixels, self._known)
            size, chunk = self.reader.size, options.chunk
            chunks = propagate(
                network,
                self.batches,
                features,
                self.num_frames,
                size,
                chunk=chunk,
                start=self.first,
                soft=options.soft,
            )
            while True:
                with self._timed("track"):
                    out = next(chunks, None)
                if out is None:
                    return
                count = out.masks.shape[1]
                self._check_numbers(out)
                for i in range(count):
                    self.progress("track", out.start + i + 1, self.num_frames)
                    soft = None if out.soft is None else out.soft[:, i]
                    yield FrameMasks(out.start + i, out.masks[:, i], out.scores[:, i], soft)
                self._reached = (out.start + count, list(out.banks))

    def _check_numbers(self, out: Chunk) -> None:
        """Raises UserError: the network computed no numbers, whose masks would be empty as if nothing was there."""
        bad = np.flatnonzero(~np.isfinite(out.scores).all(axis=0))
        if len(bad):
            raise UserError(
                f"{self.reader.name}: the network gives no numbers for frame {out.start + int(bad[0])}; the model "
                f"is damaged, or its numbers overflow in {self.network.cfg.compute.dtype} (try float32)"
            )

    def state(self) -> dict[str, np.ndarray]:
        after, banks = self._reached
        return resume.pack(after, self.batches, banks)


class SegmentationStream:
    """Yields the FrameMasks of a video in order.

    Making one checks expressions and options; the video is read from the first frame that is asked for on, or from
    `prepare`. `close`, the end of a `with` block, or the end of the stream's life ends its thread and closes the file.

    Args:
      network, tokenizer: of the model.
      reader: the video.
      expressions: one or many.
      options: how it is run.
      progress: called with a stage, how much of it is done, and of how much.
      state: of an earlier stream's `state()` with the same arguments: goes on behind it.
      known: features of frames, by their numbers, that need not be encoded again.
      survey: of the same video with the same options; None: the video is surveyed when that is needed.
      encoder: its part of batches that it shares with streams of other threads; None: it shares none.

    Raises:
      UserError: bad expressions or options, or a state that does not fit.

    Attributes:
      expressions: as they are read.
      reader: the video.
    """

    _run_type = Run

    def __init__(
        self,
        network: Network,
        tokenizer: Tokenizer,
        reader: Reader,
        expressions: str | Sequence[str],
        options: Options,
        progress: Progress | None = None,
        state: resume.State | None = None,
        known: Mapping[int, Features] | None = None,
        survey: Survey | None = None,
        encoder: StreamEncoder | None = None,
    ):
        if progress is not None and not callable(progress):
            raise UserError(f"progress is {progress!r}; give a function of a stage, what is done, and of how much")
        self.expressions = check_expressions(tokenizer, expressions)
        check_options(network.cfg, options)
        self.reader = reader
        self._run = self._run_type(
            network, tokenizer, reader, self.expressions, options, progress, state, known, survey, encoder
        )
        self._frames = self._run.frames()
        # neither refers to the stream: when a loop over it is left, the stream goes at once, and they with it
        self._finalizer = weakref.finalize(self, self._frames.close)

    @property
    def num_frames(self) -> int:
        """Frames of the video; counting them may take a pass over it."""
        return self._run.num_frames

    @property
    def plan(self) -> Plan:
        """Which frames are used for what; needs `num_frames`."""
        return self._run.plan

    @property
    def first(self) -> int:
        """Number of the frame that comes first."""
        return self._run.first

    @property
    def timings(self) -> dict[str, float]:
        """Seconds by stage so far: sample (decoding and encoding the sampled frames), read (language model and
        fusion), anchors, track (with decoding, encoding and resizing beside it), compile (within the others)."""
        return self._run.timings

    def prepare(self) -> None:
        """Does what the first frame waits for: reads the sampled frames and the expressions, segments the anchors."""
        self._run.prepare()

    @property
    def labels(self) -> tuple[str, ...]:
        """What each row of the masks shows, behind `prepare`."""
        return self.expressions

    @property
    def object_ids(self) -> tuple[int, ...]:
        """Numbers of the rows, from 1 on."""
        return tuple(range(1, len(self.labels) + 1))

    @property
    def batches(self) -> Sequence[ExpressionBatch]:
        """The expressions with their anchors, in order; empty before `prepare`."""
        return self._run.batches

    @property
    def features(self) -> Mapping[int, Features]:
        """Of the frames that were encoded and are not tracked yet, by their numbers."""
        return self._run.features

    def state(self) -> dict[str, np.ndarray]:
        """What another stream needs to go on behind the last finished chunk of frames; to be kept with np.savez."""
        return self._run.state()

    def __iter__(self) -> Iterator[FrameMasks]:
        return self

    def __next__(self) -> FrameMasks:
        return next(self._frames)

    def close(self) -> None:
        """Ends the stream: no frame comes any more."""
        self._frames.close()

    def __enter__(self) -> "SegmentationStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"SegmentationStream({self.reader.name!r}, expressions={list(self.expressions)})"
