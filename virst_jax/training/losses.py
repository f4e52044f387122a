"""Training losses, equal to the release's, and the batches that they take.

Axes: O conversations of one video, V visual tokens, L positions of the sequence, P of them shared by all conversations,
E those of one conversation behind the video, Q those of packed conversations together, D width of the language model,
T segmentation frames, U frames used, A anchors, N [SEG] tokens, S, R sides of the video encoder's and the tracker's
image.
Source: model/VIRST.py (dice_loss, sigmoid_ce_loss, VirstForCausalLM.forward).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from virst_jax.config import FRAME_BY_FRAME, IGNORE, PIXEL_MEAN, PIXEL_STD, VirstConfig
from virst_jax.models.sam2.hiera import ImageEncoder
from virst_jax.models.sam2.sam2 import PYRAMID, Features, Prediction, Sam2
from virst_jax.models.sam2.tracker import Tracker
from virst_jax.models.umt import VideoEncoder
from virst_jax.models.virst import Virst
from virst_jax.ops.dropout import hardware_key
from virst_jax.ops.one_at_a_time import gradient_with_value, recomputed
from virst_jax.training.answers import Answers, answers_loss
from virst_jax.types import Params

Losses = tuple[jax.Array, dict[str, Any]]  # what is minimised, float32[], and its parts
ANSWERS = "answers"  # among the parts of an unfinished loss: Answers, whose cross-entropy `finish` adds


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


@flax.struct.dataclass
class TextBatch:
    """Conversations about one video or image; all arrays of fixed shape.

    Conversations that fill up a batch repeat the first one, with labels of IGNORE. Packed ones stand in one row, of
    L = P + Q positions, one behind the other: O is then 1 in the shapes of token_ids, visual_index, labels and mask,
    and conversations that fill up have no tokens.
    """

    clips: jax.Array  # float (normalised) or uint8 [clips, frames, S, S, 3], for the language model
    token_ids: jax.Array  # int32[O, L]
    visual_index: jax.Array  # int32[O, L]
    labels: jax.Array  # int32[O, L]
    mask: jax.Array  # bool[O, L]
    # P: so many first positions are the same in every conversation and run through the language model once; 0: none
    prefix_len: int = flax.struct.field(pytree_node=False, default=0, kw_only=True)
    # int32[O, E], which of the Q positions each conversation's tokens take, -1: there is none; None: not packed
    places: jax.Array | None = flax.struct.field(default=None, kw_only=True)


@flax.struct.dataclass
class VideoBatch(TextBatch):
    """One video with conversations that segment it."""

    # int32[O, N]; -1 in conversations without [SEG], and in those that fill up packed ones
    seg_positions: jax.Array
    frames: jax.Array  # float (normalised) or uint8 [T, R, R, 3], for the tracker
    targets: jax.Array  # bool[O, U, R, R], on the frames used
    anchors: jax.Array  # int32[A], rising, all different, among the T frames
    frames_used: jax.Array  # int32[U], rising, anchors included; equal to anchors: nothing is tracked
    # which of the frames used, and of the conversations, are no filler; None: all. Filler frames come last.
    used_valid: jax.Array | None = None  # bool[U]
    conversation_valid: jax.Array | None = None  # bool[O]


class Conversations(Protocol):
    """What `answer_loss` takes of a batch; see TextBatch."""

    @property
    def token_ids(self) -> jax.Array: ...
    @property
    def visual_index(self) -> jax.Array: ...
    @property
    def labels(self) -> jax.Array: ...
    @property
    def mask(self) -> jax.Array: ...
    @property
    def prefix_len(self) -> int: ...
    @property
    def places(self) -> jax.Array | None: ...


class Apply(Protocol):
    """Applies a method of Virst, or a function of a bound Virst, with given parameters and dropout."""

    def __call__(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any: ...


def text_loss(cfg: VirstConfig, params: Params, batch: TextBatch, dropout_rng: jax.Array | None = None) -> Losses:
    """Cross-entropy of conversations without segmentation, float32[], and {"ce_loss": the same}."""
    return finish(cfg, params, text_parts(cfg, params, batch, dropout_rng))


def text_parts(cfg: VirstConfig, params: Params, batch: TextBatch, dropout_rng: jax.Array | None = None) -> Losses:
    """text_loss, unfinished."""
    apply = bind(cfg, params, dropout_rng)
    visual = visual_tokens(cfg, params, apply, batch.clips, alone=in_turn(cfg))
    return answer_parts(cfg, apply, batch, visual, dropout_rng is None)


def answer_parts(
    cfg: VirstConfig, apply: Apply, batch: Conversations, visual: jax.Array, deterministic: bool
) -> Losses:
    """text_parts, given the visual tokens: dtype[..., D], V of them."""
    hidden = hidden_states(apply, batch, embed(apply, batch, visual), deterministic)
    return jnp.zeros((), jnp.float32), {ANSWERS: answers_of(cfg, hidden, batch)}


def finish(cfg: VirstConfig, params: Params, losses: Losses, examples: int = 1) -> Losses:
    """Adds the cross-entropy of an unfinished loss's answers, if it has any, as "ce_loss".

    The head is applied to all examples of a batch together, so it comes after what is done for each.

    examples: that the answers are of; the mean over them is added.
    """
    value, parts = losses
    if ANSWERS not in parts:
        return losses
    ce = answers_loss(cfg, params, parts[ANSWERS]) / examples
    return value + ce, {"ce_loss": ce, **{name: part for name, part in parts.items() if name != ANSWERS}}


def video_losses(cfg: VirstConfig, params: Params, batch: VideoBatch, dropout_rng: jax.Array | None = None) -> Losses:
    """The release's training losses over the conversations of one video.

    Args:
      cfg: its `loss` gives the weights, `fusion.initial` switches the initial fusion on.
      params: of `Virst(cfg)`.
      batch: the video.
      dropout_rng: None: without dropout.

    Returns:
      The weighted sum float32[], and its parts: ce_loss, mask_bce_loss, mask_dice_loss, iou_loss, occ_loss,
      mask_loss (all weighted, float32[]), mean_iou float32[], masks float32[O, U, R, R] (logits).
    """
    return finish(cfg, params, _video(cfg, params, batch, dropout_rng, alone=False))


def video_parts(cfg: VirstConfig, params: Params, batch: VideoBatch, dropout_rng: jax.Array | None = None) -> Losses:
    """video_losses, unfinished.

    Of a batch with large frames (`in_turn`), each device encodes and tracks one video after the other: it needs the
    memory of one, and a TPU takes less time for each. Masks are not among the parts then.
    """
    return _video(cfg, params, batch, dropout_rng, alone=in_turn(cfg))


def _video(
    cfg: VirstConfig, params: Params, batch: VideoBatch, dropout_rng: jax.Array | None, *, alone: bool
) -> Losses:
    if alone:
        features = encode_alone(cfg, params, batch.frames)
    else:
        features = encode_frames(Sam2(cfg.sam2, cfg.compute), params, batch.frames)
    given, answers = _understand(cfg, params, batch, features, dropout_rng, alone=alone)
    value, parts = (_segment_alone if alone else _segment)(cfg, params["sam2"], given)
    return value, {ANSWERS: answers, **parts}


@flax.struct.dataclass
class Tracked:
    """What the losses of one video's masks are computed from."""

    features: Any  # Features with a leading axis T
    prompts: Any  # dtype[O, N, T, C]
    targets: jax.Array  # as those of VideoBatch
    anchors: jax.Array
    frames_used: jax.Array
    valid: jax.Array  # bool[U]
    weights: jax.Array  # float32[U, O] or float32[U, 1]
    dropout_rng: jax.Array | None


