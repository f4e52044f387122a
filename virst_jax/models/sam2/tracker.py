"""The temporal dynamic anchor updater: anchors first, then a scan over the frames with fixed-size memories.

A video of any length is tracked in chunks of frames by one compiled function: `track` takes the state that the
chunk before has left, and all shapes stay the same. Objects of one video share its frames and anchors, so whether a
frame is an anchor is one predicate for all of them and stays a real branch.

Axes: O objects, A anchor slots, R remembered frames, P remembered pointers, T frames of a chunk, N prompt tokens,
S = H*W positions of the feature grid, C width, D memory width, L mask side.
Source: model/sam2/sam2_virst.py and sam2_base.py (_prepare_memory_conditioned_features).
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from virst_jax.config import Sam2Config
from virst_jax.models.sam2.anchors import select_anchors
from virst_jax.models.sam2.sam2 import Features, Prediction, Sam2
from virst_jax.ops.platform import target_platform
from virst_jax.ops.splash import KEPT
from virst_jax.types import PyTree

PROMPT_LOGIT_LIMIT = 32.0  # a mask prompt from an earlier anchor on the same frame is clamped so
NO_FRAME = -(10**6)  # far from every frame


@flax.struct.dataclass
class Anchors:
    """The prompted frames with all that the tracker keeps of them."""

    frames: jax.Array  # int32[A]
    valid: jax.Array  # bool[A]; False: an empty slot, or overruled by a later anchor on the same frame
    prediction: Prediction  # leading axis A
    memory: jax.Array  # [A, O, S, D]


@flax.struct.dataclass
class MemoryBank:
    """Ring buffers of the last frames; frame t lies in slot t modulo the size."""

    memory_frames: jax.Array  # int32[R]
    memory: jax.Array  # [R, O, S, D]
    pointer_frames: jax.Array  # int32[P]
    pointers: jax.Array  # [P, O, C]

    def put(self, number: jax.Array, memory: jax.Array, pointer: jax.Array) -> "MemoryBank":
        """With a frame's memory [O, S, D] and pointer [O, C]; it takes the place of the oldest."""
        m, p = number % self.memory_frames.shape[0], number % self.pointer_frames.shape[0]
        return MemoryBank(
            self.memory_frames.at[m].set(number),
            self.memory.at[m].set(memory),
            self.pointer_frames.at[p].set(number),
            self.pointers.at[p].set(pointer),
        )


@flax.struct.dataclass
class Tracked:
    """One frame's outcome."""

    prediction: Prediction
    memory: jax.Array  # [O, S, D]


