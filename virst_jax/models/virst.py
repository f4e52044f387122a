"""VIRST: the video language model, both fusions and the tracker in one parameter tree.

Axes: B conversations, V visual tokens, L positions of the sequence, N [SEG] tokens, T segmentation frames,
H, W feature grid, C fusion width, D width of the language model, R side of the tracker's image.
Source: model/VIRST.py.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from virst_jax.config import TrackerConfig, VirstConfig
from virst_jax.models.layers import dense
from virst_jax.models.projector import Projector
from virst_jax.models.qwen2 import Qwen2
from virst_jax.models.sam2.sam2 import Sam2
from virst_jax.models.st_fusion import InitialFusion, SecondFusion
from virst_jax.models.umt import VideoEncoder
from virst_jax.types import PyTree


class Virst(nn.Module):
    cfg: VirstConfig

    def setup(self) -> None:
        cfg, compute = self.cfg, self.cfg.compute
        self.llm = Qwen2(cfg.llm, compute)
        self.vision = VideoEncoder(cfg.vision, compute)
        self.projector = Projector(cfg.vision, compute, cfg.llm.hidden_size)
        self.initial_fusion = InitialFusion(cfg.fusion, compute, cfg.sam2.hidden_size)
        self.second_fusion = SecondFusion(cfg.fusion, compute, cfg.sam2.hidden_size)
        # the release builds this layer and never calls it
        self.occ_predictor = dense(compute, 1, ("embed", "token"))
        self.sam2 = Sam2(cfg.sam2, compute)

    def encode_clips(self, pixels: jax.Array) -> jax.Array:
        """Normalised clips float[B, frames, S, S, 3] -> visual tokens dtype[B, tokens, D]; one frame: a still image."""
        return self.project(self.vision(pixels), pixels.shape[1])

    def project(self, features: jax.Array, frames: int) -> jax.Array:
        """The video encoder's features of clips of so many frames -> visual tokens dtype[B, tokens, D]."""
        return self.projector(features, frames)

    def embed(self, token_ids: jax.Array, visual_index: jax.Array, visual: jax.Array) -> jax.Array:
        """Input embeddings: text, with visual tokens at their places.

        Args:
          token_ids: int[B, L]; any valid id where a visual token stands.
          visual_index: int[B, L], which visual token stands here; -1: text.
          visual: dtype[B, V, D].

        Returns:
          dtype[B, L, D].
        """
        text = self.llm.embed(token_ids)
        picked = jnp.take_along_axis(visual, jnp.maximum(visual_index, 0)[..., None], axis=1)
        return jnp.where((visual_index >= 0)[..., None], picked.astype(text.dtype), text)

    def fuse_initially(self, embeds: jax.Array, seg_positions: jax.Array, maps: jax.Array) -> jax.Array:
        """Initial fusion: embeds dtype[B, L, D] with those at seg_positions int[B, N] replaced; none where negative.

        Args:
          embeds: of packed conversations, dtype[1, L, D].
          maps: dtype[B or 1, T, H, W, C], image features; no gradient flows into them, as in the release.
        """
        rows, given = _rows(embeds, seg_positions), seg_positions >= 0
        fused = self.initial_fusion(embeds[rows, jnp.maximum(seg_positions, 0)], jax.lax.stop_gradient(maps))
        outside = embeds.shape[1]  # nothing is written there
        return embeds.at[rows, jnp.where(given, seg_positions, outside)].set(fused.astype(embeds.dtype), mode="drop")

    def hidden(self, embeds: jax.Array, mask: jax.Array, deterministic: bool = True) -> jax.Array:
        """Hidden states after the final norm: embeds dtype[B, L, D], mask bool[B, L] -> dtype[B, L, D]."""
        return self.llm(embeds, mask, deterministic=deterministic)

    def hidden_after_prefix(
        self,
        embeds: jax.Array,
        mask: jax.Array,
        prefix_len: int,
        deterministic: bool = True,
        places: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """As `hidden` for conversations with a common prefix, such as the video, which is read once.

        Args:
          embeds: dtype[B, L, D]; the first `prefix_len` positions are the same in every row and none is padding.
          mask: bool[B, L].
          prefix_len: at least 1, less than L.
          places: of packed conversations, for which B is 1 above; as in Qwen2.after_prefix.

        Returns:
          Hidden states of the prefix, dtype[1, prefix_len, D], and behind it, dtype[B, L - prefix_len, D].
        """
        prefix, rest = embeds[:1, :prefix_len], embeds[:, prefix_len:]
        valid = mask[:, prefix_len:] if places is None else places >= 0
        return self.llm.after_prefix(prefix, rest, valid, deterministic, places)

    def hidden_layers(self, embeds: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """As `hidden`, with every layer's input dtype[layers, B, L, D]."""
        return self.llm(embeds, mask, return_layers=True)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """dtype[..., D] -> float32[..., vocab]"""
        return self.llm.logits(hidden)

    def prompts(
        self, hidden: jax.Array, seg_positions: jax.Array, maps: jax.Array, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """Second fusion: hidden dtype[B, L, D], seg_positions int[B, N], maps dtype[B, T, H, W, C] ->
        prompts dtype[B, N, T, C] and frame scores float32[B, T].

        hidden: of packed conversations, dtype[1, L, D].
        """
        seg_hidden = hidden[_rows(hidden, seg_positions), seg_positions]
        return self.second_fusion(seg_hidden, maps, deterministic)

    def __call__(self) -> None:
        """Runs every part once on the smallest input: what `init` traces."""
        cfg = self.cfg
        side, image = cfg.vision.image_size, cfg.sam2.image_size
        visual = self.encode_clips(jnp.zeros((1, cfg.vision.clip_frames, side, side, 3)))
        self.sam2(jnp.zeros((image, image, 3)))
        size = cfg.sam2.feature_size
        maps = jnp.zeros((1, 1, size, size, cfg.sam2.hidden_size))
        ids = jnp.zeros((1, 2), int)
        embeds = self.fuse_initially(self.embed(ids, ids - 1, visual), jnp.zeros((1, 1), int), maps)
        hidden = self.hidden(embeds, jnp.ones((1, 2), bool))
        prompts, _ = self.prompts(hidden, jnp.zeros((1, 1), int), maps)
        self.occ_predictor(prompts)
        self.logits(hidden)


def _rows(x: jax.Array, positions: jax.Array) -> jax.Array:
    """The row of dtype[B, L, D], or of the one row of dtype[1, L, D], that each of int[B, N] means: int[B, 1]."""
    count = positions.shape[0]
    return (jnp.arange(count) if x.shape[0] == count else jnp.zeros(count, int))[:, None]


@functools.lru_cache(maxsize=8)
def boxed_shapes(cfg: VirstConfig) -> PyTree:
    """Shape, dtype and logical axes of every parameter: jax.ShapeDtypeStructs in boxes of flax. Computes none.

    Those of a TrackerConfig lie under "sam2", as in a whole network.
    """
    if isinstance(cfg, TrackerConfig):
        image = jnp.zeros((cfg.sam2.image_size, cfg.sam2.image_size, 3))
        sam = Sam2(cfg.sam2, cfg.compute)
        return {"sam2": jax.eval_shape(lambda: sam.init(jax.random.key(0), image))["params"]}
    return jax.eval_shape(lambda: Virst(cfg).init(jax.random.key(0)))["params"]
