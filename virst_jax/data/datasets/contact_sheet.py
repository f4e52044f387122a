"""Contact sheets: a few samples of a source with their expressions and masks, on one image."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from virst_jax.data.samples import Question, Video
from virst_jax.io import visualize

_FONT_SIZE = 13
_NARROWEST = 480  # pixels, so that texts can be read beside a single frame


@dataclass(frozen=True)
class ContactSheetConfig:
    """What is shown of a sample."""

    frames: int = 4  # evenly spaced
    expressions: int = 3  # those with the first positions, with a row of frames each
    height: int = 120  # of a frame, in pixels


def contact_sheet(samples: Sequence[Video | Question], config: ContactSheetConfig | None = None) -> np.ndarray:
    """Samples one below the other: a headline, then per expression its text and the frames with its mask.

    Returns:
      uint8[h, w, 3].

    Raises:
      UserError: a frame or mask cannot be read.
    """
    return visualize.stack([part for sample in samples for part in _parts(sample, config or ContactSheetConfig())])


def _parts(sample: Video | Question, config: ContactSheetConfig) -> list[np.ndarray]:
    count = min(config.frames, sample.num_frames)
    shown = np.linspace(0, sample.num_frames - 1, count).round().astype(int).tolist()
    frames = sample.read_frames(shown)
    height, width = frames.shape[1:3]
    cell = max(1, round(width * config.height / height))
    room = max(_NARROWEST, count * cell)

    def row(images: Sequence[np.ndarray]) -> np.ndarray:
        labels = [f"frame {index}" for index in shown]
        return visualize.contact_sheet(images, labels, columns=count, cell=cell)

    what = "image" if sample.is_image else f"{sample.num_frames} frames"
    parts = [visualize.heading(f"{sample.name}   {width} x {height}, {what}", room, _FONT_SIZE + 2)]
    if isinstance(sample, Question):
        parts.append(row(list(frames)))
        for turn in sample.turns[: config.expressions]:
            texts = zip("QA", turn, strict=True)
            parts += [visualize.heading(f"{who}: {text}", room, _FONT_SIZE) for who, text in texts]
        return parts
    if sample.read_masks is None:
        parts.append(row(list(frames)))
    for position, expression in enumerate(sample.expressions[: config.expressions]):
        note = f" [{expression.category}]" if expression.category else ""
        text = f"{expression.id}: {' '.join(expression.text.split())}{note}"
        parts.append(visualize.legend([text], room, _FONT_SIZE, first=position))
        if sample.read_masks is not None:
            masks = sample.read_masks(position, shown)
            color = visualize.color(position)
            parts.append(row([visualize.overlay(f, [m], colors=[color]) for f, m in zip(frames, masks, strict=True)]))
    more = len(sample.expressions) - config.expressions
    if more > 0:
        parts.append(visualize.heading(f"and {more} more", room, _FONT_SIZE))
    return parts
