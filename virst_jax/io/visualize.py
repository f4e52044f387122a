"""Pictures of masks: frames with coloured objects, a legend, contact sheets.

Axes: N expressions, H height, W width, 3 RGB.
"""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

OPACITY = 0.5
BACKGROUND, TEXT = (24, 24, 24), (235, 235, 235)
# far apart, also for most colour-blind people (Okabe and Ito's set, brightest first)
_FIRST = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))


def color(number: int) -> tuple[int, int, int]:
    """The colour of an expression by its number, counted from 0; always the same."""
    if number < len(_FIRST):
        return _FIRST[number]
    hue = (number * 0.618034) % 1.0  # golden angle: neighbours differ
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.75 if number % 2 else 0.5, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def overlay(frame: np.ndarray, masks: np.ndarray, opacity: float = OPACITY) -> np.ndarray:
    """A frame with every mask filled in its expression's colour and outlined.

    Args:
      frame: uint8[H, W, 3].
      masks: bool[N, H, W].
      opacity: of the filling, 0 to 1.

    Returns:
      uint8[H, W, 3].
    """
    out = frame.copy()
    boxes = [_box(mask) for mask in masks]
    levels = np.arange(256)
    for number, (mask, box) in enumerate(zip(masks, boxes)):
        for channel, value in enumerate(color(number)):
            table = ((1 - opacity) * levels + opacity * value).round().astype(np.uint8)
            part = out[(*box, channel)]
            np.copyto(part, table[part], where=mask[box])
    for number, (mask, box) in enumerate(zip(masks, boxes)):
        out[box][_outline(mask[box], box, mask.shape)] = color(number)
    return out


def _box(mask: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns that hold the mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return slice(0, 0), slice(0, 0)
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _outline(mask: np.ndarray, box: tuple[slice, slice], size: tuple[int, ...]) -> np.ndarray:
    """Pixels of a mask, cut to its box, with a neighbour outside of it; beyond the frame's edge lies nothing."""
    rows, columns = box
    padded = np.zeros((mask.shape[0] + 2, mask.shape[1] + 2), bool)
    padded[1:-1, 1:-1] = mask
    # at the frame's edge the mask goes on
    padded[0] |= padded[1] & (rows.start == 0)
    padded[-1] |= padded[-2] & (rows.stop == size[0])
    padded[:, 0] |= padded[:, 1] & (columns.start == 0)
    padded[:, -1] |= padded[:, -2] & (columns.stop == size[1])
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inside


def legend(expressions: Sequence[str], width: int, font_size: int | None = None) -> np.ndarray:
    """A strip that names the expressions in their colours, uint8[h, width, 3]; long ones are cut to fit."""
    size = font_size or max(10, min(22, width // 24))
    font = ImageFont.load_default(size)
    line, gap = round(1.5 * size), size // 2
    strip = Image.new("RGB", (width, line * len(expressions) + gap), BACKGROUND)
    draw = ImageDraw.Draw(strip)
    for number, text in enumerate(expressions):
        top = gap // 2 + number * line
        draw.rectangle((gap, top + gap // 2, gap + size, top + gap // 2 + size), fill=color(number))
        draw.text((2 * gap + size, top + gap // 2), _fit(text, font, width - 3 * gap - size), TEXT, font)
    return np.asarray(strip)


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, room: int) -> str:
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "...") > room:
        text = text[:-1]
    return text + "..."


def contact_sheet(
    frames: Sequence[np.ndarray],
    labels: Sequence[str],
    expressions: Sequence[str] = (),
    columns: int = 4,
    cell: int = 320,
) -> np.ndarray:
    """Frames in rows with a label each, and a legend below.

    Args:
      frames: uint8[H, W, 3] of one size.
      labels: of the frames.
      expressions: for the legend.
      cell: width of a frame on the sheet, pixels; smaller frames keep their size.

    Returns:
      uint8[h, w, 3].
    """
    height, width = frames[0].shape[:2]
    cell = min(cell, width) if width >= 96 else 96
    columns = min(columns, len(frames))
    tall = max(1, round(height * cell / width))
    font_size = max(10, cell // 20)
    font, gap = ImageFont.load_default(font_size), max(2, cell // 60)
    line = round(1.4 * font_size)
    rows = -(-len(frames) // columns)
    sheet = Image.new("RGB", (columns * (cell + gap) + gap, rows * (tall + line + gap) + gap), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for i, (frame, label) in enumerate(zip(frames, labels)):
        x, y = gap + i % columns * (cell + gap), gap + i // columns * (tall + line + gap)
        sheet.paste(Image.fromarray(frame).resize((cell, tall), Image.Resampling.LANCZOS), (x, y))
        draw.text((x, y + tall), _fit(label, font, cell), TEXT, font)
    parts = [np.asarray(sheet)]
    if expressions:
        parts.append(legend(expressions, sheet.width, font_size))
    return np.concatenate(parts)
