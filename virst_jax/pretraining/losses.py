"""Losses that train a network from random weights on labelled words, before it can learn from sentences and masks.

The release starts from pretrained parts instead. Batches here come from synthetic data, whose objects are known.

Axes: O rows of a batch (targets to segment), P patches of a clip or cells of a frame, W words, N [SEG] tokens, V visual
tokens, L positions of the sequence, D width of the language model, T frames, A anchors, S, R sides of the video
encoder's and the tracker's image.
"""

import flax.struct
import jax
import jax.numpy as jnp

from virst_jax.config import IGNORE, VirstConfig
from virst_jax.models.sam2.sam2 import Sam2
from virst_jax.models.sam2.tracker import Tracker
from virst_jax.pretraining.network import cell_logits, embed_words, patch_logits, prompts_of_words
from virst_jax.training.losses import (
    Losses,
    Params,
    answer_parts,
    bind,
    encode_images,
    mask_losses,
    normalize,
    segment_frames,
)

LENGTH_WEIGHT = 0.1  # of the squared logarithm of the cells' mean square


@flax.struct.dataclass
class PatchBatch:
    """One video or image, with the words that each of its patches shows."""

    clips: jax.Array  # as in TextBatch
    words: jax.Array  # int32[clips, P, W], IGNORE where there are fewer
    weights: jax.Array  # float32[clips, P]


@flax.struct.dataclass
class CellBatch:
    """Images, with the words that each cell of the tracker's features shows."""

    frames: jax.Array  # as in VideoBatch
    words: jax.Array  # int32[T, P, W], IGNORE where there are fewer
    weights: jax.Array  # float32[T, P]


@flax.struct.dataclass
class NamedBatch:
    """An image, or frames of a video, with words for what is to be segmented in them."""

    frames: jax.Array  # as in VideoBatch; all are used
    words: jax.Array  # int32[O, N], one in place of each [SEG]; IGNORE: none
    targets: jax.Array  # bool[O, T, R, R]
    anchors: jax.Array  # int32[A], rising, among the T frames


@flax.struct.dataclass
class ReadBatch:
    """Conversations about one video or image whose visual tokens are replaced by word embeddings."""

    words: jax.Array  # int32[V, W], of each visual token, IGNORE where there are fewer
    token_ids: jax.Array  # this and the rest as in TextBatch
    visual_index: jax.Array
    labels: jax.Array
    mask: jax.Array
    prefix_len: int = flax.struct.field(pytree_node=False, default=0, kw_only=True)
    places: jax.Array | None = flax.struct.field(default=None, kw_only=True)


def patch_loss(cfg: VirstConfig, params: Params, batch: PatchBatch, dropout_rng: jax.Array | None = None) -> Losses:
    """Pretrains the video encoder: a projected patch shall equal the sum of its words' embeddings.

    Returns:
      "patch_loss" + "patch_distance", float32[], and these parts with "patch_recall". patch_loss is the cross-entropy
      of the patches' words; patch_distance is log(1 + d), d the squared distance from the words' embeddings relative
      to their squared length; patch_recall is the share of a patch's words that are among its likeliest ones.
    """
    apply = bind(cfg, params, None)
    logits, patches = apply(patch_logits, normalize(batch.clips))  # [clips, P, vocabulary], [clips, P, D]
    loss, recall, share = _word_loss(logits, batch)
    ideal = jax.lax.stop_gradient(apply(embed_words, batch.words)).astype(jnp.float32)
    square = lambda x: jnp.square(x).sum(-1)  # noqa: E731
    relative = square(patches - ideal) / jnp.maximum(square(ideal), 1e-6)
    distance = (share * jnp.log1p(relative)).sum()  # with random weights, the relative distance is in the thousands
    return loss + distance, {"patch_loss": loss, "patch_distance": distance, "patch_recall": recall}


def cell_loss(cfg: VirstConfig, params: Params, batch: CellBatch, dropout_rng: jax.Array | None = None) -> Losses:
    """Pretrains the tracker's image encoder, which otherwise learns to tell colours alone.

    Returns:
      "cell_loss" + "cell_length", float32[], and these parts with "cell_recall". cell_loss and cell_recall are as of
      patch_loss; cell_length keeps the mean square of a cell near 1, because cosines do not depend on it and attention
      does.
    """
    tracker = Tracker(Sam2(cfg.sam2, cfg.compute))
    features = encode_images(tracker.sam, params, batch.frames)
    cells = features.top.astype(jnp.float32).reshape(*batch.weights.shape, -1)
    loss, recall, _ = _word_loss(bind(cfg, params, None)(cell_logits, cells), batch)
    length = LENGTH_WEIGHT * jnp.square(jnp.log(jnp.square(cells).mean(-1) + 1e-6)).mean()
    return loss + length, {"cell_loss": loss, "cell_length": length, "cell_recall": recall}


def named_loss(cfg: VirstConfig, params: Params, batch: NamedBatch, dropout_rng: jax.Array | None = None) -> Losses:
    """Pretrains fusion and tracker: video_losses with words' directions in place of the hidden states of [SEG].

    Neither language model nor video encoder runs. Parts as of video_losses, without "ce_loss".
    """
    tracker = Tracker(Sam2(cfg.sam2, cfg.compute), training=True, dropout_rng=dropout_rng)
    features = encode_images(tracker.sam, params, batch.frames)
    maps = features.top[None]
    prompts = bind(cfg, params, dropout_rng)(prompts_of_words, batch.words, maps)
    frames = jnp.arange(batch.frames.shape[0])
    valid = jnp.ones(frames.shape, bool)
    prediction = segment_frames(tracker, params, features, prompts, batch.anchors, frames, valid)
    parts = mask_losses(cfg, tracker, prediction, batch.targets, valid[:, None].astype(jnp.float32))
    # the IoU loss counts twice, as in video_losses
    return parts["mask_loss"] + parts["iou_loss"] + parts["occ_loss"], parts


def read_parts(cfg: VirstConfig, params: Params, batch: ReadBatch, dropout_rng: jax.Array | None = None) -> Losses:
    """Pretrains the language model: text_parts with visual tokens replaced by word embeddings."""
    apply = bind(cfg, params, dropout_rng)
    return answer_parts(cfg, apply, batch, apply(embed_words, batch.words), dropout_rng is None)


def _word_loss(logits: jax.Array, batch: PatchBatch | CellBatch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """logits float32[..., P, vocabulary] -> cross-entropy and recall, float32[], and weights that sum to one,
    float32[..., P]."""
    given = batch.words != IGNORE
    number = given.sum(-1)
    words = jnp.where(given, batch.words, 0)
    share = given * (batch.weights / jnp.maximum(number, 1))[..., None]
    share = share / jnp.maximum(share.sum(), 1e-6)
    loss = -(share * jnp.take_along_axis(jax.nn.log_softmax(logits), words, axis=-1)).sum()
    best = jax.lax.top_k(logits, words.shape[-1])[0]
    least = jnp.take_along_axis(best, jnp.maximum(number - 1, 0)[..., None], axis=-1)
    found = jnp.take_along_axis(logits, words, axis=-1) >= least
    return loss, (share * found).sum(), share.sum(-1)
