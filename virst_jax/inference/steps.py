"""The network's steps as compiled functions, and a whole video through them.

Shapes are fixed per step: a video of any length and size, with any number of expressions, runs through the same few
compiled functions. What varies is padded: expressions to a bucket, text to a multiple of 64 tokens, the last batch
and the last chunk of frames, the visual tokens of a short video; masks are cut from tiles.

Axes: O expressions, T frames, F segmentation frames, A anchors, N [SEG] tokens, R side of the tracker's image,
S side of the video encoder's image, L mask side, P positions of a prefix.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from virst_jax.config import VirstConfig
from virst_jax.errors import UserError
from virst_jax.models.qwen2 import Cache, init_cache
from virst_jax.models.sam2.sam2 import Features, Sam2
from virst_jax.models.sam2.tracker import Anchors, MemoryBank, Tracked, Tracker
from virst_jax.models.virst import Virst
from virst_jax.ops.resize import resize_matrix

TILE = 256  # rows and columns of a piece of mask at the video's size


@flax.struct.dataclass
class Understanding:
    """What the language model made of a video and its expressions."""

    visual_tokens: jax.Array  # dtype[1, V, D]
    inputs_embeds: jax.Array  # dtype[O, L, D], before the initial fusion
    hidden_layers: jax.Array  # dtype[layers + 1, O, N, D], what enters each layer at [SEG], and the final hidden state
    seg_hidden: jax.Array  # dtype[O, N, D]
    prompts: jax.Array  # dtype[O, N, F, C]
    frame_scores: jax.Array  # float32[O, F]


@dataclass
class ExpressionBatch:
    """Expressions that are tracked together: their anchors, and the memories of the frames so far."""

    anchors: Anchors
    bank: MemoryBank
    count: int  # the rows that count; the others are padding


@dataclass(frozen=True)
class Chunk:
    """Consecutive frames as they come out of the tracker."""

    start: int  # number of the first frame
    masks: np.ndarray  # bool[O, T, H, W]
    scores: np.ndarray  # float32[O, T], logits of the object's presence
    banks: tuple[MemoryBank, ...]  # of every group behind this chunk: to go on from here


class Network:
    """Compiled steps of VIRST for one set of parameters.

    Args:
      cfg: the network.
      params: of `Virst(cfg)`.
      context: entered around every step, such as a mesh.
    """

    def __init__(
        self,
        cfg: VirstConfig,
        params: Any,
        context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ):
        self.cfg, self.params, self.context = cfg, params, context
        self.model = Virst(cfg)
        self.tracker = Tracker(Sam2(cfg.sam2, cfg.compute))
        self.on_compile: Callable[[str], None] = lambda name: None
        self.compile_seconds = 0.0
        self._compiled: dict[str, Any] = {}
        self._seen: set[Any] = set()

    @property
    def num_compiled(self) -> int:
        """How many functions, counted by the shapes of their arguments, were compiled so far."""
        return len(self._seen)

    def _run(self, step: Callable[..., Any], *args: Any, **static: Any) -> Any:
        """Calls a step of this class, compiled for the arguments' shapes; tells `on_compile` before it compiles."""
        name = step.__name__.removeprefix("_step_")
        if name not in self._compiled:
            self._compiled[name] = jax.jit(step, static_argnames=tuple(static))
        leaves, structure = jax.tree.flatten(args[1:])
        shapes = tuple((x.shape, str(x.dtype)) for x in leaves)
        key = (name, structure, shapes, tuple(sorted(static.items())))
        with self.context():
            if key in self._seen:
                return self._compiled[name](*args, **static)
            self.on_compile(name)
            start = time.perf_counter()
            out = self._compiled[name](*args, **static)
            self.compile_seconds += time.perf_counter() - start
        self._seen.add(key)
        return out

    # --- the steps, as functions of the parameters

    def _apply(self, params: Any, method: Callable[..., Any], *args: Any) -> Any:
        return self.model.apply({"params": params}, *args, method=method)

    def _step_encode(self, params: Any, pixels: jax.Array) -> Features:
        features: Any = self.tracker.sam.apply({"params": params}, pixels, method=Sam2.encode_image)
        return features

    def _step_encode_batch(self, params: Any, pixels: jax.Array, scale: Sequence[jax.Array]) -> tuple[Features, ...]:
        features = self._step_encode(params, _normalize(pixels, scale))
        return tuple(jax.tree.map(lambda x, i=i: x[i], features) for i in range(pixels.shape[0]))

    def _step_encode_clip(self, params: Any, clip: jax.Array) -> jax.Array:
        return self._apply(params, Virst.encode_clips, clip)

    def _step_visual(self, params: Any, clip: jax.Array, scale: Sequence[jax.Array]) -> jax.Array:
        return self._step_encode_clip(params, _normalize(clip, scale)[None])[0]

    def _step_understand(
        self,
        params: Any,
        visual: jax.Array,
        maps: jax.Array,
        ids: jax.Array,
        index: jax.Array,
        mask: jax.Array,
        seg: jax.Array,
    ) -> Understanding:
        apply = functools.partial(self._apply, params)

        def for_each(x: jax.Array) -> jax.Array:
            return jnp.broadcast_to(x, (ids.shape[0], *x.shape[1:]))

        text = embeds = apply(Virst.embed, ids, index, for_each(visual))
        if self.cfg.fusion.initial:
            embeds = apply(Virst.fuse_initially, embeds, seg, for_each(maps))
        hidden, layers = apply(Virst.hidden_layers, embeds, mask)
        prompts, scores = apply(Virst.prompts, hidden, seg, for_each(maps))
        rows = jnp.arange(ids.shape[0])[:, None]
        at_seg = hidden[rows, seg]
        layers = jnp.concatenate([layers[:, rows, seg], at_seg[None]])
        return Understanding(visual, text, layers, at_seg, prompts, scores)

    def _step_embed(self, params: Any, visual: Sequence[jax.Array], ids: jax.Array, index: jax.Array) -> jax.Array:
        tokens = jnp.concatenate(visual)[None]
        return self._apply(params, Virst.embed, ids, index, tokens)

    def _step_read_video(
        self, params: Any, visual: Sequence[jax.Array], ids: jax.Array, index: jax.Array, mask: jax.Array
    ) -> Cache:
        def read(model: Virst) -> Cache:
            embeds = model.embed(ids, index, jnp.concatenate(visual)[None])
            cache = init_cache(self.cfg.llm, self.cfg.compute, 1, ids.shape[1])
            return model.llm(embeds, mask, cache=cache)[1]

        return self._apply(params, read)

    def _step_read_text(
        self, params: Any, cache: Cache, ids: jax.Array, mask: jax.Array, seg: jax.Array, tops: Sequence[jax.Array]
    ) -> jax.Array:
        rows, more = ids.shape

        def for_each(x: jax.Array, batch_axis: int) -> jax.Array:
            return jnp.broadcast_to(x, (*x.shape[:batch_axis], rows, *x.shape[batch_axis + 1 :]))

        def slots(x: jax.Array, axis: int) -> jax.Array:
            return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])

        known = Cache(
            slots(for_each(cache.k, 1), 2),
            slots(for_each(cache.v, 1), 2),
            slots(for_each(cache.mask, 0), 1),
            for_each(cache.length, 0),
        )

        def read(model: Virst) -> jax.Array:
            embeds = model.llm.embed(ids)
            if tops:
                maps = jnp.stack(tops)
                embeds = model.fuse_initially(embeds, seg, jnp.broadcast_to(maps, (rows, *maps.shape)))
            hidden, _ = model.llm(embeds, mask, cache=known)
            return hidden[jnp.arange(rows)[:, None], seg]

        return self._apply(params, read)

    def _step_fuse(
        self, params: Any, seg_hidden: jax.Array, tops: Sequence[jax.Array], anchors: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        maps = jnp.stack(tops)
        maps = jnp.broadcast_to(maps, (seg_hidden.shape[0], *maps.shape))
        prompts, scores = self._apply(params, lambda model: model.second_fusion(seg_hidden, maps))
        return prompts[:, :, anchors].swapaxes(1, 2), scores

    def _step_anchor(
        self, params: Any, features: Sequence[Features], frames: jax.Array, valid: jax.Array, prompts: jax.Array
    ) -> Anchors:
        return self.tracker.prompt_anchors(params, _stack(features), frames, valid, prompts)

    def _step_start(self, params: Any, anchors: Anchors) -> MemoryBank:
        return self.tracker.start(anchors.memory.shape[1])

    def _step_track(
        self,
        params: Any,
        anchors: Anchors,
        bank: MemoryBank,
        features: Sequence[Features],
        frames: jax.Array,
        valid: jax.Array,
        num_frames: jax.Array,
        keep_memory: bool,
    ) -> tuple[MemoryBank, Tracked]:
        return self.tracker.track(params, anchors, bank, _stack(features), frames, valid, num_frames, keep_memory)

    def _step_masks(self, params: None, low_res: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
        # as ops.resize.resize_maps, and at the same precision
        masks = jnp.einsum("ih,...hw,jw->...ij", rows, low_res, columns, precision=jax.lax.Precision.HIGHEST) > 0
        return jnp.packbits(masks, axis=-1)

    # --- what they are called with

    def encode_frames(self, frames: Iterable[np.ndarray]) -> Features:
        """Normalised frames float32[R, R, 3] -> their features, encoded one at a time."""
        encoded = [self._run(self._step_encode, self.params["sam2"], jnp.asarray(frame)[None]) for frame in frames]
        return jax.tree.map(lambda *x: jnp.concatenate(x), *encoded)

    def encode_batch(self, frames: np.ndarray, batch: int, scale: Sequence[np.ndarray]) -> list[Features]:
        """Frames uint8[T, R, R, 3], at most `batch`, of which the features of each; padded to `batch`.

        scale: float32[] and twice float32[3]: divisor, mean and deviation that normalise the pixels.
        """
        count = len(frames)
        padded = np.concatenate([frames, np.repeat(frames[-1:], batch - count, axis=0)])
        return list(self._run(self._step_encode_batch, self.params["sam2"], padded, scale)[:count])

    def encode_visual(self, clips: np.ndarray, slots: int, scale: Sequence[np.ndarray]) -> list[jax.Array]:
        """Clips uint8[clips, frames, S, S, 3] -> visual tokens dtype[tokens, D] of each, then zeros up to `slots`."""
        parts = [self._run(self._step_visual, self.params, clip, scale) for clip in clips]
        zeros = np.zeros(parts[0].shape, parts[0].dtype)
        return parts + [zeros] * (slots - len(parts))

    def understand(
        self,
        clips: np.ndarray,
        maps: jax.Array,
        token_ids: np.ndarray,
        visual_index: np.ndarray,
        mask: np.ndarray,
        seg_positions: np.ndarray,
    ) -> Understanding:
        """Reads the video and the expressions, each conversation from its first token to its last.

        Args:
          clips: float32[clips, frames, S, S, 3], normalised.
          maps: dtype[F, H, W, C], top features of the segmentation frames.
          token_ids: int32[O, L], see data.sequence.
          visual_index: int32[O, L].
          mask: bool[O, L].
          seg_positions: int32[O, N].
        """
        tokens = [self._run(self._step_encode_clip, self.params, jnp.asarray(clip)[None]) for clip in clips]
        visual = jnp.concatenate(tokens, axis=1)
        return self._run(
            self._step_understand, self.params, visual, maps[None], token_ids, visual_index, mask, seg_positions
        )

    def embed(self, visual: Sequence[jax.Array], ids: np.ndarray, index: np.ndarray) -> jax.Array:
        """Input embeddings dtype[1, L, D] of a conversation: visual of `encode_visual`, ids and index int32[1, L]."""
        return self._run(self._step_embed, self.params, tuple(visual), ids, index)

    def read_video(self, visual: Sequence[jax.Array], ids: np.ndarray, index: np.ndarray, mask: np.ndarray) -> Cache:
        """Reads what all conversations of a video begin with.

        Args:
          visual: of `encode_visual`.
          ids, index: int32[1, P], see data.sequence.
          mask: bool[1, P].
        """
        return self._run(self._step_read_video, self.params, tuple(visual), ids, index, mask)

    def read_text(
        self, cache: Cache, ids: np.ndarray, mask: np.ndarray, seg: np.ndarray, tops: Sequence[jax.Array]
    ) -> jax.Array:
        """Reads the rest of the conversations.

        Args:
          cache: of `read_video`.
          ids: int32[O, L].
          mask: bool[O, L].
          seg: int32[O, N], where the [SEG] tokens stand.
          tops: F maps dtype[H, W, C], for the initial fusion.

        Returns:
          Hidden states at [SEG], dtype[O, N, D].
        """
        tops = tuple(tops) if self.cfg.fusion.initial else ()
        return self._run(self._step_read_text, self.params, cache, ids, mask, seg, tops)

    def fuse(
        self, seg_hidden: jax.Array, tops: Sequence[jax.Array], anchors: np.ndarray
    ) -> tuple[jax.Array, jax.Array]:
        """Second fusion: seg_hidden dtype[O, N, D] and F maps dtype[H, W, C] -> the prompts of some of these frames,
        dtype[O, A, N, C], and scores of all of them, float32[O, F].

        anchors: int32[A], positions among the F frames.
        """
        return self._run(self._step_fuse, self.params, seg_hidden, tuple(tops), anchors)

    def start(
        self, features: Sequence[Features], frames: Sequence[int], prompts: jax.Array, slots: int
    ) -> ExpressionBatch:
        """Segments the anchors of a group of expressions: ready to be tracked.

        Args:
          features: of the anchors.
          frames: their numbers.
          prompts: dtype[O, slots, N, C], any where there is no anchor.
        """
        count = len(frames)
        padded = (*features, *[features[-1]] * (slots - count))
        numbers = np.pad(np.asarray(frames, np.int32), (0, slots - count))
        valid = np.arange(slots) < count
        anchors = self._run(self._step_anchor, self.params["sam2"], padded, numbers, valid, prompts)
        return ExpressionBatch(anchors, self._run(self._step_start, None, anchors), prompts.shape[0])

    def prompt_anchors(self, features: Features, frames: np.ndarray, prompts: jax.Array, slots: int) -> Anchors:
        """Segments the anchors: features [A, ...], frames int[A], prompts dtype[O, N, A, C]; padded to `slots`."""
        each = [jax.tree.map(lambda x, i=i: x[i], features) for i in range(len(frames))]
        tokens = jnp.pad(prompts.swapaxes(1, 2), ((0, 0), (0, slots - len(frames)), (0, 0), (0, 0)))
        return self.start(each, frames.tolist(), tokens, slots).anchors

    def track(
        self,
        anchors: Anchors,
        frames: Iterable[np.ndarray],
        num_frames: int,
        *,
        chunk: int = 4,
        keep_memory: bool = False,
    ) -> Iterator[Tracked]:
        """Tracks a video and yields its frames' outcomes one by one.

        Args:
          anchors: from `prompt_anchors`.
          frames: normalised frames float32[R, R, 3] of the whole video, in order; read chunk by chunk.
          num_frames: how many they are.
          chunk: frames a compiled call takes; the results do not depend on it.
          keep_memory: also give every frame's memory.
        """
        bank = self._run(self._step_start, None, anchors)
        source = iter(frames)
        for start in range(0, num_frames, chunk):
            count = min(chunk, num_frames - start)
            features = self.encode_frames(islice(source, count))
            each = [jax.tree.map(lambda x, i=i: x[i], features) for i in range(count)]
            bank, out = self._advance(anchors, bank, each, start, num_frames, chunk, keep_memory)
            for i in range(count):
                yield jax.tree.map(lambda x, i=i: x[i], out)

    def _advance(
        self,
        anchors: Anchors,
        bank: MemoryBank,
        features: Sequence[Features],
        start: int,
        num_frames: int,
        chunk: int,
        keep_memory: bool = False,
    ) -> tuple[MemoryBank, Tracked]:
        count = len(features)
        return self._run(
            self._step_track,
            self.params["sam2"],
            anchors,
            bank,
            (*features, *[features[-1]] * (chunk - count)),
            np.arange(start, start + chunk, dtype=np.int32),
            np.arange(chunk) < count,
            np.int32(num_frames),
            keep_memory=keep_memory,
        )

    def encode_in_order(
        self,
        frames: Iterable[tuple[int, np.ndarray | None]],
        known: MutableMapping[int, Features],
        batch: int,
        scale: Sequence[np.ndarray],
    ) -> Iterator[Features]:
        """Features of frames in order: numbers with pixels uint8[R, R, 3], or with None where they are in `known`.

        `batch` frames are encoded at a time; what is known is taken out of `known`.
        """
        source = iter(frames)
        while True:
            order: list[int] = []
            pixels: list[np.ndarray] = []
            for number, frame in source:
                order.append(number)
                if frame is not None:
                    pixels.append(frame)
                if len(pixels) == batch:
                    break
            if not order:
                return
            # numbers without pixels are known
            encoded = iter(self.encode_batch(np.stack(pixels), batch, scale) if pixels else [])
            for number in order:
                yield known.pop(number) if number in known else next(encoded)

    def propagate(
        self,
        groups: Sequence[ExpressionBatch],
        features: Iterable[Features],
        num_frames: int,
        size: tuple[int, int],
        *,
        chunk: int = 4,
        start: int = 0,
    ) -> Iterator[Chunk]:
        """Tracks all groups through a video; one chunk is computed while the one before is taken to the host.

        Args:
          features: of the frames from `start` on, in order.
          size: height and width of the masks.
          chunk: frames a compiled call takes; the results do not depend on it.
          start: number of the first frame; above 0, the groups' memories must be of the frames before.

        Raises:
          UserError: there are fewer frames than `num_frames`.
        """
        resize = _Resize(size, self.cfg.sam2.low_res_size)
        source = iter(features)
        waiting: tuple[Any, ...] | None = None
        for first in range(start, num_frames, chunk):
            count = min(chunk, num_frames - first)
            taken = list(islice(source, count))
            if len(taken) < count:
                raise UserError(f"the video ended after {first + len(taken)} of {num_frames} frames; was it changed?")
            outcomes = []
            for group in groups:
                group.bank, out = self._advance(group.anchors, group.bank, taken, first, num_frames, chunk)
                tiles = [
                    [self._run(self._step_masks, None, out.prediction.low_res, *pair) for pair in row]
                    for row in resize.tiles
                ]
                outcomes.append((group.count, tiles, out.prediction.object_score))
            for array in jax.tree.leaves(outcomes):
                if isinstance(array, jax.Array):
                    array.copy_to_host_async()
            if waiting is not None:
                yield _fetch(resize, *waiting)
            waiting = (first, count, outcomes, tuple(group.bank for group in groups))
        if waiting is not None:
            yield _fetch(resize, *waiting)


class _Resize:
    """Matrices that cut masks of one size into tiles of always the same shape."""

    def __init__(self, size: tuple[int, int], side: int):
        self.size = size
        rows, columns = (self._pieces(resize_matrix(side, length, "bilinear")) for length in size)
        self.tiles = [[(r, c) for c in columns] for r in rows]

    @staticmethod
    def _pieces(matrix: np.ndarray) -> list[jax.Array]:
        pieces = (matrix[i : i + TILE] for i in range(0, len(matrix), TILE))
        return [jnp.asarray(np.pad(piece, ((0, TILE - len(piece)), (0, 0)))) for piece in pieces]

    def join(self, tiles: list[list[Any]]) -> np.ndarray:
        """Packed tiles uint8[T, O, TILE, TILE / 8] -> bool[T, O, H, W]."""
        packed = np.concatenate([np.concatenate([np.asarray(t) for t in row], axis=-1) for row in tiles], axis=-2)
        return np.unpackbits(packed[..., : self.size[0], :], axis=-1, count=self.size[1]).view(bool)


def _fetch(resize: _Resize, first: int, count: int, outcomes: Any, banks: tuple[MemoryBank, ...]) -> Chunk:
    masks = [resize.join(tiles)[:count, :rows].swapaxes(0, 1) for rows, tiles, _ in outcomes]
    scores = [np.asarray(score)[:count, :rows].T for rows, _, score in outcomes]
    return Chunk(first, np.concatenate(masks), np.concatenate(scores), banks)


def _stack(features: Sequence[Features]) -> Features:
    return jax.tree.map(lambda *x: jnp.stack(x), *features)


def _normalize(pixels: jax.Array, scale: Sequence[jax.Array]) -> jax.Array:
    # the constants are arguments: a compiler may replace the division by one by a rounded product
    return (pixels.astype(jnp.float32) / scale[0] - scale[1]) / scale[2]