def _understand(
    cfg: VirstConfig,
    params: Params,
    batch: VideoBatch,
    features: Features,
    dropout_rng: jax.Array | None,
    *,
    alone: bool,
) -> tuple[Tracked, Answers]:
    """What the language model makes of a video: prompts for the tracker, and answers."""
    apply, deterministic = bind(cfg, params, dropout_rng), dropout_rng is None
    maps = features.top[None]
    embeds = embed(apply, batch, visual_tokens(cfg, params, apply, batch.clips, alone=alone))
    if cfg.fusion.initial:
        embeds = apply(Virst.fuse_initially, embeds, batch.seg_positions, maps)
    prefix, rest = hidden_states(apply, batch, embeds, deterministic)

    # [SEG] stands behind the prefix; conversations without it get prompts that do not count
    positions = jnp.maximum(batch.seg_positions - batch.prefix_len, 0)
    prompts, _ = apply(Virst.prompts, rest, positions, maps, deterministic=deterministic)
    count = batch.frames_used.shape[0]
    valid = jnp.ones(count, bool) if batch.used_valid is None else batch.used_valid
    weights = valid[:, None].astype(jnp.float32)
    if batch.conversation_valid is not None:
        weights = weights * batch.conversation_valid
    chosen = (batch.targets, batch.anchors, batch.frames_used)
    return Tracked(features, prompts, *chosen, valid, weights, dropout_rng), answers_of(cfg, (prefix, rest), batch)


