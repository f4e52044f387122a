"""Cases of what reaches the network: reading (video files), sizes (resizing), tokens (the tokenizer).

Axes: T frames, H, W size of a frame, S side of the network's square image, L side of the tracker's masks.
"""

import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from virst_jax.config import Compute, Sam2Config
from virst_jax.data import frames, prompts, transforms
from virst_jax.errors import UserError
from virst_jax.inference.tiles import MaskTiles
from virst_jax.inference.tracker_steps import TrackerSteps
from virst_jax.io.video import open_video

from ..targets import ellipse_masks, scaled_ellipse
from ..weights_rule import make_input, make_video
from .case import Case, Check, exact, within

LEVELS = 1  # by which versions of FFmpeg may differ where a decoder's samples become RGB
EDGE = 3e-4  # share of a mask's pixels that lie on one half but for rounding
ON_ZERO = 1e-4  # share of a logit map's pixels that are 0 but for rounding


def run_reading(case: Case) -> None:
    """Files as the release's extraction of frames (PyAV) and as its video reader (decord) show them."""
    with tempfile.TemporaryDirectory() as folder:
        for row in case.meta["videos"]:
            name = row["name"]
            path = Path(folder) / f"{name}{row['suffix']}"
            path.write_bytes(case.outputs[f"{name}.file"].tobytes())
            reader = open_video(path)
            ours, by_decord = np.stack(list(reader)), case.outputs[f"{name}.decord"]
            extracted = case.outputs.get(f"{name}.av", by_decord)  # where the release's two readers differ
            apart = float(np.abs(extracted.astype(np.int16) - by_decord).mean())
            case.checks.append(_levels(name, ours, extracted, apart))
            last = reader.num_frames - 1
            picked = np.stack(list(reader.pick([0, last // 2, last])))
            case.checks.append(exact(f"{name} picked", picked, ours[[0, last // 2, last]], "any frame on its own"))
            wrong = []
            for choice in row["choices"]:
                keys = [key for key in choice if key not in ("fps", "duration", "indices", "num_frames")]
                options = {key: choice[key] for key in keys}
                found = frames.get_frame_indices(choice["num_frames"], len(ours), fps=reader.fps, **options)
                if found != choice["indices"] or abs(reader.fps - choice["fps"]) > 1e-3 * choice["fps"]:
                    wrong.append(f"{choice['sample']}: {found}, {reader.fps:g} frames a second")
            case.checks.append(exact(f"{name} choice", len(wrong), 0, "; ".join(wrong)))


def _levels(output: str, ours: np.ndarray, theirs: np.ndarray, apart: float) -> Check:
    """Equal up to LEVELS of 255. `apart`: by how many decord's frames differ from theirs on average."""
    if ours.shape != theirs.shape:
        return Check(output, False, note=f"shape {list(ours.shape)}, expected {list(theirs.shape)}")
    error = np.abs(ours.astype(np.int16) - theirs)
    note = f"levels of 255; on average {error.mean():.2f}" if error.any() else "every byte is equal"
    if apart:
        note += f" to PyAV's; decord's differ from these by {apart:.1f} levels of 255 on average"
    return Check(output, bool(error.max() <= LEVELS), float(error.max()), note=note)


def run_sizes(case: Case) -> None:
    """Frames and masks of odd sizes: to the network's sizes, and back."""
    meta, out = case.meta, case.outputs
    side, low_res = meta["side"], meta["low_res"]
    steps = TrackerSteps(Sam2Config(image_size=4 * low_res), Compute())
    resize = jax.jit(lambda *args: steps.resize_masks(None, *args))
    for salt, (height, width) in enumerate(meta["sizes"]):
        video, name = make_video(1, height, width, salt=salt), f"{height}x{width}"
        ours: dict[str, Any] = {
            "vlm": transforms.vlm_pixels(video, meta["vlm_side"])[0, ::32, ::32],
            "sam": transforms.sam_pixels(video, side, "bilinear")[0, ::64, ::64],
            "track": transforms.resize_frames(video, side, "bicubic")[0, ::64, ::64] / np.float32(255),
        }
        for key, value in ours.items():
            case.checks.append(within(f"{name} {key}", np.moveaxis(value, -1, 0), out[f"{name}.{key}"], 1e-6))
        ellipse = scaled_ellipse(meta["mask"], height, width)
        mask = ellipse_masks(ellipse, 1, max(height, width))[:, :height, :width]
        small = transforms.masks_to_size(mask, side)[0, ::4, ::4]
        case.checks.append(_share(f"{name} mask", np.packbits(small), out[f"{name}.mask"], small.size, EDGE))
        logits = make_input(f"sizes.{name}", (1, 1, low_res, low_res))
        tiles = MaskTiles((height, width), low_res)
        drawn = tiles.join([[np.asarray(resize(logits, *pair)) for pair in row] for row in tiles.matrices])[0, 0]
        case.checks.append(_share(f"{name} back", np.packbits(drawn), out[f"{name}.back"], drawn.size, ON_ZERO))


def _share(output: str, ours: np.ndarray, theirs: np.ndarray, count: int, most: float) -> Check:
    """Packed masks of which a small share of pixels, or a single one, may differ."""
    if ours.shape != theirs.shape:
        return Check(output, False, note=f"{ours.size} bytes, expected {theirs.size}")
    wrong = int(np.unpackbits(ours ^ theirs).sum())
    return Check(output, wrong <= max(1, most * count), wrong / count, note=f"{wrong} of {count} pixels differ")


def run_tokens(case: Case) -> None:
    """Ids of thousands of texts, by whichever of the recorded tokenizers is at hand.

    Raises:
      UserError: none is.
    """
    if case.tokenizer is None:
        raise UserError(f"{case.name}: needs the Qwen2 tokenizer; give its folder with --tokenizer")
    tokenizer = prompts.load_tokenizer(case.tokenizer)
    size = len(tokenizer)
    known = {count: number for number, count in case.meta["vocabularies"].items()}
    if size not in known:
        raise UserError(
            f"{case.tokenizer}: a tokenizer of {size} tokens; the case was recorded with those of {sorted(known)}"
        )
    ids = case.outputs[f"{known[size]}.ids"].tolist()
    texts, lengths = case.meta["texts"], case.outputs[f"{known[size]}.lengths"].tolist()
    wrong, begin = [], 0
    for text, length in zip(texts, lengths, strict=True):
        found = tokenizer.encode_text(text)
        if found != ids[begin : begin + length]:
            wrong.append(f"{text!r}: {found[:8]}, not {ids[begin : begin + length][:8]}")
        begin += length
    note = f"{len(texts)} texts, {begin} tokens of a vocabulary of {size}"
    if wrong:
        note = f"{len(wrong)} of {len(texts)} texts differ: {'; '.join(wrong[:3])}"
    case.checks.append(exact("ids", len(wrong), 0, note))
