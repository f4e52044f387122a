"""The network's steps as compiled functions, and a whole video through them.

Shapes are fixed per step, so a video of any length is tracked by the same few compiled functions.

Axes: O expressions, T frames, F segmentation frames, A anchors, N [SEG] tokens, R side of the tracker's image,
L mask side.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from virst_jax.config import VirstConfig
from virst_jax.models.sam2.sam2 import Features, Sam2
from virst_jax.models.virst import Virst
from virst_jax.tracking.tracker import Anchors, Recent, Tracked, Tracker


@flax.struct.dataclass
class Understanding:
    """What the language model made of a video and its expressions."""

    visual_tokens: jax.Array  # dtype[1, V, D]
    inputs_embeds: jax.Array  # dtype[O, L, D], before the initial fusion
    hidden_layers: jax.Array  # dtype[layers + 1, O, N, D], what enters each layer at [SEG], and the final hidden state
    seg_hidden: jax.Array  # dtype[O, N, D]
    prompts: jax.Array  # dtype[O, N, F, C]
    frame_scores: jax.Array  # float32[O, F]


class Network:
    """Compiled steps of VIRST for one set of parameters.

    Args:
      cfg: the network.
      params: of `Virst(cfg)`.
    """

    def __init__(self, cfg: VirstConfig, params: Any):
        self.cfg, self.params = cfg, params
        self.model = Virst(cfg)
        self.tracker = Tracker(Sam2(cfg.sam2, cfg.compute))

    @functools.cached_property
    def _encode(self) -> Any:
        def encode(params: Any, pixels: jax.Array) -> Any:
            return self.tracker.sam.apply({"params": params}, pixels, method=Sam2.encode_image)

        return jax.jit(encode)

    @functools.cached_property
    def _encode_clip(self) -> Any:
        return jax.jit(lambda params, clip: self.model.apply({"params": params}, clip, method=Virst.encode_clips))

    @functools.cached_property
    def _understand(self) -> Any:
        def understand(
            params: Any, visual: jax.Array, maps: jax.Array, ids: jax.Array, index: jax.Array, mask: jax.Array, seg: Any
        ) -> Understanding:
            def apply(method: Any, *args: Any) -> Any:
                return self.model.apply({"params": params}, *args, method=method)

            def for_each(x: jax.Array) -> jax.Array:
                return jnp.broadcast_to(x, (ids.shape[0], *x.shape[1:]))

            text = embeds = apply(Virst.embed, ids, index, for_each(visual))
            if self.cfg.fusion.initial:
                embeds = apply(Virst.fuse_initially, embeds, seg, for_each(maps))
            hidden, layers = apply(Virst.hidden_layers, embeds, mask)
            prompts, scores = apply(Virst.prompts, hidden, seg, for_each(maps))
            rows = jnp.arange(ids.shape[0])[:, None]
            at_seg = hidden[rows, seg]
            return Understanding(
                visual, text, jnp.concatenate([layers[:, rows, seg], at_seg[None]]), at_seg, prompts, scores
            )

        return jax.jit(understand)

    @functools.cached_property
    def _anchor(self) -> Any:
        return jax.jit(self.tracker.prompt_anchors)

    @functools.cached_property
    def _track(self) -> Any:
        return jax.jit(self.tracker.track, static_argnames="keep_memory", donate_argnums=2)

    def encode_frames(self, frames: Iterable[np.ndarray]) -> Features:
        """Normalised frames float32[R, R, 3] -> their features, encoded one at a time."""
        encoded = [self._encode(self.params["sam2"], jnp.asarray(frame)[None]) for frame in frames]
        return jax.tree.map(lambda *x: jnp.concatenate(x), *encoded)

    def understand(
        self,
        clips: np.ndarray,
        maps: jax.Array,
        token_ids: np.ndarray,
        visual_index: np.ndarray,
        mask: np.ndarray,
        seg_positions: np.ndarray,
    ) -> Understanding:
        """Reads the video and the expressions.

        Args:
          clips: float32[clips, frames, S, S, 3], normalised.
          maps: dtype[F, H, W, C], top features of the segmentation frames.
          token_ids: int32[O, L], see data.sequence.
          visual_index: int32[O, L].
          mask: bool[O, L].
          seg_positions: int32[O, N].
        """
        tokens = [self._encode_clip(self.params, jnp.asarray(clip)[None]) for clip in clips]
        visual = jnp.concatenate(tokens, axis=1)
        return self._understand(self.params, visual, maps[None], token_ids, visual_index, mask, seg_positions)

    def prompt_anchors(self, features: Features, frames: np.ndarray, prompts: jax.Array, slots: int) -> Anchors:
        """Segments the anchors: features [A, ...], frames int[A], prompts dtype[O, N, A, C]; padded to `slots`."""
        count = len(frames)
        padding = slots - count

        def pad(x: jax.Array) -> jax.Array:
            return jnp.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1)))

        features = jax.tree.map(pad, features)
        live = np.arange(slots) < count
        tokens = jnp.pad(prompts.swapaxes(1, 2), ((0, 0), (0, padding), (0, 0), (0, 0)))
        numbers = np.pad(np.asarray(frames, np.int32), (0, padding))
        return self._anchor(self.params["sam2"], features, numbers, live, tokens)

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
        recent: Recent = self.tracker.start(anchors.memory.shape[1])
        source = iter(frames)
        for start in range(0, num_frames, chunk):
            count = min(chunk, num_frames - start)
            features = self.encode_frames(next(source) for _ in range(count))
            if count < chunk:
                pad = lambda x: jnp.pad(x, ((0, chunk - count), *((0, 0),) * (x.ndim - 1)))  # noqa: B023, E731
                features = jax.tree.map(pad, features)
            recent, out = self._track(
                self.params["sam2"],
                anchors,
                recent,
                features,
                np.arange(start, start + chunk, dtype=np.int32),
                np.arange(chunk) < count,
                np.int32(num_frames),
                keep_memory=keep_memory,
            )
            for i in range(count):
                yield jax.tree.map(lambda x, i=i: x[i], out)
