"""Images of masks: frames with coloured objects, a legend, contact sheets.

Axes: N expressions, H height, W width, 3 RGB.
"""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from virst_jax.io.fonts import Font, font_for, shown

Color = tuple[int, int, int]

OPACITY = 0.5
_STRIPE, _DASH = 6, 4  # pixels
BACKGROUND, TEXT = (24, 24, 24), (235, 235, 235)
# far apart, also for most colour-blind people (Okabe and Ito's set, brightest first)
_FIRST = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))


def color(number: int) -> Color:
    """The colour of an expression by its number, counted from 0; always the same."""
    if number < len(_FIRST):
        return _FIRST[number]
    hue = (number * 0.618034) % 1.0  # golden angle: neighbours differ
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.75 if number % 2 else 0.5, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def overlay(
    frame: np.ndarray,
    masks: np.ndarray | Sequence[np.ndarray],
    opacity: float = OPACITY,
    *,
    colors: Sequence[Color] | None = None,
    outlined: bool = True,
) -> np.ndarray:
    """A frame with every mask filled in its colour and outlined.

    Where masks overlap their colours take turns in stripes, so that each is seen as the legend shows it.

    Args:
      frame: uint8[H, W, 3].
      masks: bool[N, H, W].
      opacity: of the filling, 0 to 1.
      colors: of the masks; those of expressions by their numbers if None.
      outlined: draw the masks' edges.

    Returns:
      uint8[H, W, 3].
    """
    out = frame.copy()
    chosen = colors if colors is not None else [color(number) for number in range(len(masks))]
    boxes = [_box(mask) for mask in masks]
    edges: list[np.ndarray] = []
    for mask, box in zip(masks, boxes):
        edge = np.zeros_like(mask)
        edge[box] = _outline(mask[box], box, mask.shape)
        edges.append(edge)
    levels = np.arange(256)
    for rgb, mine, box in zip(chosen, _take_turns(masks, _STRIPE), boxes):
        for channel, value in enumerate(rgb):
            table = ((1 - opacity) * levels + opacity * value).round().astype(np.uint8)
            part = out[(*box, channel)]
            np.copyto(part, table[part], where=mine[box])
    if outlined:
        for rgb, mine, box in zip(chosen, _take_turns(edges, _DASH), boxes):
            out[box][mine[box]] = rgb
    return out


def _take_turns(masks: Sequence[np.ndarray] | np.ndarray, width: int) -> list[np.ndarray]:
    """Masks without overlap: where several lie, diagonal stripes of `width` pixels belong to one after the other."""
    if not len(masks):
        return []
    count = np.sum(masks, axis=0, dtype=np.int32)
    if count.max(initial=0) < 2:
        return list(masks)
    diagonal = np.add.outer(np.arange(count.shape[0]), np.arange(count.shape[1]))
    turn = diagonal // width % np.maximum(count, 1)
    before = np.zeros_like(count)
    mine = []
    for mask in masks:
        mine.append(mask & (before == turn))
        before += mask
    return mine


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


def legend(expressions: Sequence[str], width: int, font_size: int | None = None, first: int = 0) -> np.ndarray:
    """A strip that names the expressions in their colours, uint8[h, width, 3]; long ones are cut to fit.

    Args:
      first: the number of the first expression.
    """
    size = font_size or max(10, min(22, width // 24))
    font, lacking = font_for(expressions, size)
    line, gap = round(1.5 * size), size // 2
    strip = Image.new("RGB", (width, line * len(expressions) + gap), BACKGROUND)
    draw = ImageDraw.Draw(strip)
    for number, text in enumerate(expressions):
        top = gap // 2 + number * line
        draw.rectangle((gap, top + gap // 2, gap + size, top + gap // 2 + size), fill=color(first + number))
        draw.text(
            (2 * gap + size, top + gap // 2), _fit(shown(text, lacking), font, width - 3 * gap - size), TEXT, font
        )
    return np.asarray(strip)


def _fit(text: str, font: Font, room: int) -> str:
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
    (font, lacking), gap = font_for(labels, font_size), max(2, cell // 60)
    line = round(1.4 * font_size)
    rows = -(-len(frames) // columns)
    sheet = Image.new("RGB", (columns * (cell + gap) + gap, rows * (tall + line + gap) + gap), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for i, (frame, label) in enumerate(zip(frames, labels)):
        x, y = gap + i % columns * (cell + gap), gap + i // columns * (tall + line + gap)
        sheet.paste(Image.fromarray(frame).resize((cell, tall), Image.Resampling.LANCZOS), (x, y))
        draw.text((x, y + tall), _fit(shown(label, lacking), font, cell), TEXT, font)
    parts = [np.asarray(sheet)]
    if expressions:
        parts.append(legend(expressions, sheet.width, font_size))
    return stack(parts)


def stack(images: Sequence[np.ndarray]) -> np.ndarray:
    """Images one below the other, uint8[h, w, 3]; narrow ones are filled up with background on the right."""
    width = max(image.shape[1] for image in images)
    out = np.full((sum(image.shape[0] for image in images), width, 3), BACKGROUND, np.uint8)
    top = 0
    for image in images:
        out[top : top + image.shape[0], : image.shape[1]] = image
        top += image.shape[0]
    return out


def heading(text: str, width: int, font_size: int = 13) -> np.ndarray:
    """A line of text, uint8[h, width, 3], cut to fit."""
    strip = Image.new("RGB", (width, round(1.6 * font_size)), BACKGROUND)
    one_line = " ".join(text.split())
    font, lacking = font_for([one_line], font_size)
    fitting = _fit(shown(one_line, lacking), font, width - font_size)
    ImageDraw.Draw(strip).text((font_size // 2, font_size // 4), fitting, TEXT, font)
    return np.asarray(strip)
