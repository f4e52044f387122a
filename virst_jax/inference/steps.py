"""The network's steps: `Steps`, functions of the parameters, and `Network`, which compiles and calls them.

Shapes are fixed per step: a video of any length and size, with any number of expressions, runs through the same few
compiled functions. What varies is padded: expressions to a power of two, text to a multiple of 64 tokens, the last
batch and the last chunk of frames, the visual tokens of a short video; masks are cut into tiles.

Axes: O expressions, T frames, F segmentation frames, A anchor slots, N [SEG] tokens, R side of the tracker's image,
S side of the video encoder's image, L tokens of a text or mask side, P positions of a prefix, V visual tokens,
D width of the language model, C fusion width.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from virst_jax.config import VirstConfig
from virst_jax.inference.compiled import Context
from virst_jax.inference.resizing import HOST
from virst_jax.inference.tracker_steps import (
    SCALE,
    UNIT_SCALE,
    Scale,
    TrackerNetwork,
    TrackerSteps,
    normalize,
    stack,
)
from virst_jax.models.qwen2 import Cache, init_cache
from virst_jax.models.sam2.sam2 import Features
from virst_jax.models.sam2.tracker import Anchors, MemoryBank, Tracked, Tracker
from virst_jax.models.virst import Virst
from virst_jax.ops.platform import target_platform
from virst_jax.types import PyTree

__all__ = [
    "SCALE",
    "UNIT_SCALE",
    "ExpressionBatch",
    "Network",
    "Scale",
    "Steps",
    "TextReading",
    "VideoReading",
]


@flax.struct.dataclass
class VideoReading:
    """What the language model keeps of a video."""

    cache: Cache  # keys and values of the P positions that all conversations begin with
    embeds: jax.Array | None = None  # dtype[1, P, D], input embeddings, if asked for


@flax.struct.dataclass
class TextReading:
    """What the language model made of the expressions."""

    seg_hidden: jax.Array  # dtype[O, N, D], hidden states after the final norm at [SEG]
    embeds: jax.Array | None = None  # dtype[O, L, D], input embeddings before the initial fusion, if asked for
    layers: jax.Array | None = None  # dtype[layers, O, N, D], what enters each layer at [SEG], if asked for


@dataclass
class ExpressionBatch:
    """Expressions that are read and tracked in one call, and how far tracking has come.

    Attributes:
      anchors: the prompted frames with masks and memories, for O = 2^k expressions.
      bank: memories of the frames before the next one; every call of `Network.advance` replaces it.
      count: the first `count` of the O rows are expressions, the others padding.
    """

    anchors: Anchors
    bank: MemoryBank
    count: int


class Steps(TrackerSteps):
    """The steps as functions: parameters first, then arrays. They hold no parameters and can be lowered from shapes.

    Those of the tracker alone stand in `TrackerSteps`. `encode_batch`, `prompt_anchors` and `track` take the parameters
    of the tracker (`params["sam2"]`), `start_bank` and `resize_masks` take none, the others take those of the parts
    that they use.
    """

    def __init__(self, cfg: VirstConfig):
        super().__init__(cfg.sam2, cfg.compute)
        self.cfg = cfg
        self.model = Virst(cfg)
        self.tracker = Tracker(self.sam)

    def _apply(self, params: PyTree, method: Callable[..., Any], *args: Any) -> Any:
        return self.model.apply({"params": params}, *args, method=method)

    def encode_clip(self, params: PyTree, clip: jax.Array, scale: Scale) -> jax.Array:
        """A clip number[frames, S, S, 3] -> visual tokens dtype[tokens, D]."""
        tokens: jax.Array = self._apply(params, Virst.encode_clips, normalize(clip, scale)[None])[0]
        return tokens

    def embed(self, params: PyTree, visual: Sequence[jax.Array], ids: jax.Array, index: jax.Array) -> jax.Array:
        """See Network.embed."""
        embeds: jax.Array = self._apply(params, Virst.embed, ids, index, jnp.concatenate(visual)[None])
        return embeds

    def read_video(
        self,
        params: PyTree,
        visual: Sequence[jax.Array],
        ids: jax.Array,
        index: jax.Array,
        mask: jax.Array,
        keep_embeds: bool = False,
    ) -> VideoReading:
        """See Network.read_video."""

        def read(model: Virst) -> VideoReading:
            embeds = model.embed(ids, index, jnp.concatenate(visual)[None])
            cache = init_cache(self.cfg.llm, self.cfg.compute, 1, ids.shape[1])
            _, cache = model.llm(embeds, mask, cache=cache)
            return VideoReading(cache, embeds if keep_embeds else None)

        reading: VideoReading = self._apply(params, read)
        return reading

    def read_text(
        self,
        params: PyTree,
        cache: Cache,
        ids: jax.Array,
        mask: jax.Array,
        seg: jax.Array,
        tops: Sequence[jax.Array],
        keep_layers: bool = False,
    ) -> TextReading:
        """See Network.read_text; `tops` is empty without initial fusion."""
        at_seg = jnp.arange(len(ids))[:, None], seg

        def read(model: Virst) -> TextReading:
            text = embeds = model.llm.embed(ids)
            if tops:
                embeds = model.fuse_initially(embeds, seg, jnp.stack(tops)[None])
            hidden, inputs = model.llm.after_cache(embeds, mask, cache, keep_layers)
            if inputs is None:
                return TextReading(hidden[at_seg])
            return TextReading(hidden[at_seg], text, inputs[:, at_seg[0], at_seg[1]])

        reading: TextReading = self._apply(params, read)
        return reading

    def fuse(
        self, params: PyTree, seg_hidden: jax.Array, tops: Sequence[jax.Array], anchors: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """See Network.fuse."""
        maps = jnp.stack(tops)
        if target_platform() == "tpu":  # else every map goes to the convolution's layout alone, at a fifth of the speed
            maps = jax.lax.optimization_barrier(maps)
        prompts, scores = self._apply(params, lambda model: model.second_fusion(seg_hidden, maps[None]))
        return prompts[:, :, anchors].swapaxes(1, 2), scores

    def prompt_anchors(
        self, params: PyTree, features: Sequence[Features], frames: jax.Array, valid: jax.Array, prompts: jax.Array
    ) -> Anchors:
        """See Tracker.prompt_anchors; the features of each anchor apart."""
        return self.tracker.prompt_anchors(params, stack(features), frames, valid, prompts)

    def start_bank(self, params: None, anchors: Anchors) -> MemoryBank:
        """The memories before the first frame, for as many expressions as `anchors` holds."""
        return self.tracker.start(anchors.memory.shape[1])

    def track(
        self,
        params: PyTree,
        anchors: Anchors,
        bank: MemoryBank,
        features: Sequence[Features],
        frames: jax.Array,
        valid: jax.Array,
        num_frames: jax.Array,
        keep_memory: bool = False,
    ) -> tuple[MemoryBank, Tracked]:
        """See Tracker.track; the features of each frame apart."""
        return self.tracker.track(params, anchors, bank, stack(features), frames, valid, num_frames, keep_memory)

    def state_shapes(self, rows: int) -> tuple[Anchors, MemoryBank]:
        """Anchors and memories of `rows` expressions as jax.ShapeDtypeStruct."""

        def shapes() -> tuple[Anchors, MemoryBank]:
            slots, outcome = self.cfg.max_anchors, self.tracker.empty(rows)
            each = jax.tree.map(lambda x: jnp.broadcast_to(x, (slots, *x.shape)), outcome)
            anchors = Anchors(jnp.zeros(slots, jnp.int32), jnp.zeros(slots, bool), each.prediction, each.memory)
            return anchors, self.tracker.start(rows)

        found: tuple[Anchors, MemoryBank] = jax.eval_shape(shapes)
        return found


class Network(TrackerNetwork):
    """The compiled steps of VIRST for one set of parameters.

    Args:
      cfg: the network.
      params: of `Virst(cfg)`.
      context: entered around every step, such as a mesh.
      resize: where frames are resized, "host" or "device".
    """

    def __init__(
        self,
        cfg: VirstConfig,
        params: PyTree,
        context: Context = contextlib.nullcontext,
        resize: str = HOST,
    ):
        self.steps = Steps(cfg)
        super().__init__(self.steps, params, context, resize)
        self.cfg = cfg

    @property
    def tracker_params(self) -> PyTree:
        return self.params["sam2"]

    def encode_visual(self, clips: np.ndarray, slots: int, scale: Scale = SCALE) -> list[jax.Array]:
        """Clips uint8[clips, frames, S, S, 3] -> visual tokens dtype[tokens, D] of each, then zeros up to `slots`."""
        parts = [self._run(self.steps.encode_clip, self.params, clip, scale) for clip in clips]
        zeros = np.zeros(parts[0].shape, parts[0].dtype)
        return parts + [zeros] * (slots - len(parts))

    def embed(self, visual: Sequence[jax.Array], ids: np.ndarray, index: np.ndarray) -> jax.Array:
        """Input embeddings dtype[1, L, D] of a conversation: visual of `encode_visual`, ids and index int32[1, L]."""
        embeds: jax.Array = self._run(self.steps.embed, self.params, tuple(visual), ids, index)
        return embeds

    def read_video(
        self,
        visual: Sequence[jax.Array],
        ids: np.ndarray,
        index: np.ndarray,
        mask: np.ndarray,
        *,
        keep_embeds: bool = False,
    ) -> VideoReading:
        """Reads what all conversations of a video begin with.

        Args:
          visual: of `encode_visual`.
          ids, index: int32[1, P], see data.sequence.
          mask: bool[1, P].
          keep_embeds: also return the input embeddings.
        """
        reading: VideoReading = self._run(
            self.steps.read_video, self.params, tuple(visual), ids, index, mask, keep_embeds=keep_embeds
        )
        return reading

    def read_text(
        self,
        cache: Cache,
        ids: np.ndarray,
        mask: np.ndarray,
        seg: np.ndarray,
        tops: Sequence[jax.Array],
        *,
        keep_layers: bool = False,
    ) -> TextReading:
        """Reads the rest of the conversations.

        Args:
          cache: of `read_video`.
          ids: int32[O, L].
          mask: bool[O, L].
          seg: int32[O, N], where the [SEG] tokens stand.
          tops: F maps dtype[H, W, C], for the initial fusion.
          keep_layers: also return the input embeddings and what enters each layer at [SEG].
        """
        tops = tuple(tops) if self.cfg.fusion.initial else ()
        reading: TextReading = self._run(
            self.steps.read_text, self.params, cache, ids, mask, seg, tops, keep_layers=keep_layers
        )
        return reading

    def fuse(
        self, seg_hidden: jax.Array, tops: Sequence[jax.Array], anchors: np.ndarray
    ) -> tuple[jax.Array, jax.Array]:
        """Second fusion: seg_hidden dtype[O, N, D] and F maps dtype[H, W, C] -> the prompts of some of these frames,
        dtype[O, A, N, C], and scores of all of them, float32[O, F].

        anchors: int32[A], positions among the F frames.
        """
        prompts, scores = self._run(self.steps.fuse, self.params, seg_hidden, tuple(tops), anchors)
        return prompts, scores

    def start(
        self,
        features: Sequence[Features],
        frames: Sequence[int],
        prompts: jax.Array,
        slots: int,
        count: int | None = None,
    ) -> ExpressionBatch:
        """Segments the anchors of expressions, which are then ready to be tracked.

        Args:
          features: of the anchors.
          frames: their numbers.
          prompts: dtype[O, slots, N, C], any where there is no anchor.
          count: how many of the O rows are expressions; None: all.
        """
        used = len(frames)
        padded = (*features, *[features[-1]] * (slots - used))
        numbers = np.pad(np.asarray(frames, np.int32), (0, slots - used))
        valid = np.arange(slots) < used
        anchors = self._run(self.steps.prompt_anchors, self.params["sam2"], padded, numbers, valid, prompts)
        bank = self._run(self.steps.start_bank, None, anchors)
        return ExpressionBatch(anchors, bank, prompts.shape[0] if count is None else count)

    def advance(
        self,
        batch: ExpressionBatch,
        features: Sequence[Features],
        start: int,
        num_frames: int,
        chunk: int,
        *,
        keep_memory: bool = False,
    ) -> Tracked:
        """Tracks a batch of expressions through the next frames; `batch.bank` then holds their memories too.

        Args:
          features: of the frames from number `start` on, at most `chunk`, to which they are padded.
          num_frames: of the whole video.
          keep_memory: also return every frame's memory.

        Returns:
          The outcome of `chunk` frames (leading axis); those behind the last feature mean nothing.
        """
        count = len(features)
        batch.bank, out = self._run(
            self.steps.track,
            self.params["sam2"],
            batch.anchors,
            batch.bank,
            (*features, *[features[-1]] * (chunk - count)),
            np.arange(start, start + chunk, dtype=np.int32),
            np.arange(chunk) < count,
            np.int32(num_frames),
            keep_memory=keep_memory,
        )
        tracked: Tracked = out
        return tracked
