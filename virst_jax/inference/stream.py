"""A video and its expressions through the network, frame by frame, each frame encoded once.

The video is decoded twice, by a thread that runs ahead: once for the frames that are sampled from all of it, which
the language model and the fusion read, once for tracking. Features of sampled frames are kept until tracking has
passed them.

Axes: N expressions, O expressions of a group, T frames, H, W size of the video, F segmentation frames, A anchors,
P positions of a prefix, L of a text, R side of the tracker's image.
"""

import contextlib
import random
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from virst_jax.config import VirstConfig
from virst_jax.data.frames import eval_anchors, flex_frames, segmentation_frames
from virst_jax.data.prompts import (
    ANSWERS,
    QUESTIONS,
    Tokenizer,
    build_prompt,
    choose_templates,
    normalize_expression,
)
from virst_jax.data.sequence import splice
from virst_jax.data.transforms import MEAN, STD, resize_frames
from virst_jax.errors import UserError
from virst_jax.inference.steps import ExpressionBatch, Network
from virst_jax.io.video import Reader, prefetch
from virst_jax.models.sam2.sam2 import Features, Prediction
from virst_jax.models.sam2.tracker import Anchors, MemoryBank

MAX_EXPRESSION_TOKENS = 512
TEXT_BUCKET = 64  # texts are padded to multiples of so many tokens
PREFIX_BUCKET = 32
AHEAD = 8  # frames that the decoding thread may run ahead
SCALE = (np.array(255, np.float32), MEAN, STD)

Seed = int | Sequence[int]
Progress = Callable[[str, int, int], None]
ReleaseRandom = tuple[np.random.RandomState, random.Random]


@dataclass(frozen=True)
class Plan:
    """Which frames of a video are used for what, by their numbers."""

    sampled: tuple[int, ...]  # read by the language model
    segmentation: tuple[int, ...]  # read by the fusion: F of them
    anchors: tuple[int, ...]  # positions among the segmentation frames: A of them

    @property
    def anchor_frames(self) -> tuple[int, ...]:
        return tuple(self.segmentation[i] for i in self.anchors)


@dataclass(frozen=True)
class FrameMasks:
    """One frame's outcome."""

    index: int  # number of the frame
    masks: np.ndarray  # bool[N, H, W]
    scores: np.ndarray  # float32[N], logits: the object is there where it is above 0


@dataclass(frozen=True)
class Options:
    """How a video is run; see api.Model.segment."""

    seed: Seed = 0
    exact: bool = False
    anchors: Sequence[int] | None = None
    release_random: ReleaseRandom | None = None
    still: bool = False  # a picture
    batch: int = 1
    chunk: int = 4
    group_size: int = 8


def plan_frames(cfg: VirstConfig, num_frames: int, options: Options) -> Plan:
    """Chooses the frames.

    Raises:
      UserError: an anchor that the video does not have, or too many.
    """
    if options.still:
        return Plan((0,), (0,), (0,))
    draws, draw = options.release_random or (None, None)
    clip = cfg.vision.clip_frames
    sampled = flex_frames(
        num_frames,
        options.seed,
        max_frames=cfg.max_video_frames,
        min_frames=min(8, cfg.max_video_frames),
        clip_frames=clip,
        release_random=draws,
    )
    chosen = [sampled[i] for i in segmentation_frames(len(sampled), cfg.max_seg_frames, release_random=draw)]
    if options.anchors is None:
        return Plan(tuple(sampled), tuple(chosen), tuple(eval_anchors(len(chosen), cfg.frames_per_anchor)))
    anchors = sorted(set(options.anchors))
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


