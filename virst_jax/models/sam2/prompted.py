"""Objects that are prompted by clicks, boxes and masks: each with anchors and memories of its own.

`tracker.Tracker` tracks objects that share their anchors, from the first frame on. Here every object has been prompted
on frames of its own, tracking starts anywhere and runs forward or backward. All shapes are fixed: clicks, objects and
anchors are padded by the caller.

Axes: O objects, A anchor slots, R remembered frames, P remembered pointers, T frames of a chunk, N prompt tokens,
S = H*W positions of the feature grid, C width, D memory width, L mask side, I image side.
Source: sam2/sam2_video_predictor.py and modeling/sam2_base.py of facebookresearch/sam2.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from virst_jax.config import Sam2Config
from virst_jax.models.sam2.anchors import select_anchors
from virst_jax.models.sam2.mask_decoder import multimask, single_mask
from virst_jax.models.sam2.prompt_encoder import PADDING
from virst_jax.models.sam2.sam2 import Features, Prediction, Sam2
from virst_jax.models.sam2.tracker import NO_FRAME, PROMPT_LOGIT_LIMIT, Tracked, Tracker

__all__ = ["NO_FRAME", "ObjectAnchors", "ObjectBank", "PromptTokens", "PromptedTracker"]


@flax.struct.dataclass
class ObjectAnchors:
    """The prompted frames of every object: what is kept of them."""

    frames: jax.Array  # int32[O, A]
    valid: jax.Array  # bool[O, A]
    memory: jax.Array  # [O, A, S, D]
    pointers: jax.Array  # [O, A, C]


@flax.struct.dataclass
class ObjectBank:
    """Ring buffers of the last frames of every object; frame t lies in slot t modulo the size."""

    memory_frames: jax.Array  # int32[O, R]; NO_FRAME: empty
    memory: jax.Array  # [O, R, S, D]
    pointer_frames: jax.Array  # int32[O, P]
    pointers: jax.Array  # [O, P, C]

    @classmethod
    def empty(cls, cfg: Sam2Config, objects: int, memory_dtype: Any, dtype: Any) -> "ObjectBank":
        """Before the first frame."""
        memories, pointers = cfg.num_maskmem - 1, cfg.max_pointers - 1
        return cls(
            jnp.full((objects, memories), NO_FRAME, jnp.int32),
            jnp.zeros((objects, memories, cfg.feature_size**2, cfg.memory_dim), memory_dtype),
            jnp.full((objects, pointers), NO_FRAME, jnp.int32),
            jnp.zeros((objects, pointers, cfg.hidden_size), dtype),
        )

    def after(self, number: jax.Array, memory: jax.Array, pointer: jax.Array) -> "ObjectBank":
        """With frame `number`: memory [O, S, D], pointer [O, C]."""
        m, p = number % self.memory_frames.shape[1], number % self.pointer_frames.shape[1]
        return ObjectBank(
            self.memory_frames.at[:, m].set(number),
            self.memory.at[:, m].set(memory),
            self.pointer_frames.at[:, p].set(number),
            self.pointers.at[:, p].set(pointer),
        )


@flax.struct.dataclass
class PromptTokens:
    """Clicks and boxes of one frame; a box is two points, its corners."""

    coords: jax.Array  # float32[O, N, 2], (x, y) in pixels of the model's image
    labels: jax.Array  # int32[O, N]: 1 foreground, 0 background, 2 and 3 a box's corners
    count: jax.Array  # int32[O], how many of the N there are


class PromptedTracker:
    """Functions of (params, ...) over a Sam2 module; holds no state.

    The mask of a frame without prompts, or with a single click, is the best of three by predicted IoU; with more clicks
    or a box it is the first, unless that is unstable. A config whose `evaluated_mask` is not "multimask" takes that
    mask always.

    Args:
      sam: the module.
      memory_dtype: of memories; SAM 2 keeps them in bfloat16.
      dropout_rng: a jax.random key, for memory attention with dropout; None: without.
    """

    def __init__(self, sam: Sam2, memory_dtype: str = "bfloat16", dropout_rng: jax.Array | None = None):
        self.sam, self.cfg, self.dropout_rng = sam, sam.cfg, dropout_rng
        self.tracker = Tracker(sam)
        self.memory_dtype = self.tracker.memory_dtype = jnp.dtype(memory_dtype)

    def _apply(self, params: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        return self.sam.apply({"params": params}, *args, method=method, **kwargs)

    def encode_memory(self, params: Any, frame: Features, prediction: Prediction, binary: bool) -> Tracked:
        """The outcome of a frame with its memory; `binary` as of Sam2.encode_memory."""
        memory = self._apply(params, Sam2.encode_memory, frame, prediction, binary)
        return Tracked(prediction, memory.astype(self.memory_dtype))

    def prompt(
        self,
        params: Any,
        frame: Features,
        tokens: PromptTokens,
        mask_prompt: jax.Array,
        has_mask_prompt: jax.Array,
        past: tuple[ObjectAnchors, ObjectBank, jax.Array, jax.Array, jax.Array] | None = None,
    ) -> Tracked:
        """Segments one frame from clicks and boxes.

        Args:
          frame: its features.
          tokens: the clicks.
          mask_prompt: float32[O, L, L], logits of the mask that the clicks correct, if any; they are clamped.
          has_mask_prompt: bool[], whether there is one.
          past: None: the frame is seen without memory, as the first prompted one is. Otherwise the clicks correct a
            tracked frame: anchors, memories, the frame's number, direction and the video's length as of `propagate`.
        """
        objects, slots, _ = tokens.coords.shape
        labels = jnp.where(jnp.arange(slots) < tokens.count[:, None], tokens.labels, PADDING)
        sparse = self._apply(params, Sam2.embed_points, tokens.coords, labels)
        # the slots behind the clicks are not there; the point that is none, which SAM appends, is
        there = jnp.pad(labels != PADDING, ((0, 0), (0, 1)), constant_values=True)
        if past is None:
            image = self._apply(params, Sam2.without_memory, frame, objects)
        else:
            image = self.condition(params, frame, *past)
        several = self.cfg.evaluated_mask == "multimask"
        prediction = self._apply(
            params,
            Sam2.predict,
            image,
            frame,
            sparse,
            jnp.clip(mask_prompt, -PROMPT_LOGIT_LIMIT, PROMPT_LOGIT_LIMIT),
            has_mask_prompt,
            mode=self.cfg.evaluated_mask,
            sparse_mask=there,
            ambiguous=tokens.count <= 1 if several else None,
        )
        return self.encode_memory(params, frame, prediction, binary=True)

    def use_mask(self, params: Any, frame: Features, mask: jax.Array) -> Tracked:
        """Takes a given mask float32[O, I, I] of 0 and 1 for the outcome of a frame."""
        prediction = self._apply(params, Sam2.use_mask, frame, mask)
        return self.encode_memory(params, frame, prediction, binary=True)

    def every_mask(self, params: Any, frame: Features, points: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The masks of clicks on one image, each of its own: points float32[O, 2] in pixels of the model's image ->
        logits float32[O, M, L, L] and predicted IoU float32[O, M], with M = 3 for "multimask", else 1."""

        def decode(sam: Sam2) -> tuple[jax.Array, jax.Array]:
            count = points.shape[0]
            masks = sam.mask_decoder(
                sam.without_memory(frame, count),
                sam.prompt_encoder.dense_position(),
                sam.embed_points(points[:, None], jnp.ones((count, 1), jnp.int32)),
                sam.prompt_encoder.no_mask(count),
                (frame.high0[None], frame.high1[None]),
            )
            chosen = multimask(masks) if self.cfg.evaluated_mask == "multimask" else single_mask(masks)
            return chosen.logits, chosen.ious

        logits, ious = self._apply(params, decode)
        return logits, ious

    def propagate(
        self,
        params: Any,
        anchors: ObjectAnchors,
        bank: ObjectBank,
        features: Features,
        frames: jax.Array,
        valid: jax.Array,
        sign: jax.Array,
        num_frames: jax.Array,
    ) -> tuple[ObjectBank, Tracked]:
        """Tracks a chunk of consecutive frames.

        Args:
          anchors: of the objects; each must have one.
          bank: of the frames before the chunk (behind it, when tracking backward).
          features: of the chunk's frames, leading axis T.
          frames: int32[T], their numbers, rising or falling.
          valid: bool[T]; the others are padding.
          sign: int32[], 1 forward, -1 backward.
          num_frames: int32[], length of the whole video.

        Returns:
          The memories for the next chunk, and the outcome of every frame (leading axis T). On frames where an object
          has an anchor its outcome means nothing: it is the anchor's.
        """
        empty = self.tracker.empty(anchors.frames.shape[0])

        def step(bank: ObjectBank, slot: tuple[Any, ...]) -> tuple[ObjectBank, Tracked]:
            frame, number, alive = slot
            here = anchors.valid & (anchors.frames == number)
            anchored = here.any(1)

            def track() -> Tracked:
                image = self.condition(params, frame, anchors, bank, number, sign, num_frames)
                sparse = self._apply(params, Sam2.no_prompt, image.shape[0])
                prediction = self._apply(params, Sam2.predict, image, frame, sparse, mode=self.cfg.evaluated_mask)
                return self.encode_memory(params, frame, prediction, binary=False)

            out = jax.lax.cond(alive & ~anchored.all(), track, lambda: empty)
            memory = jnp.where(anchored[:, None, None], _take(anchors.memory, here), out.memory)
            pointer = jnp.where(anchored[:, None], _take(anchors.pointers, here), out.prediction.pointer)
            after = bank.after(number, memory, pointer)
            return jax.tree.map(lambda new, old: jnp.where(alive, new, old), after, bank), out

        return jax.lax.scan(step, bank, (features, frames, valid))

    def condition(
        self,
        params: Any,
        frame: Features,
        anchors: ObjectAnchors,
        bank: ObjectBank,
        number: jax.Array,
        sign: jax.Array,
        num_frames: jax.Array,
    ) -> jax.Array:
        """The features of a frame after every object has attended to its memories and pointers, dtype[O, H, W, C]."""
        cfg = self.cfg
        select = jax.vmap(lambda frames, valid: select_anchors(number, frames, valid, cfg.max_anchors_attended))
        slots, chosen = select(anchors.frames, anchors.valid)
        chosen_frames = jnp.where(chosen, jnp.take_along_axis(anchors.frames, slots, 1), NO_FRAME)

        # a chosen anchor is not attended to twice; an unchosen one counts as a tracked frame
        def fresh(frames: jax.Array) -> jax.Array:
            return (frames != NO_FRAME) & ~(frames[:, :, None] == chosen_frames[:, None]).any(-1)

        # frames ago, in the direction of tracking
        anchor_age = (number - chosen_frames) * sign
        age, pointer_age = (number - bank.memory_frames) * sign, (number - bank.pointer_frames) * sign
        max_pointers = jnp.minimum(num_frames, cfg.max_pointers)
        memory_mask = fresh(bank.memory_frames) & (age > 0) & (age < cfg.num_maskmem)
        pointer_mask = fresh(bank.pointer_frames) & (pointer_age > 0) & (pointer_age < max_pointers)
        # pointers of anchors to come are not seen, their memories are
        mask = jnp.concatenate([chosen & (anchor_age >= 0), pointer_mask], 1)
        time = jnp.concatenate([anchor_age, pointer_age], 1) / jnp.maximum(max_pointers - 1, 1)
        codes = [jnp.full(slots.shape, cfg.num_maskmem - 1), jnp.clip(age - 1, 0, cfg.num_maskmem - 2)]
        memory = jnp.concatenate(
            [jnp.take_along_axis(anchors.memory, slots[..., None, None], 1), bank.memory.astype(anchors.memory.dtype)],
            1,
        )
        pointers = jnp.concatenate([jnp.take_along_axis(anchors.pointers, slots[..., None], 1), bank.pointers], 1)
        key = self.dropout_rng
        image: jax.Array = self._apply(
            params,
            Sam2.with_memory,
            frame,
            memory,
            jnp.concatenate(codes, 1),
            jnp.concatenate([chosen, memory_mask], 1),
            pointers,
            jnp.where(mask, time, 0),  # empty slots lie far away: no huge angles
            mask,
            key is None,
            rngs=None if key is None else {"dropout": jax.random.fold_in(key, number)},
        )
        return image


def _take(kept: jax.Array, here: jax.Array) -> jax.Array:
    """Of every object the anchor of this frame: kept [O, A, ...], here bool[O, A] -> [O, ...]."""
    index = here.argmax(1).reshape(-1, *[1] * (kept.ndim - 1))
    return jnp.take_along_axis(kept, index, 1)[:, 0]
