"""Training losses, equal to the release's.

Axes: O conversations of one video, P patches of a clip, W words, L positions of the sequence, D width of the language
model, T segmentation frames, U frames used, A anchors, N [SEG] tokens, S, R sides of the video encoder's and the
tracker's image.
Source: model/VIRST.py (dice_loss, sigmoid_ce_loss, VirstForCausalLM.forward).
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from virst_jax.config import FRAME_BY_FRAME, IGNORE, VirstConfig
from virst_jax.models.sam2.sam2 import PYRAMID, Sam2
from virst_jax.models.sam2.tracker import Tracker
from virst_jax.models.virst import Virst

CE_BUDGET = 2**26  # logits that the cross-entropy holds at a time: 256 MiB in float32
LENGTH_WEIGHT = 0.1  # of the squared logarithm of the cells' squared length
PIXEL_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
PIXEL_STD = np.array([0.229, 0.224, 0.225], np.float32)


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
class PatchBatch:
    """One video or image, with words for what each of its patches shows."""

    clips: jax.Array  # as in TextBatch
    words: jax.Array  # int32[clips, P, W], IGNORE where there are fewer
    weights: jax.Array  # float32[clips, P]


@flax.struct.dataclass
class CellBatch:
    """Pictures, with words for what each cell of the tracker's features shows."""

    frames: jax.Array  # as in VideoBatch
    words: jax.Array  # int32[T, P, W], P cells
    weights: jax.Array  # float32[T, P]


@flax.struct.dataclass
class NamedBatch:
    """A picture or frames of a video, with words for what is to be segmented in them."""

    frames: jax.Array  # as in VideoBatch; all are used
    words: jax.Array  # int32[O, N], what each [SEG] says, IGNORE: nothing
    targets: jax.Array  # bool[O, T, R, R]
    anchors: jax.Array  # int32[A], rising, among the T frames


@flax.struct.dataclass
class ReadBatch:
    """Conversations about one video or image that is given in words; fields as in TextBatch."""

    words: jax.Array  # int32[V, W], what each visual token shows, IGNORE where there are fewer
    token_ids: jax.Array
    visual_index: jax.Array
    labels: jax.Array
    mask: jax.Array
    shared: int = flax.struct.field(pytree_node=False, default=0, kw_only=True)


@flax.struct.dataclass
class TextBatch:
    """Conversations about one video or image; all arrays of fixed shape.

    Conversations that fill up a batch have a mask of False and labels of IGNORE.
    """

    clips: jax.Array  # float (normalised) or uint8 [clips, frames, S, S, 3], for the language model
    token_ids: jax.Array  # int32[O, L]
    visual_index: jax.Array  # int32[O, L]
    labels: jax.Array  # int32[O, L]
    mask: jax.Array  # bool[O, L]
    # so many first positions are the same in every conversation and are read once; 0: read them all
    shared: int = flax.struct.field(pytree_node=False, default=0, kw_only=True)


@flax.struct.dataclass
class VideoBatch(TextBatch):
    """One video with conversations that segment it."""

    seg_positions: jax.Array  # int32[O, N]
    frames: jax.Array  # float (normalised) or uint8 [T, R, R, 3], for the tracker
    targets: jax.Array  # bool[O, U, R, R], on the frames used
    anchors: jax.Array  # int32[A], rising, among the T frames
    frames_used: jax.Array  # int32[U], rising, anchors included; equal to anchors: nothing is tracked
    # which of the frames used, and of the conversations, count; None: all. Frames that do not stand at the end.
    used_valid: jax.Array | None = None  # bool[U]
    conversation_valid: jax.Array | None = None  # bool[O]