def _segment(cfg: VirstConfig, sam: Params, given: Tracked) -> Losses:
    """The losses of a video's masks.

    sam: the parameters of SAM 2.1; those of its image encoder may be missing.
    """
    tracker = Tracker(Sam2(cfg.sam2, cfg.compute), training=True, dropout_rng=given.dropout_rng)
    frames = (given.anchors, given.frames_used, given.valid)
    prediction = segment_frames(tracker, {"sam2": sam}, given.features, given.prompts, *frames)
    parts = mask_losses(cfg, tracker, prediction, given.targets, given.weights)
    # the IoU loss counts twice: as a part of mask_loss and on its own
    return parts["mask_loss"] + parts["iou_loss"] + parts["occ_loss"], parts


def _segment_alone(cfg: VirstConfig, sam: Params, given: Tracked) -> Losses:
    """As _segment, without masks; a batch's videos come one after another."""

    def loss(sam: Params, own: tuple[Any, Tracked]) -> Losses:
        (features, prompts), rest = own
        # A device has a video for itself, so that bits of the hardware's generator depend on no mesh. Layers are
        # computed three times, with their dropout: Threefry would make the whole tracker a tenth slower on a TPU.
        rng = None if rest.dropout_rng is None else hardware_key(rest.dropout_rng)
        given = dataclasses.replace(rest, features=features, prompts=prompts, dropout_rng=rng)
        value, parts = _segment(cfg, sam, given)
        return value, {name: part for name, part in parts.items() if name != "masks"}

    without_encoder = {name: part for name, part in sam.items() if name != "image_encoder"}
    rest = dataclasses.replace(given, features=None, prompts=None)
    value, parts = gradient_with_value(loss)(without_encoder, (given.features, given.prompts), rest)
    return value, jax.lax.stop_gradient(parts)


# What losses consist of