@dataclass(frozen=True)
class Texts:
    """Conversations of a video, cut behind its visual tokens."""

    prefix_ids: np.ndarray  # int32[1, P]
    prefix_visual: np.ndarray  # int32[1, P], which visual token stands here; -1: text
    prefix_mask: np.ndarray  # bool[1, P]
    rows: list[tuple[np.ndarray, np.ndarray]]  # of every expression its ids int32[L] and [SEG] positions int32[K]

    def batch(self, first: int, count: int, bucket: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`count` rows padded to `bucket` of one length: ids int32[O, L], mask bool[O, L], [SEG] int32[O, K]."""
        rows = self.rows[first : first + count]
        rows = rows + [rows[0]] * (bucket - count)
        length = round_up(max(len(ids) for ids, _ in rows), TEXT_BUCKET)
        ids = np.stack([np.pad(ids, (0, length - len(ids))) for ids, _ in rows])
        mask = np.stack([np.arange(length) < len(ids) for ids, _ in rows])
        return ids, mask, np.stack([seg for _, seg in rows])


def check_expressions(tokenizer: Tokenizer, expressions: str | Sequence[str]) -> tuple[str, ...]:
    """One or many expressions as the release evaluates them: lower case, single spaces.

    Raises:
      UserError: none, or one that is empty, too long or holds a control token.
    """
    given = (expressions,) if isinstance(expressions, str) else tuple(expressions)
    if not given:
        raise UserError("no expression was given: describe at least one object in words")
    checked = tuple(normalize_expression(text) for text in given)
    for text in checked:
        length = len(tokenizer.encode(text))
        if length > MAX_EXPRESSION_TOKENS:
            raise UserError(
                f"the expression {text[:40]!r}... takes {length} tokens, at most {MAX_EXPRESSION_TOKENS} are read: "
                "shorten it"
            )
    return checked


def build_texts(
    cfg: VirstConfig, tokenizer: Tokenizer, expressions: Sequence[str], num_visual: int, slots: int, options: Options
) -> Texts:
    """The conversations of expressions.

    Args:
      expressions: from `check_expressions`.
      num_visual: visual tokens there are.
      slots: visual tokens there is room for.
    """
    rows, heads = [], []
    for expression in expressions:
        question, answer = _templates(expression, options)
        prompt = build_prompt(
            tokenizer, expression, question_index=question, answer_index=answer, num_seg_tokens=cfg.num_seg_tokens
        )
        row = splice(prompt.input_ids.tolist(), prompt.labels.tolist(), num_visual, cfg.seg_token_id)
        cut = int(np.flatnonzero(row.visual_index >= 0)[-1]) + 1
        heads.append((row.token_ids[:cut], row.visual_index[:cut]))
        rows.append((row.token_ids[cut:], row.seg_positions - cut))
    ids, visual = heads[0]
    if any(not np.array_equal(ids, other) for other, _ in heads):
        raise ValueError("conversations of one video must begin alike")
    length = round_up(len(ids) + slots - num_visual, PREFIX_BUCKET)
    pad = (0, length - len(ids))
    return Texts(
        np.pad(ids, pad)[None],
        np.pad(visual, pad, constant_values=-1)[None],
        (np.arange(length) < len(ids))[None],
        rows,
    )


def _templates(expression: str, options: Options) -> tuple[int, int]:
    if options.release_random is not None:
        draw, kind = options.release_random[1], "long" if expression.endswith("?") else "short"
        return draw.choice(range(len(QUESTIONS[kind]))), draw.choice(range(len(ANSWERS)))
    if isinstance(options.seed, int):
        return choose_templates(expression, options.seed)
    return choose_templates(f"{[int(part) for part in options.seed]}:{expression}")


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


@dataclass(frozen=True)
class Use:
    """What frames are resized for."""

    frames: frozenset[int]
    side: int
    method: str


def sampled_pixels(reader: Reader, uses: Mapping[str, Use]) -> Iterator[tuple[int, str, np.ndarray]]:
    """Number, use and uint8[side, side, 3] of the frames that are used, in the order of the video."""
    numbers = sorted(frozenset[int]().union(*(use.frames for use in uses.values())))
    for number, frame in zip(numbers, reader.pick(numbers)):
        for name, use in uses.items():
            if number in use.frames:
                yield number, name, resize_frames(frame[None], use.side, use.method)[0]


class SegmentationStream:
    """Yields the FrameMasks of a video in order.

    Making one reads the sampled frames and the expressions. `close`, or the end of a `with` block, ends its thread.

    Attributes:
      expressions: as they were read.
      reader, num_frames, plan: the video, its length, and which of its frames are used for what.
      first: number of the frame that comes first.
      timings: seconds by stage so far: sample (decoding and encoding the sampled frames), read (language model and
        fusion), anchors, track (with decoding, encoding and resizing beside it), compile (within the others).
    """

    def __init__(
        self,
        network: Network,
        tokenizer: Tokenizer,
        reader: Reader,
        expressions: str | Sequence[str],
        options: Options,
        progress: Progress | None = None,
        state: Mapping[str, np.ndarray] | None = None,
    ):
        # what is wrong with the expressions shows before the video is read
        self.expressions = check_expressions(tokenizer, expressions)
        self.network, self.reader, self.options = network, reader, options
        self.timings = dict.fromkeys(("sample", "read", "anchors", "track", "compile"), 0.0)
        self._progress: Progress = progress or (lambda stage, done, total: None)
        self._compiled_before = network.compile_seconds
        network.on_compile = lambda name: self._progress(f"compile {name}", 0, 0)
        self._progress("decode", 0, 0)
        self.num_frames = reader.num_frames
        self.plan = plan_frames(network.cfg, self.num_frames, options)
        self._known: dict[int, Features] = {}
        self.first = 0
        self._groups = self._prompt(tokenizer) if state is None else self._restore(state)
        self._reached = (self.first, tuple(group.bank for group in self._groups))
        self._frames = self._track()

    def __iter__(self) -> Iterator[FrameMasks]:
        return self

    def __next__(self) -> FrameMasks:
        return next(self._frames)

    def close(self) -> None:
        self._frames.close()

    def __enter__(self) -> "SegmentationStream":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.timings[stage] += time.perf_counter() - start
            self.timings["compile"] = self.network.compile_seconds - self._compiled_before

    def _sample(self) -> tuple[np.ndarray, dict[int, jax.Array], dict[int, Features]]:
        """Clips uint8[clips, frames, S, S, 3]; top maps of segmentation frames for the fusion; features of anchors."""
        cfg, plan, exact = self.network.cfg, self.plan, self.options.exact
        side = cfg.sam2.image_size
        fusion = frozenset(plan.segmentation)
        uses = {
            "vlm": Use(frozenset(plan.sampled), cfg.vision.image_size, "bicubic"),
            "fusion": Use(fusion if exact else frozenset(), side, "bilinear"),
            # anchors are tracked frames; without `exact` the fusion reads features of tracked frames
            "tracker": Use(frozenset(plan.anchor_frames) if exact else fusion, side, "bicubic"),
        }
        total, done = sum(len(use.frames) for use in uses.values()), 0
        pixels: dict[int, np.ndarray] = {}
        features: dict[str, dict[int, Features]] = {"fusion": {}, "tracker": {}}
        waiting: dict[str, list[tuple[int, np.ndarray]]] = {"fusion": [], "tracker": []}

        def encode(name: str) -> None:
            batch, waiting[name] = waiting[name], []
            if batch:
                encoded = self.network.encode_batch(np.stack([x for _, x in batch]), self.options.batch, SCALE)
                if name == "fusion":  # nothing but the top map is read
                    encoded = [Features(x.top, x.top, x.top) for x in encoded]
                features[name].update(zip((number for number, _ in batch), encoded))

        with contextlib.closing(prefetch(sampled_pixels(self.reader, uses), AHEAD)) as frames:
            for number, name, image in frames:
                if name == "vlm":
                    pixels[number] = image
                else:
                    waiting[name].append((number, image))
                    if len(waiting[name]) == self.options.batch:
                        encode(name)
                done += 1
                self._progress("encode", done, total)
        encode("fusion")
        encode("tracker")
        if len(pixels) < len(uses["vlm"].frames):
            raise UserError(f"{self.reader.name}: the video ended early; was it changed while it was read?")
        clips = np.stack([pixels[number] for number in plan.sampled])
        count = 1 if self.options.still else cfg.vision.clip_frames
        tops = features["fusion"] if exact else features["tracker"]
        return (
            clips.reshape(-1, count, *clips.shape[1:]),
            {number: x.top for number, x in tops.items()},
            features["tracker"],
        )

    def _prompt(self, tokenizer: Tokenizer) -> list[ExpressionBatch]:
        """Everything before tracking: reads frames and expressions, segments the anchors."""
        network, cfg, plan, options = self.network, self.network.cfg, self.plan, self.options
        with self._timed("sample"):
            clips, tops, self._known = self._sample()
            slots = 1 if options.still else cfg.max_video_frames // cfg.vision.clip_frames
            visual = network.encode_visual(clips, slots, SCALE)
            jax.block_until_ready(visual)
        with self._timed("read"):
            tokens = visual[0].shape[0]
            texts = build_texts(cfg, tokenizer, self.expressions, len(clips) * tokens, slots * tokens, options)
            cache = network.read_video(visual, texts.prefix_ids, texts.prefix_visual, texts.prefix_mask)
            maps = [tops[number] for number in plan.segmentation]
            positions = np.pad(np.asarray(plan.anchors, np.int32), (0, cfg.max_anchors - len(plan.anchors)))
            prompts, counts = [], []
            for first in range(0, len(self.expressions), options.group_size):
                self._progress("read", first, len(self.expressions))
                counts.append(min(options.group_size, len(self.expressions) - first))
                ids, mask, seg = texts.batch(first, counts[-1], 1 << (counts[-1] - 1).bit_length())
                hidden = network.read_text(cache, ids, mask, seg, maps)
                prompts.append(network.fuse(hidden, maps, positions)[0])
            jax.block_until_ready(prompts)
            self._progress("read", len(self.expressions), len(self.expressions))
        with self._timed("anchors"):
            features = [self._known[number] for number in plan.anchor_frames]
            groups = []
            for count, prompt in zip(counts, prompts):
                group = network.start(features, plan.anchor_frames, prompt, cfg.max_anchors)
                group.count = count
                groups.append(group)
            jax.block_until_ready([group.anchors for group in groups])
        return groups

    def _pixels(self) -> Iterator[tuple[int, np.ndarray | None]]:
        """The frames to track, None for those that are encoded already."""
        known, side = frozenset(self._known), self.network.cfg.sam2.image_size
        wanted = [number for number in range(self.first, self.num_frames) if number not in known]
        frames = self.reader.pick(wanted) if wanted else iter(())
        for number in range(self.first, self.num_frames):
            if number in known:
                yield number, None
                continue
            frame = next(frames, None)
            if frame is None:  # the tracker says so
                return
            yield number, resize_frames(frame[None], side, "bicubic")[0]

    def _track(self) -> Generator[FrameMasks, None, None]:
        if self.first >= self.num_frames:
            return
        network, options = self.network, self.options
        with contextlib.closing(prefetch(self._pixels(), AHEAD)) as pixels:
            features = network.encode_in_order(pixels, self._known, options.batch, SCALE)
            chunks = network.propagate(
                self._groups, features, self.num_frames, self.reader.size, chunk=options.chunk, start=self.first
            )
            while True:
                with self._timed("track"):
                    chunk = next(chunks, None)
                if chunk is None:
                    return
                count = chunk.masks.shape[1]
                for i in range(count):
                    self._progress("track", chunk.start + i + 1, self.num_frames)
                    yield FrameMasks(chunk.start + i, chunk.masks[:, i], chunk.scores[:, i])
                self._reached = (chunk.start + count, chunk.banks)

    def state(self) -> dict[str, np.ndarray]:
        """What another stream needs to go on behind the last finished chunk of frames; to be kept with np.savez."""
        after, banks = self._reached
        kept = {"next": np.array(after)}
        for i, (group, bank) in enumerate(zip(self._groups, banks)):
            kept[f"{i}.count"] = np.array(group.count)
            for name, tree in (("anchors", group.anchors), ("recent", bank)):
                for j, leaf in enumerate(jax.tree.leaves(jax.device_get(tree))):
                    low = leaf.dtype.name == "bfloat16"  # which .npy files cannot name
                    kept[f"{i}.{name}.{j}" + (".bfloat16" if low else "")] = leaf.view(np.uint16) if low else leaf
        return kept

    def _restore(self, state: Mapping[str, np.ndarray]) -> list[ExpressionBatch]:
        groups: list[ExpressionBatch] = []
        self.first = int(state["next"])
        while f"{len(groups)}.count" in state:
            i = len(groups)
            trees = []
            for name, kind in (("anchors", _ANCHORS), ("recent", _BANK)):
                leaves = []
                for j in range(kind.num_leaves):
                    key = f"{i}.{name}.{j}"
                    leaves.append(state[key] if key in state else state[f"{key}.bfloat16"].view("bfloat16"))
                trees.append(jax.tree.unflatten(kind, leaves))
            groups.append(ExpressionBatch(trees[0], trees[1], int(state[f"{i}.count"])))
        return groups


def _structure(cls: Any, *leaves: Any) -> Any:
    return jax.tree.structure(cls(*leaves))


_ANCHORS = _structure(Anchors, 0, 0, Prediction(*[np.zeros(())] * 4), 0)  # type: ignore[arg-type]
_BANK = _structure(MemoryBank, 0, 0, 0, 0)
