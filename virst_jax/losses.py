"""Training losses, equal to the release's.

Axes: O conversations of one video, L positions of the sequence, T segmentation frames, U frames used, A anchors,
N [SEG] tokens, R side of the tracker's image.
Source: model/VIRST.py (dice_loss, sigmoid_ce_loss, VirstForCausalLM.forward).
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from virst_jax.config import IGNORE, VirstConfig
from virst_jax.models.sam2.sam2 import Sam2
from virst_jax.models.virst import Virst
from virst_jax.tracking.tracker import Tracker


def dice_loss(logits: jax.Array, target: jax.Array, scale: float = 1000.0, eps: float = 1e-6) -> jax.Array:
    """Dice loss of masks float[..., H, W] against 0/1 targets: float32[...]."""
    probability = jax.nn.sigmoid(logits.astype(jnp.float32))
    target = target.astype(jnp.float32)
    overlap = 2 * (probability / scale * target).sum((-2, -1))
    total = (probability / scale).sum((-2, -1)) + (target / scale).sum((-2, -1))
    return 1 - (overlap + eps) / (total + eps)


def bce_loss(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Mean binary cross-entropy of masks float[..., H, W] against 0/1 targets: float32[...]."""
    loss = optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), target.astype(jnp.float32))
    return loss.mean((-2, -1))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Next-token cross-entropy, averaged over the labels that count.

    Args:
      logits: float32[O, L, vocab].
      labels: int[O, L]; IGNORE: no loss here.
    """
    target = labels[:, 1:]
    counts = target != IGNORE
    loss = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], jnp.where(counts, target, 0))
    return (loss * counts).sum() / jnp.maximum(counts.sum(), 1)


@flax.struct.dataclass
class VideoBatch:
    """One video with its conversations; all arrays of fixed shape."""

    clips: jax.Array  # float[clips, frames, S, S, 3], normalised, for the language model
    token_ids: jax.Array  # int32[O, L]
    visual_index: jax.Array  # int32[O, L]
    labels: jax.Array  # int32[O, L]
    mask: jax.Array  # bool[O, L]
    seg_positions: jax.Array  # int32[O, N]
    frames: jax.Array  # float[T, R, R, 3], normalised, for the tracker
    targets: jax.Array  # bool[O, T, R, R]
    anchors: jax.Array  # int32[A], rising, among the T frames
    frames_used: jax.Array  # int32[U], rising, anchors included; equal to anchors: nothing is tracked


def video_losses(
    cfg: VirstConfig, params: Any, batch: VideoBatch, dropout_rng: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The release's training losses over the conversations of one video.

    Args:
      cfg: its `loss` gives the weights, `fusion.initial` switches the initial fusion on.
      params: of `Virst(cfg)`.
      batch: the video.
      dropout_rng: None: without dropout.

    Returns:
      The weighted sum float32[], and its parts: ce_loss, mask_bce_loss, mask_dice_loss, iou_loss, occ_loss,
      mask_loss (all weighted, float32[]), masks float32[O, U, R, R] (logits).
    """
    model, tracker = Virst(cfg), Tracker(Sam2(cfg.sam2, cfg.compute), training=True)
    deterministic = dropout_rng is None
    rngs = {} if dropout_rng is None else {"dropout": dropout_rng}

    def apply(method: Any, *args: Any, **kwargs: Any) -> Any:
        return model.apply({"params": params}, *args, method=method, rngs=rngs, **kwargs)

    conversations = batch.token_ids.shape[0]

    @jax.checkpoint
    def encode(frame: jax.Array) -> Any:
        encoded = tracker.sam.apply({"params": params["sam2"]}, frame[None], method=Sam2.encode_image)
        return jax.tree.map(lambda x: x[0], encoded)

    # frame by frame, recomputed in the backward pass: the encoder's activations at full size are gigabytes a frame
    features = jax.lax.map(encode, batch.frames)
    maps = jnp.broadcast_to(features.top, (conversations, *features.top.shape))
    visual = apply(Virst.encode_clips, batch.clips)
    visual = visual.reshape(1, -1, visual.shape[-1])
    embeds = apply(
        Virst.embed,
        batch.token_ids,
        batch.visual_index,
        jnp.broadcast_to(visual, (conversations, *visual.shape[1:])),
    )
    if cfg.fusion.initial:
        embeds = apply(Virst.fuse_initially, embeds, batch.seg_positions, maps)
    hidden = apply(Virst.hidden, embeds, batch.mask, deterministic=deterministic)
    labels = jnp.where(batch.labels == cfg.seg_token_id, IGNORE, batch.labels)
    ce = cross_entropy(apply(Virst.logits, hidden), labels)

    prompts, _ = apply(Virst.prompts, hidden, batch.seg_positions, maps, deterministic=deterministic)
    anchor_prompts = prompts[:, :, batch.anchors].swapaxes(1, 2)
    take = lambda index: jax.tree.map(lambda x: x[index], features)  # noqa: E731
    # the tracker numbers the frames that it is given
    local_anchors = jnp.searchsorted(batch.frames_used, batch.anchors)
    count = batch.frames_used.shape[0]
    anchors = tracker.prompt_anchors(
        params["sam2"],
        take(batch.anchors),
        local_anchors,
        jnp.ones(batch.anchors.shape, bool),
        anchor_prompts,
    )
    _, tracked = tracker.track(
        params["sam2"],
        anchors,
        tracker.start(conversations),
        take(batch.frames_used),
        jnp.arange(count),
        jnp.ones(count, bool),
        jnp.asarray(count),
    )
    return _weigh(cfg, batch, ce, tracked.prediction, tracker)


def _weigh(
    cfg: VirstConfig, batch: VideoBatch, ce: jax.Array, prediction: Any, tracker: Tracker
) -> tuple[jax.Array, dict[str, jax.Array]]:
    weights = cfg.loss
    logits = jax.vmap(tracker.sam.high_res)(prediction.low_res)  # [U, O, R, R]
    target = batch.targets[:, batch.frames_used].swapaxes(0, 1)
    predicted = jax.nn.sigmoid(logits) > 0.5
    overlap = (predicted & target).sum((-2, -1)).astype(jnp.float32)
    union = (predicted | target).sum((-2, -1)).astype(jnp.float32)
    iou = overlap / (union + 1e-6)
    there = target.any((-2, -1)).astype(jnp.float32)
    parts = {
        "ce_loss": weights.ce * ce,
        "mask_bce_loss": weights.bce * bce_loss(logits, target).mean(),
        "mask_dice_loss": weights.dice * dice_loss(logits, target).mean(),
        "iou_loss": weights.iou * jnp.abs(iou - prediction.iou).mean(),
        "occ_loss": weights.occ * optax.sigmoid_binary_cross_entropy(prediction.object_score, there).mean(),
    }
    # the IoU loss counts twice: as a part of mask_loss and on its own
    parts["mask_loss"] = parts["mask_bce_loss"] + parts["mask_dice_loss"] + parts["iou_loss"]
    loss = parts["ce_loss"] + parts["mask_loss"] + parts["iou_loss"] + parts["occ_loss"]
    return loss, {**parts, "masks": logits.swapaxes(0, 1)}
