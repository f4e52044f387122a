"""J&F by category on videos that training has not seen.

Axes: N expressions, T frames, H height, W width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from virst_jax.data.samples import Source, Video
from virst_jax.errors import UserError
from virst_jax.evaluation.metrics import boundary_f, region_similarity

# a video and texts -> masks bool[N, T, H, W]
Segment = Callable[[Video, Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class Score:
    """How well one expression was segmented."""

    video: str
    expression: str
    category: str
    j: float
    f: float
    no_target: bool  # the expression means nothing in this video ...
    empty: bool  # ... and nothing was segmented

    @property
    def j_and_f(self) -> float:
        return (self.j + self.f) / 2


def score_videos(segment: Segment, source: Source, *, exchange: bool = False) -> Iterator[tuple[Score, ...]]:
    """Segments every video of a source and scores its expressions.

    Args:
      exchange: give every expression the words of another one of its video that means something else (those without
        such another are left out): what a network scores that does not read.

    Yields:
      The scores of a video.
    """
    for index in range(len(source)):
        video = source[index]
        if not isinstance(video, Video) or video.read_masks is None:
            raise UserError(f"{video.name}: held-out data must be videos with masks")
        frames = range(video.num_frames)
        truth = np.stack([video.read_masks(i, frames) for i in range(len(video.expressions))])
        texts = {i: expression.text for i, expression in enumerate(video.expressions)}
        if exchange:
            texts = _exchange(texts, truth)
        if not texts:
            continue
        masks = segment(video, list(texts.values()))
        scores = []
        for i, mask in zip(texts, masks):
            j = float(np.mean([region_similarity(m, t) for m, t in zip(mask, truth[i])]))
            f = float(np.mean([boundary_f(m, t) for m, t in zip(mask, truth[i])]))
            expression = video.expressions[i]
            empty = not mask.any()
            scores.append(Score(video.name, expression.text, expression.category, j, f, not truth[i].any(), empty))
        yield tuple(scores)


def _exchange(texts: dict[int, str], truth: np.ndarray) -> dict[int, str]:
    given = {}
    for i in texts:
        others = [k for k in texts if k != i and (truth[k] != truth[i]).any()]
        if others and truth[i].any():
            given[i] = texts[min(others, key=lambda k: (k - i) % len(truth))]
    return given


def summarize(scores: Sequence[Score]) -> dict[str, float]:
    """Means over expressions: j_and_f, j, f, j_and_f/CATEGORY; no_target_accuracy and target_accuracy if they apply.

    No-target accuracy is the share of expressions without a target for which nothing was segmented; target accuracy
    the share of the others for which something was.
    """
    if not scores:
        raise UserError("no expression was scored; the held-out data is empty")
    out = {
        "j_and_f": float(np.mean([s.j_and_f for s in scores])),
        "j": float(np.mean([s.j for s in scores])),
        "f": float(np.mean([s.f for s in scores])),
    }
    for category in sorted({s.category for s in scores}):
        out[f"j_and_f/{category or 'all'}"] = float(np.mean([s.j_and_f for s in scores if s.category == category]))
    if none := [s.empty for s in scores if s.no_target]:
        out["no_target_accuracy"] = float(np.mean(none))
    if some := [not s.empty for s in scores if not s.no_target]:
        out["target_accuracy"] = float(np.mean(some))
    return out
