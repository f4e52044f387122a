"""Cases of the training losses: train_loss*, with their gradients, and train_batch*, of several conversations.

Axes: T frames, R side of the tracker's image.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from virst_jax.data.sequence import splice
from virst_jax.data.transforms import sam_pixels
from virst_jax.errors import UserError
from virst_jax.io.npz import read_npz
from virst_jax.models.tree import flatten
from virst_jax.training.losses import TextBatch, VideoBatch, text_loss, video_losses

from ..assemble import take_apart
from ..rules import rule_table
from ..targets import KEPT, ellipse_masks, thinned
from ..weights_rule import make_video
from .case import GRADIENTS, Case, Check, close, within
from .network import network_config, rule_clips, rule_params

GRADIENT = 1e-3  # relative L2 error of a gradient: sums of many terms of both signs
CANCELLED = 1e-6  # of the largest norm: what float32 leaves of a sum that cancels
ELLIPSE = re.compile(r"\(\(y-(\d+)-(\d+)t\)/(\d+)\)\^2\+\(\(x-(\d+)-(\d+)t\)/(\d+)\)\^2")


def ellipse_targets(case: Case, count: int, size: int) -> np.ndarray:
    """The targets, bool[T, R, R]: a drifting ellipse, absent on some frames. Numbers are pairs of y and x."""
    return ellipse_masks(case.meta.get("ellipse") or _ellipse_in_words(case), count, size)


def _ellipse_in_words(case: Case) -> dict[str, Any]:
    match = ELLIPSE.search(case.text)
    y0, dy, height, x0, dx, width = map(int, match.groups()) if match else (400, 20, 180, 300, 60, 240)
    absent = case.number("absent", r"empty at t=(\d+)", 5)
    return {"center": [y0, x0], "velocity": [dy, dx], "radii": [height, width], "absent": [absent]}


def _video(case: Case) -> np.ndarray:
    """uint8[T, H, W, 3]"""
    count = case.number("n_frames", r"make_video\((\d+)", 6)
    height, width = case.meta.get("hw") or (
        case.number("height", r"make_video\(\d+, (\d+)", 96),
        case.number("width", r"make_video\(\d+, \d+, (\d+)", 128),
    )
    return make_video(count, height, width, salt=case.meta.get("video_salt", case.salt))


def run_train_loss(case: Case) -> None:
    meta, out = case.meta, case.outputs
    cfg = network_config(case)
    weights = meta["config"].get("weights")
    if weights:
        cfg = dataclasses.replace(cfg, loss=dataclasses.replace(cfg.loss, **weights))
    params = rule_params(case, cfg)
    video = _video(case)
    name = case.clip_name("train.clip")
    clips = rule_clips(case, name, cfg, meta.get("t_vlm") or case.shape(name, (1, 4))[1], case.salt)
    visual = clips.shape[0] * clips.shape[1] * cfg.vision.tokens_per_frame
    sequence = splice(meta["input_ids"], meta["labels"], visual, cfg.seg_token_id)
    batch = VideoBatch(
        clips=jnp.asarray(clips),
        token_ids=jnp.asarray(sequence.token_ids)[None],
        visual_index=jnp.asarray(sequence.visual_index)[None],
        labels=jnp.asarray(sequence.labels)[None],
        mask=jnp.asarray(sequence.mask)[None],
        seg_positions=jnp.asarray(sequence.seg_positions)[None],
        frames=jnp.asarray(sam_pixels(video, cfg.sam2.image_size, "bilinear")),
        targets=jnp.asarray(ellipse_targets(case, len(video), cfg.sam2.image_size)[meta["frames_used"]])[None],
        anchors=jnp.asarray(meta["cond_frames"]),
        frames_used=jnp.asarray(meta["frames_used"]),
    )

    def loss(params: Any, batch: VideoBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
        return video_losses(cfg, params, batch)

    # compiled for minutes and run once: on CPUs the compiler's optimizer costs more than it saves
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=options)
    (total, parts), gradients = step(params, batch)
    for key, expected in meta["losses"].items():
        ours = total if key == "loss" else parts[key]
        case.checks.append(close(key, ours, expected))
    stride = cfg.sam2.image_size // out["pred_mask"].shape[-1]
    probability = jax.nn.sigmoid(parts["masks"][0, :, ::stride, ::stride])
    case.checks.append(close("pred_mask", probability, out["pred_mask"], 1e-3))
    tensors = {name: read() for name, read in take_apart(rule_table(cfg), flatten(gradients).items())}
    case.checks.append(_gradient_norms(case, tensors))
    beside = case.folder / f"{case.name}{GRADIENTS}" if case.folder else None
    if beside and beside.is_file():
        case.checks += _gradients(beside, tensors)


def run_train_batch(case: Case) -> None:
    """The losses of several conversations about one video or image: with masks, in text alone, of several lengths."""
    meta, cfg = case.meta, network_config(case)
    params = rule_params(case, cfg)
    is_image = meta.get("modality") == "image"
    if is_image:
        side = cfg.vision.image_size
        clips = case.input(meta["clip"]["name"], (1, 1, 3, side, side)).transpose(0, 1, 3, 4, 2)
        visual = min(cfg.vision.tokens_per_image, cfg.vision.grid**2)
    else:
        clips = rule_clips(case, meta["clip"]["name"], cfg, meta["t_vlm"], case.salt)
        visual = clips.shape[0] * clips.shape[1] * cfg.vision.tokens_per_frame
    rows = meta["conversations"]
    length = max(len(row["input_ids"]) for row in rows) - 1 + visual
    spliced = [splice(row["input_ids"], row["labels"], visual, cfg.seg_token_id, length) for row in rows]
    arrays: dict[str, Any] = {
        field: jnp.asarray(np.stack([getattr(row, field) for row in spliced]))
        for field in ("token_ids", "visual_index", "labels", "mask")
    }
    arrays["clips"] = jnp.asarray(clips)
    loss: Any = text_loss
    batch: TextBatch = TextBatch(**arrays)
    if any(row.get("ellipse") for row in rows):
        size, count = cfg.sam2.image_size, meta["n_frames"]
        used = meta["frames_used"]
        most = max(len(row.seg_positions) for row in spliced)
        nowhere = np.full(most, -1, np.int32)
        places = [row.seg_positions if len(row.seg_positions) else nowhere for row in spliced]
        empty = np.zeros((len(used), size, size), bool)
        masks = [ellipse_masks(row["ellipse"], count, size)[used] if row.get("ellipse") else empty for row in rows]
        loss = video_losses
        batch = VideoBatch(
            **arrays,
            seg_positions=jnp.asarray(np.stack(places)),
            frames=jnp.asarray(sam_pixels(_video(case), size, "bilinear")),
            targets=jnp.asarray(np.stack(masks)),
            anchors=jnp.asarray(meta["cond_frames"]),
            frames_used=jnp.asarray(used),
            conversation_valid=jnp.asarray([bool(row.get("ellipse")) for row in rows]),
        )
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    total, parts = jax.jit(lambda params, batch: loss(cfg, params, batch), compiler_options=options)(params, batch)
    for key, expected in meta["losses"].items():
        # a batch in text alone has no other losses; the release gives zeros
        ours = total if key == "loss" else parts.get(key, 0.0)
        case.checks.append(close(key, ours, expected))


def _gradients(path: Path, ours: dict[str, np.ndarray]) -> list[Check]:
    """Every recorded gradient as a tensor, a check for each part of the network.

    Where a sum cancels (a key's bias before a softmax), the true gradient is zero and both are rounding errors of its
    terms: those below CANCELLED of the largest norm are counted and named, and only have to be as small.
    """
    theirs = read_npz(path, "copy it again")
    kept = int(theirs.pop("kept", KEPT))
    largest = max(float(np.linalg.norm(value)) for value in theirs.values())
    parts: dict[str, list[tuple[float, float, float, str]]] = {}
    for name, value in theirs.items():
        if name not in ours:
            raise UserError(f"{path}: the network has no parameter {name}; it belongs to another case")
        difference = thinned(ours[name], kept).astype(np.float64) - value
        norm = float(np.linalg.norm(value))
        relative = float(np.linalg.norm(difference)) / (norm + CANCELLED / GRADIENT * largest)
        part = ".".join(name.split(".")[: 3 if name.startswith("model.seg_model") else 2])
        parts.setdefault(part, []).append((relative, float(np.abs(difference).max()), norm, name))
    checks = []
    for part, rows in parts.items():
        zero = [name for _, _, norm, name in rows if norm <= CANCELLED * largest]
        worst, _, _, name = max(rows)
        note = f"{len(rows)} gradients, worst {name}"
        if zero:
            told = ", ".join(zero[:4]) + (", ..." if len(zero) > 4 else "")
            note += f"; zero but for rounding: {len(zero)} ({told})"
        most = max(row[1] for row in rows)
        checks.append(Check(f"grad {part.split('.')[-1]}", worst <= GRADIENT, most, worst, note=note))
    return checks


def _gradient_norms(case: Case, gradients: dict[str, np.ndarray]) -> Check:
    """Every parameter's gradient norm within 1e-3; parameters without a gradient in the release are passed over."""
    norms = {name: float(np.linalg.norm(value.astype(np.float64))) for name, value in gradients.items()}
    names = [name for name, value in case.meta["grad_norms"].items() if value is not None]
    theirs, ours = case.outputs["grad_norms"], np.array([norms[name] for name in names])
    # a sum that cancels (a key's bias before a softmax) leaves float32 rounding of its terms: 1e-6 of the largest norm
    error = np.abs(ours - theirs) / (theirs + 1e-3 * theirs.max())
    worst = int(error.argmax())
    check = within("grad_norms", error, np.zeros_like(error), 1e-3, f"{len(names)} parameters, worst {names[worst]}")
    return dataclasses.replace(check, max_abs=float(np.abs(ours - theirs).max()), relative=float(error.max()))