def patch_loss(
    cfg: VirstConfig, params: Any, batch: PatchBatch, dropout_rng: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of the words of every patch ("patch_loss") and "patch_distance": their sum, and these parts,
    float32[].

    The video encoder's pretraining, which the release takes from others: it makes a visual token point where the
    embeddings of its words do, and as far: the distance is log(1 + the squared one, relative to that). "patch_recall"
    is the share of a patch's words that are the likeliest ones.
    """
    apply = _applier(cfg, params, None)
    logits, patches = apply(Virst.patch_words, _normalised(batch.clips))  # [clips, P, vocabulary], [clips, P, D]
    loss, recall, share = _word_loss(logits, batch)
    ideal = jax.lax.stop_gradient(apply(Virst.embed_words, batch.words)).astype(jnp.float32)
    square = lambda x: jnp.square(x).sum(-1)  # noqa: E731
    each = square(patches - ideal) / jnp.maximum(square(ideal), 1e-6)
    distance = (share * jnp.log1p(each)).sum()  # at the start it is in the thousands
    return loss + distance, {"patch_loss": loss, "patch_distance": distance, "patch_recall": recall}


def cell_loss(
    cfg: VirstConfig, params: Any, batch: CellBatch, dropout_rng: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """As patch_loss for the tracker's image encoder, which would else know colours only: "cell_loss", "cell_recall".

    "cell_length" keeps the cells as long as normalised vectors are: cosines do not mind their length, attention does.
    """
    sam = Sam2(cfg.sam2, cfg.compute)
    features: Any = sam.apply({"params": params["sam2"]}, _normalised(batch.frames), method=Sam2.encode_image)
    cells = features.top.astype(jnp.float32).reshape(*batch.weights.shape, -1)
    loss, recall, _ = _word_loss(_applier(cfg, params, None)(Virst.cell_words, cells), batch)
    length = LENGTH_WEIGHT * jnp.square(jnp.log(jnp.square(cells).mean(-1) + 1e-6)).mean()
    return loss + length, {"cell_loss": loss, "cell_length": length, "cell_recall": recall}


def named_loss(
    cfg: VirstConfig, params: Any, batch: NamedBatch, dropout_rng: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """video_losses of words in place of what the language model says at [SEG]; parts as there, but "ce_loss"."""
    tracker = Tracker(Sam2(cfg.sam2, cfg.compute), training=True, dropout_rng=dropout_rng)
    encoded: Any = tracker.sam.apply({"params": params["sam2"]}, _normalised(batch.frames), method=Sam2.encode_image)
    maps = jnp.broadcast_to(encoded.top, (batch.words.shape[0], *encoded.top.shape))
    prompts = _applier(cfg, params, dropout_rng)(Virst.prompts_of_words, batch.words, maps)
    order = jnp.arange(batch.frames.shape[0])
    used = jnp.ones(order.shape, bool)
    prediction = _segment(tracker, params, encoded, prompts, batch.anchors, order, used)
    loss, parts = _weigh(cfg, batch, jnp.zeros(()), prediction, used, tracker)
    del parts["ce_loss"]
    return loss, parts


def _word_loss(logits: jax.Array, batch: PatchBatch | CellBatch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """logits float32[..., P, vocabulary] -> cross-entropy and recall, float32[], and weights that sum to one,
    float32[..., P]."""
    said = batch.words != IGNORE
    number = said.sum(-1)
    words = jnp.where(said, batch.words, 0)
    share = said * (batch.weights / jnp.maximum(number, 1))[..., None]
    share = share / jnp.maximum(share.sum(), 1e-6)
    loss = -(share * jnp.take_along_axis(jax.nn.log_softmax(logits), words, axis=-1)).sum()
    best = jax.lax.top_k(logits, words.shape[-1])[0]
    least = jnp.take_along_axis(best, jnp.maximum(number - 1, 0)[..., None], axis=-1)
    found = jnp.take_along_axis(logits, words, axis=-1) >= least
    return loss, (share * found).sum(), share.sum(-1)


def text_loss(
    cfg: VirstConfig, params: Any, batch: TextBatch | ReadBatch, dropout_rng: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of conversations without segmentation, float32[], and {"ce_loss": the same}."""
    apply = _applier(cfg, params, dropout_rng)
    hidden = _read(apply, batch, _embed(apply, batch), dropout_rng is None)
    loss = cfg.loss.ce * _cross_entropy(cfg, apply, hidden, batch)
    return loss, {"ce_loss": loss}


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
      mask_loss (all weighted, float32[]), mean_iou float32[], masks float32[O, U, R, R] (logits).
    """
    tracker = Tracker(Sam2(cfg.sam2, cfg.compute), training=True, dropout_rng=dropout_rng)
    apply, deterministic = _applier(cfg, params, dropout_rng), dropout_rng is None
    conversations = batch.token_ids.shape[0]

    def encode(frame: jax.Array) -> Any:
        encoded = tracker.sam.apply({"params": params["sam2"]}, _normalised(frame)[None], method=Sam2.encode_image)
        return jax.tree.map(lambda x: x[0], encoded)

    if cfg.sam2.image_size < FRAME_BY_FRAME:
        features = jax.vmap(encode)(batch.frames)
    else:  # recomputed in the backward pass, but for its outputs: the activations of a large frame are gigabytes
        keep = jax.checkpoint_policies.save_only_these_names(PYRAMID)
        features = jax.lax.map(jax.checkpoint(encode, policy=keep), batch.frames)
    maps = jnp.broadcast_to(features.top, (conversations, *features.top.shape))
    embeds = _embed(apply, batch)
    if cfg.fusion.initial:
        embeds = apply(Virst.fuse_initially, embeds, batch.seg_positions, maps)
    hidden = _read(apply, batch, embeds, deterministic)
    ce = _cross_entropy(cfg, apply, hidden, batch)

    # [SEG] stands in the part that is not shared
    rest, offset = hidden[1], batch.shared
    prompts, _ = apply(Virst.prompts, rest, batch.seg_positions - offset, maps, deterministic=deterministic)
    count = batch.frames_used.shape[0]
    used = jnp.ones(count, bool) if batch.used_valid is None else batch.used_valid
    prediction = _segment(tracker, params, features, prompts, batch.anchors, batch.frames_used, used)
    return _weigh(cfg, batch, ce, prediction, used, tracker)


def _segment(
    tracker: Tracker,
    params: Any,
    features: Any,
    prompts: jax.Array,
    anchors: jax.Array,
    frames_used: jax.Array,
    used: jax.Array,
) -> Any:
    """Predictions on the frames used: features with leading axis T, prompts dtype[O, N, T, C], the rest as in
    VideoBatch."""
    take = lambda index: jax.tree.map(lambda x: x[index], features)  # noqa: E731
    # the tracker numbers the frames that it is given
    order = jnp.where(used, frames_used, jnp.iinfo(jnp.int32).max)
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
    _, tracked = tracker.track(
        params["sam2"],
        prompted,
        tracker.start(prompts.shape[0]),
        take(frames_used),
        jnp.arange(count),
        used,
        used.sum(),
    )
    return tracked.prediction


def _applier(cfg: VirstConfig, params: Any, dropout_rng: jax.Array | None) -> Any:
    model, rngs = Virst(cfg), {} if dropout_rng is None else {"dropout": dropout_rng}

    def apply(method: Any, *args: Any, **kwargs: Any) -> Any:
        return model.apply({"params": params}, *args, method=method, rngs=rngs, **kwargs)

    return apply


def _normalised(pixels: jax.Array) -> jax.Array:
    """uint8 pixels as data.transforms.normalize makes them; others are so already."""
    if pixels.dtype != jnp.uint8:
        return pixels
    return (pixels.astype(jnp.float32) / 255 - PIXEL_MEAN) / PIXEL_STD


def _embed(apply: Any, batch: TextBatch | ReadBatch) -> jax.Array:
    if isinstance(batch, ReadBatch):
        visual = apply(Virst.embed_words, batch.words)
    else:
        visual = apply(Virst.encode_clips, _normalised(batch.clips))
    visual = visual.reshape(1, -1, visual.shape[-1])
    conversations = batch.token_ids.shape[0]
    visual = jnp.broadcast_to(visual, (conversations, *visual.shape[1:]))
    return apply(Virst.embed, batch.token_ids, batch.visual_index, visual)


def _read(
    apply: Any, batch: TextBatch | ReadBatch, embeds: jax.Array, deterministic: bool
) -> tuple[jax.Array | None, jax.Array]:
    """Hidden states of the shared positions dtype[1, P, D], or None, and of the others dtype[O, L - P, D]."""
    if batch.shared:
        return apply(Virst.hidden_after_prefix, embeds, batch.mask, batch.shared, deterministic=deterministic)
    return None, apply(Virst.hidden, embeds, batch.mask, deterministic=deterministic)


def _cross_entropy(
    cfg: VirstConfig, apply: Any, hidden: tuple[jax.Array | None, jax.Array], batch: TextBatch | ReadBatch
) -> jax.Array:
    """Next-token cross-entropy, averaged over the labels that count; [SEG] does not."""
    labels = jnp.where(batch.labels == cfg.seg_token_id, IGNORE, batch.labels)
    prefix, rest = hidden
    vocabulary = cfg.llm.vocab_size
    if prefix is None:
        total, count = _sum_cross_entropy(apply, rest[:, :-1], labels[:, 1:], vocabulary)
    else:
        shared, rows = batch.shared, rest.shape[0]
        before = jnp.concatenate([jnp.broadcast_to(prefix[:, -1:], (rows, 1, rest.shape[-1])), rest[:, :-1]], axis=1)
        total, count = _sum_cross_entropy(apply, before, labels[:, shared:], vocabulary)
        total_once, count_once = _sum_cross_entropy(apply, prefix[:, :-1], labels[:1, 1:shared], vocabulary)
        real = (labels != IGNORE).any(1).sum()  # conversations that fill up a batch share nothing
        total, count = total + real * total_once, count + real * count_once
    return total / jnp.maximum(count, 1)


def _sum_cross_entropy(
    apply: Any, hidden: jax.Array, target: jax.Array, vocabulary: int
) -> tuple[jax.Array, jax.Array]:
    """hidden dtype[B, L, D], target int[B, L] -> sum float32[] over the targets that count, and their number."""

    def of(piece: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden, target = piece
        logits = apply(Virst.logits, hidden)
        counts = target != IGNORE
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counts, target, 0))
        return (loss * counts).sum()

    batch, length, width = hidden.shape
    pieces = -(-batch * length * vocabulary // CE_BUDGET)
    if pieces > 1:  # the logits of a long video would take gigabytes
        size = -(-length // pieces)
        padding = ((0, 0), (0, size * pieces - length))
        targets = jnp.pad(target, padding, constant_values=IGNORE).reshape(batch, pieces, size).swapaxes(0, 1)
        states = jnp.pad(hidden, (*padding, (0, 0))).reshape(batch, pieces, size, width).swapaxes(0, 1)
        total = jax.lax.map(jax.checkpoint(of), (states, targets)).sum()
    else:
        total = of((hidden, target))
    return total, (target != IGNORE).sum()


def _weigh(
    cfg: VirstConfig, batch: VideoBatch | NamedBatch, ce: jax.Array, prediction: Any, used: jax.Array, tracker: Tracker
) -> tuple[jax.Array, dict[str, jax.Array]]:
    weights = cfg.loss
    logits = jax.vmap(tracker.sam.high_res)(prediction.low_res)  # [U, O, R, R]
    target = batch.targets.swapaxes(0, 1)
    counts = used[:, None].astype(jnp.float32)
    if isinstance(batch, VideoBatch) and batch.conversation_valid is not None:
        counts = counts * batch.conversation_valid
    counts = jnp.broadcast_to(counts, logits.shape[:2])

    def mean(x: jax.Array) -> jax.Array:
        return (jnp.where(counts > 0, x, 0) * counts).sum() / jnp.maximum(counts.sum(), 1)

    predicted = logits > 0
    overlap = (predicted & target).sum((-2, -1)).astype(jnp.float32)
    union = (predicted | target).sum((-2, -1)).astype(jnp.float32)
    iou = overlap / (union + 1e-6)
    there = target.any((-2, -1)).astype(jnp.float32)
    parts = {
        "ce_loss": weights.ce * ce,
        "mask_bce_loss": weights.bce * mean(bce_loss(logits, target)),
        "mask_dice_loss": weights.dice * mean(dice_loss(logits, target)),
        "iou_loss": weights.iou * mean(jnp.abs(iou - prediction.iou)),
        "occ_loss": weights.occ * mean(optax.sigmoid_binary_cross_entropy(prediction.object_score, there)),
    }
    # the IoU loss counts twice: as a part of mask_loss and on its own
    parts["mask_loss"] = parts["mask_bce_loss"] + parts["mask_dice_loss"] + parts["iou_loss"]
    loss = parts["ce_loss"] + parts["mask_loss"] + parts["iou_loss"] + parts["occ_loss"]
    mean_iou = mean(jnp.where(union > 0, iou, 1.0))
    return loss, {**parts, "mean_iou": mean_iou, "masks": logits.swapaxes(0, 1)}