class Tracker:
    """Functions of (params, ...) over a Sam2 module; holds no state.

    Args:
      sam: the module.
      training: as the release trains: the decoder's first mask, float32 memories, anchors enter when the scan
        reaches them (the first is there from the start), pointers of anchors to come are seen, and every frame's
        activations are recomputed in the backward pass. Otherwise as it evaluates: best of three masks, bfloat16
        memories, all anchors there from the start, pointers only of the past.
      dropout_rng: a jax.random key, for memory attention with dropout; None: without.
    """

    def __init__(self, sam: Sam2, training: bool = False, dropout_rng: jax.Array | None = None):
        self.sam = sam
        self.cfg: Sam2Config = sam.cfg
        self.training = training
        self.dropout_rng = dropout_rng
        self.mode = "single" if training else sam.cfg.evaluated_mask
        self.memory_dtype = jnp.dtype(sam.compute.dtype) if training else jnp.dtype(jnp.bfloat16)

    def _apply(self, params: PyTree, method: Any, *args: Any, **kwargs: Any) -> Any:
        return self.sam.apply({"params": params}, *args, method=method, **kwargs)

    def _encode_memory(self, params: PyTree, frame: Features, prediction: Prediction) -> Tracked:
        memory = self._apply(params, Sam2.encode_memory, frame, prediction)
        return Tracked(prediction, memory.astype(self.memory_dtype))

    def _encode_memories(self, params: PyTree, features: Features, prediction: Prediction) -> Tracked:
        """As _encode_memory for T frames, leading axis T: all of an object at once, so that it fits the memory."""
        encode = jax.vmap(functools.partial(self._encode_memory, params))
        of_objects = jax.tree.map(lambda x: x.swapaxes(0, 1)[:, :, None], prediction)
        memory = jax.lax.map(lambda one: encode(features, one).memory, of_objects)
        return Tracked(prediction, memory[:, :, 0].swapaxes(0, 1))

    def prompt_anchors(
        self, params: PyTree, features: Features, frames: jax.Array, valid: jax.Array, prompts: jax.Array
    ) -> Anchors:
        """Segments the anchor frames from their prompts, without memory.

        Args:
          params: of the Sam2 module.
          features: of the anchor frames, leading axis A.
          frames: int32[A], their numbers in the video.
          valid: bool[A]; slots that are not cost nothing, unless in training, and on TPUs only their memory.
          prompts: dtype[O, A, N, C], STF prompt tokens.
        """
        empty = self.empty(prompts.shape[0])
        # a TPU encodes several memories at once faster; where there is no anchor, it encodes one that nobody reads
        together = target_platform() == "tpu" and not self.training
        logits_shape = (frames.shape[0], *empty.prediction.low_res.shape)

        def step(low_res: jax.Array, slot: tuple[Any, ...]) -> tuple[jax.Array, Tracked]:
            index, frame, number, alive, tokens = slot

            def segment() -> Tracked:
                # an earlier anchor on this frame hands on its logits as a mask prompt
                earlier = (frames == number) & valid & (jnp.arange(frames.shape[0]) < index)
                last = jnp.where(earlier, jnp.arange(frames.shape[0]), -1).max()
                mask_prompt = jnp.clip(low_res[last], -PROMPT_LOGIT_LIMIT, PROMPT_LOGIT_LIMIT)
                image = self._apply(params, Sam2.without_memory, frame, tokens.shape[0])
                prediction = self._apply(
                    params, Sam2.predict, image, frame, tokens, mask_prompt, last >= 0, mode=self.mode
                )
                if together:
                    return Tracked(prediction, empty.memory)
                return self._encode_memory(params, frame, prediction)

            # the videos of a batch differ, and vmap of a branch would copy the parameters for each of them
            out = _where(alive, segment(), empty) if self.training else jax.lax.cond(alive, segment, lambda: empty)
            return low_res.at[index].set(out.prediction.low_res), out

        if self.training:
            step = jax.checkpoint(step, prevent_cse=False)
        slots = (jnp.arange(frames.shape[0]), features, frames, valid, prompts.swapaxes(0, 1))
        _, out = jax.lax.scan(step, jnp.zeros(logits_shape), slots)
        if together:
            out = self._encode_memories(params, features, out.prediction)
        later = (frames[None] == frames[:, None]) & valid[None] & jnp.triu(jnp.ones((len(frames),) * 2, bool), 1)
        return Anchors(frames, valid & ~later.any(1), out.prediction, out.memory)

    def start(self, num_objects: int) -> MemoryBank:
        """The state before the first frame."""
        cfg, empty = self.cfg, self.empty(num_objects)
        memories, pointers = cfg.num_maskmem - 1, cfg.max_pointers - 1
        return MemoryBank(
            memory_frames=jnp.full(memories, NO_FRAME, jnp.int32),
            memory=jnp.zeros((memories, *empty.memory.shape), empty.memory.dtype),
            pointer_frames=jnp.full(pointers, NO_FRAME, jnp.int32),
            pointers=jnp.zeros((pointers, *empty.prediction.pointer.shape), empty.prediction.pointer.dtype),
        )

    def track(
        self,
        params: PyTree,
        anchors: Anchors,
        bank: MemoryBank,
        features: Features,
        frames: jax.Array,
        valid: jax.Array,
        num_frames: jax.Array,
        keep_memory: bool = False,
    ) -> tuple[MemoryBank, Tracked]:
        """Tracks a chunk of consecutive frames in evaluation.

        Args:
          params: of the Sam2 module.
          anchors: from `prompt_anchors`.
          bank: from `start` or the chunk before.
          features: of the chunk's frames, leading axis T.
          frames: int32[T], their numbers in the video, rising.
          valid: bool[T]; the others (padding of the last chunk) are passed over.
          num_frames: int[], length of the whole video: up to 16 it bounds the pointers.
          keep_memory: also return every frame's memory (for comparisons; it is large).

        Returns:
          The state for the next chunk, and the outcome of every frame (leading axis T).
        """
        empty = self.empty(anchors.memory.shape[1])

        def step(bank: MemoryBank, slot: tuple[Any, ...]) -> tuple[MemoryBank, Tracked]:
            frame, number, alive = slot
            here = anchors.valid & (anchors.frames == number)

            def from_anchor() -> Tracked:
                index = here.argmax()
                take = functools.partial(jax.lax.dynamic_index_in_dim, index=index, keepdims=False)
                return Tracked(jax.tree.map(take, anchors.prediction), take(anchors.memory))

            def from_memory() -> Tracked:
                image = self.condition(params, anchors, anchors.valid, bank, frame, number, num_frames)
                return self._segment(params, frame, image)

            def advance() -> tuple[MemoryBank, Tracked]:
                out = jax.lax.cond(here.any(), from_anchor, from_memory)
                return bank.put(number, out.memory, out.prediction.pointer), out

            bank, out = jax.lax.cond(alive, advance, lambda: (bank, empty))
            return bank, out if keep_memory else dataclasses.replace(out, memory=jnp.zeros(()))

        return jax.lax.scan(step, bank, (features, frames, valid))

    def track_in_training(
        self, params: PyTree, anchors: Anchors, features: Features, frames: jax.Array, valid: jax.Array
    ) -> Prediction:
        """Tracks all frames of a video, of which the anchors cost nothing.

        The videos of a batch have their anchors on different frames, so a branch would compute both of its sides. The
        scan therefore runs over the other frames alone, and anchors enter the bank when it passes them.

        Args:
          params: of the Sam2 module.
          anchors: from `prompt_anchors`, all valid, on different frames that are among `frames`, in their order.
          features: of the frames, leading axis T.
          frames: int32[T], their numbers in the video, rising.
          valid: bool[T]; the others, all behind them, are fillers.

        Returns:
          The predictions of all frames, leading axis T; zeros for fillers.
        """
        count, slots = frames.shape[0], anchors.frames.shape[0]
        empty = self.empty(anchors.memory.shape[1]).prediction
        others = jnp.flatnonzero(~(frames[:, None] == anchors.frames).any(1), size=count - slots)

        def step(carry: tuple[MemoryBank, jax.Array], slot: tuple[Any, ...]) -> tuple[Any, Prediction]:
            bank, before = carry
            frame, number, alive = slot
            for i in range(slots):
                passed = (before < anchors.frames[i]) & (anchors.frames[i] < number)
                anchor = bank.put(anchors.frames[i], anchors.memory[i], anchors.prediction.pointer[i])
                bank = _where(passed, anchor, bank)
            available = (anchors.frames < number) | (jnp.arange(slots) == 0)
            image = self.condition(params, anchors, available, bank, frame, number, valid.sum())
            out = self._segment(params, frame, image)
            bank = _where(alive, bank.put(number, out.memory, out.prediction.pointer), bank)
            return (bank, number), _where(alive, out.prediction, empty)

        slot = jax.tree.map(lambda x: jnp.take(x, others, axis=0), (features, frames, valid))
        start = (self.start(anchors.memory.shape[1]), jnp.int32(NO_FRAME))
        # A frame is computed again in the backward pass, but for what attention has found within it and in its
        # memories: of a frame and an object of the release's size it takes 10 MB, and most of the frame's time.
        _, tracked = jax.lax.scan(jax.checkpoint(step, prevent_cse=False, policy=KEPT), start, slot)
        places = jnp.zeros(count, jnp.int32).at[others].set(slots + jnp.arange(count - slots))
        places = places.at[jnp.searchsorted(frames, anchors.frames)].set(jnp.arange(slots))
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b])[places], anchors.prediction, tracked)

    def _segment(self, params: PyTree, frame: Features, image: jax.Array) -> Tracked:
        """The outcome of a frame that has no prompt; image: dtype[O, H, W, C], from `condition`."""
        sparse = self._apply(params, Sam2.no_prompt, image.shape[0])
        prediction = self._apply(params, Sam2.predict, image, frame, sparse, mode=self.mode)
        return self._encode_memory(params, frame, prediction)

    def condition(
        self,
        params: PyTree,
        anchors: Anchors,
        available: jax.Array,
        bank: MemoryBank,
        frame: Features,
        number: jax.Array,
        num_frames: jax.Array,
    ) -> jax.Array:
        """The features of a frame after it has attended to memories and object pointers, dtype[O, H, W, C].

        available: bool[A], which anchors may be attended to; the other arguments are as in `track`.
        """
        cfg = self.cfg
        slots, chosen = select_anchors(number, anchors.frames, available, cfg.max_anchors_attended)
        chosen_frames = jnp.where(chosen, anchors.frames[slots], NO_FRAME)

        # a chosen anchor is not attended to twice; an unchosen one counts as a tracked frame
        def fresh(ring_frames: jax.Array) -> jax.Array:
            return (ring_frames != NO_FRAME) & ~(ring_frames[:, None] == chosen_frames[None]).any(1)

        age = number - bank.memory_frames
        memory_mask = fresh(bank.memory_frames) & (age < cfg.num_maskmem)
        max_pointers = jnp.minimum(num_frames, cfg.max_pointers)
        distance = number - bank.pointer_frames
        pointer_mask = fresh(bank.pointer_frames) & (distance < max_pointers)
        anchor_distance = number - anchors.frames[slots]
        anchor_pointer_mask = chosen & ((anchor_distance >= 0) | self.training)
        time = jnp.concatenate([anchor_distance, distance]) / jnp.maximum(max_pointers - 1, 1)
        mask = jnp.concatenate([anchor_pointer_mask, pointer_mask])
        memory = jnp.concatenate([anchors.memory[slots], bank.memory])
        pointers = jnp.concatenate([anchors.prediction.pointer[slots], bank.pointers])
        key = self.dropout_rng
        return self._apply(
            params,
            Sam2.with_memory,
            frame,
            memory.swapaxes(0, 1),
            jnp.concatenate([jnp.full(slots.shape, cfg.num_maskmem - 1), jnp.clip(age - 1, 0, cfg.num_maskmem - 2)]),
            jnp.concatenate([chosen, memory_mask]),
            pointers.swapaxes(0, 1),
            jnp.where(mask, time, 0),  # empty slots lie far away: no huge angles
            mask,
            key is None,
            rngs=None if key is None else {"dropout": jax.random.fold_in(key, number)},
        )

    def empty(self, num_objects: int) -> Tracked:
        """A frame's outcome of zeros."""
        cfg = self.cfg
        prediction = Prediction(
            low_res=jnp.zeros((num_objects, cfg.low_res_size, cfg.low_res_size)),
            pointer=jnp.zeros((num_objects, cfg.hidden_size), jnp.dtype(self.sam.compute.dtype)),
            object_score=jnp.zeros(num_objects),
            iou=jnp.zeros(num_objects),
        )
        memory = jnp.zeros((num_objects, cfg.feature_size**2, cfg.memory_dim), self.memory_dtype)
        return Tracked(prediction, memory)


def _where(condition: jax.Array, yes: Any, no: Any) -> Any:
    """One of two trees of the same shapes; both are computed. condition: bool[]."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
