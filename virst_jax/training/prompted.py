"""Trains the tracker from simulated prompts, as SAM 2 is trained: a first prompt, tracking, clicks that correct.

First the frames with a prompt of their own are segmented without memory: from a mask, a point or a noisy box. Then the
video is tracked from its first frame to its last. Frames that are corrected get clicks where the mask is wrong, one
after another, each with the mask so far; what comes behind them attends to them as to those of the first prompts.

What differs from SAM 2: the losses of all predictions are averaged, not added up; and masks learn also while the
predicted object score says that nothing is there.

Axes: O objects, T frames, A frames with a first prompt, C frames that are corrected after tracking, K clicks of a
correction, N slots of prompt tokens, M masks, R side of the tracker's image, L mask side.
Source: training/model/sam2.py, training/loss_fns.py and sam2.1_training of facebookresearch/sam2.
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from virst_jax.config import FRAME_BY_FRAME, PromptLossConfig, VirstConfig
from virst_jax.data.prompted import BOX, MASK
from virst_jax.models.sam2.mask_decoder import Masks
from virst_jax.models.sam2.prompt_encoder import BOX_CORNERS, PADDING
from virst_jax.models.sam2.prompted import NO_FRAME, ObjectAnchors, ObjectBank, PromptedTracker
from virst_jax.models.sam2.sam2 import Features, Prediction, Sam2
from virst_jax.models.sam2.tracker import PROMPT_LOGIT_LIMIT, Tracked
from virst_jax.ops.splash import KEPT
from virst_jax.training.clicks import next_click, noisy_box
from virst_jax.training.losses import Losses, encode_frames
from virst_jax.types import Params

FIRST_SLOTS = 2  # of a box's corners, or of a point and none


@flax.struct.dataclass
class PromptedBatch:
    """Frames of one video with the true masks of objects, and how these are prompted."""

    frames: jax.Array  # float (normalised) or uint8 [T, R, R, 3]
    targets: jax.Array  # bool[O, T, R, R]
    object_valid: jax.Array  # bool[O]; False: filler
    first: jax.Array  # int32[A], frames with a first prompt; the first of them is 0
    first_valid: jax.Array  # bool[A]
    kinds: jax.Array  # int32[A], of the first prompts: data.prompted.MASK, POINT or BOX
    corrected: jax.Array  # int32[C], other frames that are corrected
    corrected_valid: jax.Array  # bool[C]
    from_truth: jax.Array  # bool[A + C, 1 + K], clicks that lie on the object, whatever the mask looks like
    seed: jax.Array  # int32[], of clicks and boxes
    central: jax.Array | None = None  # bool[A + C, 1 + K], see clicks.next_click; None: none is


@flax.struct.dataclass
class Steps:
    """What is learned from a frame's predictions, leading axes 1 + K and O."""

    weights: jax.Array  # float32, 0 or 1
    losses: dict[str, jax.Array]  # float32


def prompted_loss(
    cfg: VirstConfig, params: Params, batch: PromptedBatch, dropout_rng: jax.Array | None = None
) -> Losses:
    """The loss of one video.

    Args:
      cfg: `sam2`, `compute` and `prompt_loss` alone are read.
      params: "sam2" alone is read.
      dropout_rng: None: without dropout.

    Returns:
      The weighted sum float32[], and its parts, means over all predictions float32[]: focal_loss, dice_loss (of the
      best mask of an ambiguous prompt), iou_loss, score_loss (all weighted), and mean_iou of the chosen masks;
      first_iou after first prompts, corrected_iou after the last correction, tracked_iou without a prompt.
    """
    return _PromptedVideo(cfg, params, batch, dropout_rng).loss()


