"""Contact sheets: a few samples of a source with their expressions and masks, on one picture."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from virst_jax.data.samples import Question, Video

COLORS = ((230, 60, 60), (60, 140, 240), (70, 190, 90), (245, 170, 40), (170, 90, 220), (60, 200, 200))
_OPACITY = 0.5
_MARGIN, _LINE, _TEXT = 8, 18, 13  # pixels
_BACKGROUND, _INK, _PALE = (250, 250, 250), (20, 20, 20), (110, 110, 110)


@dataclass(frozen=True)
class SheetConfig:
    """What is shown of a sample."""

    frames: int = 4  # evenly spaced
    expressions: int = 3  # rows; those with the first positions
    height: int = 120  # of a picture, in pixels


def contact_sheet(samples: Sequence[Video | Question], config: SheetConfig | None = None) -> Image.Image:
    """Samples one below the other: a headline, then per expression its text and the frames with its mask.

    Raises:
      UserError: a frame or mask cannot be read.
    """
    rows = [row for sample in samples for row in _rows(sample, config or SheetConfig())]
    width = 2 * _MARGIN + max((row.width for row in rows), default=0)
    sheet = Image.new("RGB", (width, 2 * _MARGIN + sum(row.height for row in rows)), _BACKGROUND)
    top = _MARGIN
    for row in rows:
        sheet.paste(row, (_MARGIN, top))
        top += row.height
    return sheet


def overlay(frame: np.ndarray, mask: np.ndarray, color: Sequence[int]) -> np.ndarray:
    """A frame with a mask laid over it and its edge drawn.

    Args:
      frame: uint8[H, W, 3].
      mask: bool[H, W].
      color: RGB, 0 to 255.

    Returns:
      uint8[H, W, 3].
    """
    out = frame.astype(np.float32)
    out[mask] = (1 - _OPACITY) * out[mask] + _OPACITY * np.asarray(color, np.float32)
    inner = mask.copy()
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    out[mask & ~inner] = color
    return out.astype(np.uint8)


def _rows(sample: Video | Question, config: SheetConfig) -> list[Image.Image]:
    count = min(config.frames, sample.num_frames)
    shown = np.linspace(0, sample.num_frames - 1, count).round().astype(int).tolist()
    frames = sample.read_frames(shown)
    height, width = frames.shape[1:3]
    what = "image" if sample.is_image else f"{sample.num_frames} frames"
    rows = [_text(f"{sample.name}   {width} x {height}, {what}", _INK)]
    if isinstance(sample, Question):
        turns = sample.turns[: config.expressions]
        texts = [_text(f"  {who}: {text}", _PALE) for turn in turns for who, text in zip("QA", turn, strict=True)]
        return [*rows, _strip(frames, config.height), *texts]
    if sample.read_masks is None:
        rows.append(_strip(frames, config.height))
    for position, expression in enumerate(sample.expressions[: config.expressions]):
        color = COLORS[position % len(COLORS)]
        note = f" [{expression.category}]" if expression.category else ""
        rows.append(_text(f"  {expression.id}: {expression.text}{note}", color))
        if sample.read_masks is not None:
            masks = sample.read_masks(position, shown)
            pictures = np.stack([overlay(frame, mask, color) for frame, mask in zip(frames, masks, strict=True)])
            rows.append(_strip(pictures, config.height))
    more = len(sample.expressions) - config.expressions
    if more > 0:
        rows.append(_text(f"  and {more} more", _PALE))
    return rows


def _strip(frames: np.ndarray, height: int) -> Image.Image:
    width = max(1, round(frames.shape[2] * height / frames.shape[1]))
    strip = Image.new("RGB", (len(frames) * (width + 4), height + 6), _BACKGROUND)
    for i, frame in enumerate(frames):
        strip.paste(Image.fromarray(frame).resize((width, height)), (i * (width + 4), 0))
    return strip


def _text(text: str, color: Sequence[int]) -> Image.Image:
    font = ImageFont.load_default(_TEXT)
    text = " ".join(text.split("\n"))[:160]
    width = int(font.getlength(text)) + 2
    image = Image.new("RGB", (width, _LINE), _BACKGROUND)
    ImageDraw.Draw(image).text((0, 0), text, fill=tuple(color), font=font)
    return image