def bind(cfg: VirstConfig, params: Params, dropout_rng: jax.Array | None) -> Apply:
    """Applies methods of `Virst(cfg)`; without dropout where `dropout_rng` is None."""
    model, rngs = Virst(cfg), {} if dropout_rng is None else {"dropout": dropout_rng}

    def apply(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return model.apply({"params": params}, *args, method=method, rngs=rngs, **kwargs)

    return apply


def in_turn(cfg: VirstConfig) -> bool:
    """Whether frames are so large that a device encodes and tracks the videos of a batch one after another."""
    return cfg.sam2.image_size >= FRAME_BY_FRAME


def normalize(pixels: jax.Array) -> jax.Array:
    """uint8 pixels as data.transforms.normalize makes them; others are so already."""
    if pixels.dtype != jnp.uint8:
        return pixels
    mean, std = np.array(PIXEL_MEAN, np.float32), np.array(PIXEL_STD, np.float32)
    return (pixels.astype(jnp.float32) / 255 - mean) / std


def encode_images(sam: Sam2, params: Params, frames: jax.Array) -> Features:
    """Features of the tracker's frames [T, R, R, 3], with a leading axis T."""
    encoded: Any = sam.apply({"params": params["sam2"]}, normalize(frames), method=Sam2.encode_image)
    return encoded


def encode_frames(sam: Sam2, params: Params, frames: jax.Array) -> Features:
    """As encode_images, frame by frame; large ones one after another."""

    def encode(frame: jax.Array) -> Features:
        return jax.tree.map(lambda x: x[0], encode_images(sam, params, frame[None]))

    if sam.cfg.image_size < FRAME_BY_FRAME:
        return jax.vmap(encode)(frames)
    # recomputed in the backward pass, but for its outputs: the activations of a large frame are gigabytes
    keep = jax.checkpoint_policies.save_only_these_names(PYRAMID)
    return jax.lax.map(jax.checkpoint(encode, policy=keep), frames)


def encode_alone(cfg: VirstConfig, params: Params, frames: jax.Array) -> Features:
    """As encode_frames; the frames of a batch's videos come one after another, too."""
    sam, encoder = Sam2(cfg.sam2, cfg.compute), ImageEncoder(cfg.sam2, cfg.compute)

    def encode(params: Params, frame: jax.Array) -> list[jax.Array]:
        maps: Any = encoder.apply({"params": params}, normalize(frame[None]))
        return [x[0] for x in maps]

    def encode_all(params: Params, frames: jax.Array) -> list[jax.Array]:
        return jax.lax.map(jax.checkpoint(functools.partial(encode, params)), frames)

    maps = recomputed(encode_all)(params["sam2"]["image_encoder"], frames)
    refined: Any = sam.apply({"params": params["sam2"]}, maps, method=Sam2.refine)
    return refined


def visual_tokens(cfg: VirstConfig, params: Params, apply: Apply, clips: jax.Array, *, alone: bool) -> jax.Array:
    """What the language model sees of clips, as those of TextBatch: dtype[clips, tokens, D].

    alone: a batch's videos come one after another.
    """
    if not alone:
        tokens: jax.Array = apply(Virst.encode_clips, normalize(clips))
        return tokens
    encoder = VideoEncoder(cfg.vision, cfg.compute)
    encode = recomputed(lambda own, clips: encoder.apply({"params": own}, normalize(clips)))
    features = encode(params["vision"], clips)
    projected: jax.Array = apply(Virst.project, features, clips.shape[1])
    return projected


def embed(apply: Apply, batch: Conversations, visual: jax.Array) -> jax.Array:
    """Input embeddings dtype[O, L, D], or dtype[1, L, D], with the visual tokens dtype[..., D] at their places."""
    visual = visual.reshape(1, -1, visual.shape[-1])
    visual = jnp.broadcast_to(visual, (batch.token_ids.shape[0], *visual.shape[1:]))
    embedded: jax.Array = apply(Virst.embed, batch.token_ids, batch.visual_index, visual)
    return embedded


def hidden_states(
    apply: Apply, batch: Conversations, embeds: jax.Array, deterministic: bool
) -> tuple[jax.Array | None, jax.Array]:
    """Hidden states of the prefix dtype[1, P, D], or None, and of the other positions dtype[O, L - P, D]; O is 1 if the
    conversations are packed, which need a prefix."""
    if batch.prefix_len:
        given = (embeds, batch.mask, batch.prefix_len)
        both: tuple[jax.Array, jax.Array] = apply(
            Virst.hidden_after_prefix, *given, deterministic=deterministic, places=batch.places
        )
        return both
    return None, apply(Virst.hidden, embeds, batch.mask, deterministic=deterministic)


def segment_frames(
    tracker: Tracker,
    params: Params,
    features: Features,
    prompts: jax.Array,
    anchors: jax.Array,
    frames_used: jax.Array,
    valid: jax.Array,
) -> Prediction:
    """Predictions on the frames used, with leading axes U and O.

    Args:
      features: with a leading axis T.
      prompts: dtype[O, N, T, C].
      anchors, frames_used, valid: as anchors, frames_used and used_valid of VideoBatch.
    """
    take = lambda index: jax.tree.map(lambda x: x[index], features)  # noqa: E731
    # the tracker numbers the frames that it is given
    order = jnp.where(valid, frames_used, jnp.iinfo(jnp.int32).max)
    prompted = tracker.prompt_anchors(
        params["sam2"],
        take(anchors),
        jnp.searchsorted(order, anchors).astype(jnp.int32),
        jnp.ones(anchors.shape, bool),
        prompts[:, :, anchors].swapaxes(1, 2),
    )
    count = frames_used.shape[0]
    if count == anchors.shape[0]:
        return prompted.prediction
    return tracker.track_in_training(params["sam2"], prompted, take(frames_used), jnp.arange(count), valid)


def answers_of(cfg: VirstConfig, hidden: tuple[jax.Array | None, jax.Array], batch: Conversations) -> Answers:
    """The positions of the conversations, so weighted that the sum is `cfg.loss.ce` times the mean cross-entropy over
    all labels but IGNORE and [SEG].

    hidden: as hidden_states gives them.
    """
    labels = jnp.where(batch.labels == cfg.seg_token_id, IGNORE, batch.labels)
    prefix, rest = hidden
    width = rest.shape[-1]
    if prefix is None:
        states, targets = rest[:, :-1], labels[:, 1:]
        times = jnp.ones(targets.shape, jnp.float32)
    else:
        length, rows = batch.prefix_len, rest.shape[0]
        before = jnp.concatenate([jnp.broadcast_to(prefix[:, -1:], (rows, 1, width)), rest[:, :-1]], axis=1)
        real = (labels != IGNORE).any(1).sum()  # the prefix counts once for every conversation that is no filler
        if batch.places is not None:  # the prefix comes before every conversation, not before the first alone
            starts = batch.places[:, 0]
            first = (jnp.arange(rest.shape[1])[:, None] == starts).any(1, keepdims=True)
            before, real = jnp.where(first, prefix[:, -1:], before), (starts >= 0).sum()
        states = jnp.concatenate([prefix[:, :-1].reshape(-1, width), before.reshape(-1, width)])
        targets = jnp.concatenate([labels[0, 1:length], labels[:, length:].reshape(-1)])
        times = jnp.where(jnp.arange(len(targets)) < length - 1, real.astype(jnp.float32), 1.0)
    counts = (targets != IGNORE) * times
    weight = cfg.loss.ce * counts / jnp.maximum(counts.sum(), 1)
    flat = (states.reshape(-1, width), jnp.where(counts > 0, targets, 0).reshape(-1), weight.reshape(-1))
    return Answers(*flat)


def mask_losses(
    cfg: VirstConfig, tracker: Tracker, prediction: Prediction, targets: jax.Array, weights: jax.Array
) -> dict[str, jax.Array]:
    """The losses of masks, weighted by `cfg.loss` and averaged; "mean_iou" float32[], "masks" float32[O, U, R, R].

    Args:
      prediction: with leading axes U and O.
      targets: bool[O, U, R, R].
      weights: float32, broadcast to [U, O]: 0 for filler frames and conversations, which do not count; else 1.
    """
    scale = cfg.loss
    logits = jax.vmap(tracker.sam.high_res)(prediction.low_res)  # [U, O, R, R]
    target = targets.swapaxes(0, 1)
    weights = jnp.broadcast_to(weights, logits.shape[:2])

    def mean(x: jax.Array) -> jax.Array:
        return (jnp.where(weights > 0, x, 0) * weights).sum() / jnp.maximum(weights.sum(), 1)

    predicted = logits > 0
    overlap = (predicted & target).sum((-2, -1)).astype(jnp.float32)
    union = (predicted | target).sum((-2, -1)).astype(jnp.float32)
    iou = overlap / (union + 1e-6)
    present = target.any((-2, -1)).astype(jnp.float32)
    parts = {
        "mask_bce_loss": scale.bce * mean(bce_loss(logits, target)),
        "mask_dice_loss": scale.dice * mean(dice_loss(logits, target)),
        "iou_loss": scale.iou * mean(jnp.abs(iou - prediction.iou)),
        "occ_loss": scale.occ * mean(optax.sigmoid_binary_cross_entropy(prediction.object_score, present)),
    }
    parts["mask_loss"] = parts["mask_bce_loss"] + parts["mask_dice_loss"] + parts["iou_loss"]
    mean_iou = mean(jnp.where(union > 0, iou, 1.0))
    return {**parts, "mean_iou": mean_iou, "masks": logits.swapaxes(0, 1)}