class _PromptedVideo:
    """One video while its loss is computed."""

    def __init__(self, cfg: VirstConfig, params: Params, batch: PromptedBatch, dropout_rng: jax.Array | None):
        self.cfg, self.params, self.batch = cfg, params["sam2"], batch
        self.sam = Sam2(cfg.sam2, cfg.compute)
        self.dtype = jnp.dtype(cfg.compute.dtype)
        self.tracker = PromptedTracker(self.sam, cfg.compute.dtype, dropout_rng)
        self.features = encode_frames(self.sam, params, batch.frames)
        self.ambiguity = cfg.sam2.evaluated_mask == "multimask"  # otherwise the first mask is the only one
        self.key = jax.random.key(batch.seed)
        # the masks of all predictions of large frames are gigabytes
        recompute = cfg.sam2.image_size >= FRAME_BY_FRAME
        again = functools.partial(jax.checkpoint, prevent_cse=False, policy=KEPT)
        self.checkpoint = again if recompute else lambda step: step

    def loss(self) -> Losses:
        anchors, first = self.prompt()
        kinds = [(first, "first_iou", 0), (first, "corrected_iou", -1)]
        steps = [first]
        if self.batch.frames.shape[0] > 1:
            tracked = self.track(anchors)
            kinds.append((tracked, "tracked_iou", 0))
            steps.append(tracked)
        means = {}
        for name in steps[0].losses:
            means[name] = _mean([(step.losses[name], step.weights) for step in steps])
        for step, name, place in kinds:
            means[name] = _mean([(step.losses["mean_iou"][:, place], step.weights[:, place])])
        total = sum(means[name] for name in ("focal_loss", "dice_loss", "iou_loss", "score_loss"))
        return jnp.asarray(total), means

    def apply(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        return self.sam.apply({"params": self.params}, *args, method=method, **kwargs)

    # frames

    def prompt(self) -> tuple[ObjectAnchors, Steps]:
        """The anchors of the first prompts, with empty slots for those of corrections, and Steps of A frames."""
        batch = self.batch

        def segment(carry: None, slot: Any) -> tuple[None, tuple[Tracked, Steps]]:
            frame, target, kind, valid, from_truth, central, key = slot
            image = self.apply(Sam2.without_memory, frame, target.shape[0])
            coords, labels = self.first_prompt(key, target, kind, None if central is None else central[0])
            is_mask = kind == MASK
            weight = (valid & ~is_mask) * batch.object_valid
            found, steps = self.refine(
                image, frame, target, coords, labels, jnp.array(True), from_truth, central, key, weight
            )
            given = self.apply(Sam2.use_mask, frame, target.astype(jnp.float32))
            found = jax.tree.map(lambda a, b: jnp.where(is_mask, a.astype(b.dtype), b), given, found)
            return carry, (self.tracker.encode_memory(self.params, frame, found, binary=False), steps)

        count = batch.first.shape[0]
        slots = (
            jax.tree.map(lambda x: x[batch.first], self.features),
            batch.targets.swapaxes(0, 1)[batch.first],
            batch.kinds,
            batch.first_valid,
            batch.from_truth[:count],
            None if batch.central is None else batch.central[:count],
            jax.random.split(jax.random.fold_in(self.key, 0), count),
        )
        _, (outcomes, steps) = jax.lax.scan(self.checkpoint(segment), None, slots)
        objects, room = batch.targets.shape[0], batch.corrected.shape[0]

        def padded(x: jax.Array) -> jax.Array:  # [A, O, ...] -> [O, A + C, ...]
            return jnp.pad(x.swapaxes(0, 1), ((0, 0), (0, room), *[(0, 0)] * (x.ndim - 2)))

        frames = jnp.where(batch.first_valid, batch.first, NO_FRAME)
        frames = jnp.pad(frames, (0, room), constant_values=NO_FRAME)
        return ObjectAnchors(
            jnp.broadcast_to(frames, (objects, *frames.shape)).astype(jnp.int32),
            jnp.broadcast_to(frames != NO_FRAME, (objects, *frames.shape)),
            padded(outcomes.memory),
            padded(outcomes.prediction.pointer),
        ), steps

    def track(self, anchors: ObjectAnchors) -> Steps:
        """Steps of all frames; those with a first prompt have no weight."""
        batch, firsts = self.batch, self.batch.first.shape[0]
        count, objects = batch.frames.shape[0], batch.targets.shape[0]
        bank = ObjectBank.empty(self.sam.cfg, objects, self.tracker.memory_dtype, self.dtype)

        def step(carry: tuple[ObjectAnchors, ObjectBank], slot: Any) -> tuple[tuple[ObjectAnchors, ObjectBank], Steps]:
            anchors, bank = carry
            frame, target, number, key = slot
            here = anchors.valid & (anchors.frames == number)
            prompted, place = here[0].any(), here[0].argmax()  # the same for all objects
            now = batch.corrected_valid & (batch.corrected == number)
            index = firsts + now.argmax() if now.shape[0] else jnp.array(0)
            corrects = now.any() & ~prompted
            image = self.tracker.condition(
                self.params, frame, anchors, bank, number, jnp.array(1), jnp.array(count, jnp.int32)
            )
            nothing = self.no_prompt(objects)
            central = None if batch.central is None else batch.central[index]
            weight = ~prompted * batch.object_valid
            found, steps = self.refine(
                image, frame, target, *nothing, corrects, batch.from_truth[index], central, key, weight
            )
            out = self.tracker.encode_memory(self.params, frame, found, binary=False)
            memory = jnp.where(prompted, anchors.memory[:, place], out.memory)
            pointer = jnp.where(prompted, anchors.pointers[:, place], out.prediction.pointer)
            if now.shape[0]:
                added = ObjectAnchors(
                    anchors.frames.at[:, index].set(number),
                    anchors.valid.at[:, index].set(True),
                    anchors.memory.at[:, index].set(memory),
                    anchors.pointers.at[:, index].set(pointer),
                )
                anchors = jax.tree.map(lambda new, old: jnp.where(corrects, new, old), added, anchors)
            return (anchors, bank.after(number, memory, pointer)), steps

        slots = (
            self.features,
            batch.targets.swapaxes(0, 1),
            jnp.arange(count, dtype=jnp.int32),
            jax.random.split(jax.random.fold_in(self.key, 1), count),
        )
        _, steps = jax.lax.scan(self.checkpoint(step), (anchors, bank), slots)
        return steps

    # prompts

    def no_prompt(self, objects: int) -> tuple[jax.Array, jax.Array]:
        """Slots of clicks and their labels, all empty."""
        slots = FIRST_SLOTS + self.batch.from_truth.shape[1] - 1
        return jnp.zeros((objects, slots, 2)), jnp.full((objects, slots), PADDING, jnp.int32)

    def first_prompt(
        self, key: jax.Array, target: jax.Array, kind: jax.Array, central: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """A point or a box, in the first slots: target bool[O, R, R] -> float32[O, N, 2], int32[O, N].

        Around nothing there is no box: an empty target has a negative point whatever the kind.
        """
        coords, labels = self.no_prompt(target.shape[0])
        point, label = next_click(jax.random.fold_in(key, 0), jnp.zeros_like(target), target, central)
        points = coords.at[:, 0].set(point), labels.at[:, 0].set(label)
        corners = noisy_box(jax.random.fold_in(key, 0), target)
        box = coords.at[:, :2].set(corners), labels.at[:, :2].set(jnp.asarray(BOX_CORNERS))
        boxed = (kind == BOX) & target.any((-2, -1))
        return jax.tree.map(lambda a, b: jnp.where(boxed.reshape(-1, *[1] * (a.ndim - 1)), a, b), box, points)

    def refine(
        self,
        image: jax.Array,
        frame: Features,
        target: jax.Array,
        coords: jax.Array,
        labels: jax.Array,
        corrects: jax.Array,
        from_truth: jax.Array,
        central: jax.Array | None,
        key: jax.Array,
        weight: jax.Array,
    ) -> tuple[Prediction, Steps]:
        """Segments a frame, and again after each of K clicks if it is corrected.

        Args:
          image: dtype[O, H, W, C], its features with memory or without.
          target: bool[O, R, R].
          coords, labels: of the first prompt; see no_prompt.
          corrects: bool[].
          from_truth, central: bool[1 + K].
          weight: bool[O], of the predictions.

        Returns:
          The last prediction, and Steps.
        """
        empty = self.tracker.tracker.empty(target.shape[0]).prediction
        clicks = from_truth.shape[0] - 1

        def step(carry: tuple[jax.Array, jax.Array, Prediction, jax.Array], number: jax.Array) -> Any:
            coords, labels, last, mask = carry
            again = number > 0
            where = None if central is None else central[number]
            point, label = next_click(jax.random.fold_in(key, number), mask & ~from_truth[number], target, where)
            slot = FIRST_SLOTS - 1 + number  # of the first step: nothing is written
            coords = jnp.where(again, coords.at[:, slot].set(point), coords)
            labels = jnp.where(again, labels.at[:, slot].set(label), labels)
            there = labels != PADDING
            count = there.sum(1)
            # without any, the first slot says so
            there = there.at[:, 0].max(count == 0)
            masks = self.apply(
                Sam2.decode,
                image,
                frame,
                self.apply(Sam2.embed_points, coords, labels),
                jnp.clip(last.low_res, -PROMPT_LOGIT_LIMIT, PROMPT_LOGIT_LIMIT),
                again,
                jnp.pad(there, ((0, 0), (0, 1)), constant_values=True),
            )
            ambiguous = count <= 1 if self.ambiguity else None
            found = self.apply(Sam2.choose, masks, mode="single", ambiguous=ambiguous, clear="single")
            counts = weight & (corrects | ~again)
            mask, losses = mask_losses(self.cfg.prompt_loss, self.sam, masks, target, ambiguous)
            found = jax.tree.map(lambda new, old: jnp.where(corrects | ~again, new, old), found, last)
            return (coords, labels, found, mask), Steps(counts.astype(jnp.float32), losses)

        start = (coords, labels, empty, jnp.zeros(target.shape, bool))
        (_, _, found, _), steps = jax.lax.scan(self.checkpoint(step), start, jnp.arange(1 + clicks))
        return found, steps


# Losses


def mask_losses(
    scale: PromptLossConfig, sam: Sam2, masks: Masks, target: jax.Array, ambiguous: jax.Array | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The losses of every object.

    Args:
      masks: as decoded.
      target: bool[O, R, R].
      ambiguous: bool[O]: the best of the three masks learns, otherwise the first; None: the first.

    Returns:
      The masks that `Sam2.choose` takes, bool[O, R, R]; losses float32[O], weighted, and their "mean_iou".
    """
    logits, ious, score = masks.logits, masks.ious, masks.object_score[:, 0]
    if ambiguous is None:
        logits, ious = logits[:, :1], ious[:, :1]
        allowed = jnp.ones(ious.shape, bool)
    else:
        allowed = (jnp.arange(ious.shape[1]) > 0) == ambiguous[:, None]
    logits = sam.high_res(logits)  # [O, M, R, R]
    truth = jnp.broadcast_to(target[:, None], logits.shape)
    focal = scale.focal * focal_loss(logits, truth, scale.focal_alpha, scale.focal_gamma)
    dice, iou = scale.dice * soft_dice_loss(logits, truth), overlap(logits, truth)

    def take(x: jax.Array, index: jax.Array) -> jax.Array:
        index = index.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.take_along_axis(x, index, 1)[:, 0]

    best = jnp.where(allowed, focal + dice, jnp.inf).argmin(1)
    chosen = jnp.where(allowed, ious, -jnp.inf).argmax(1)
    there, present = score > 0, target.any((-2, -1))
    iou_loss = (jnp.abs(iou - ious) * allowed).sum(1) / allowed.sum(1)
    return (take(logits, chosen) > 0) & there[:, None, None], {
        "focal_loss": take(focal, best) * present,
        "dice_loss": take(dice, best) * present,
        "iou_loss": scale.iou * iou_loss * present,
        "score_loss": scale.score * optax.sigmoid_binary_cross_entropy(score, present.astype(jnp.float32)),
        "mean_iou": jnp.where(present | there, take(iou, chosen) * there, 1.0),
    }


def focal_loss(logits: jax.Array, target: jax.Array, alpha: float = 0.25, gamma: float = 2.0) -> jax.Array:
    """Mean focal loss of masks float[..., H, W] against bool targets: float32[...]; see PromptLossConfig."""
    logits, truth = logits.astype(jnp.float32), target.astype(jnp.float32)
    if gamma == 0:  # a power of zero has no gradient where the mask is right
        loss = optax.sigmoid_binary_cross_entropy(logits, truth)
        loss = loss * (alpha * truth + (1 - alpha) * (1 - truth)) if alpha >= 0 else loss
    else:
        loss = optax.sigmoid_focal_loss(logits, truth, alpha=alpha if alpha >= 0 else None, gamma=gamma)
    return loss.mean((-2, -1))


def soft_dice_loss(logits: jax.Array, target: jax.Array) -> jax.Array:
    """SAM 2's dice loss of masks float[..., H, W] against bool targets: float32[...]."""
    probability, truth = jax.nn.sigmoid(logits.astype(jnp.float32)), target.astype(jnp.float32)
    total = (probability + truth).sum((-2, -1))
    apart = jnp.abs(probability - truth).sum((-2, -1))
    return 1 - (total - apart + 1) / (total + 1)


def overlap(logits: jax.Array, target: jax.Array) -> jax.Array:
    """IoU of masks float[..., H, W] and bool targets: float32[...]; 0 where both are empty."""
    pred = logits > 0
    union = (pred | target).sum((-2, -1)).astype(jnp.float32)
    return (pred & target).sum((-2, -1)) / jnp.maximum(union, 1)


def _mean(given: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """The mean of values with weights."""
    total = sum(jnp.sum(values * weights) for values, weights in given)
    return total / jnp.maximum(sum(jnp.sum(weights) for _, weights in given), 1)
