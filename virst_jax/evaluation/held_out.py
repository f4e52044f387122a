"""J&F by category on videos that training has not seen.

Axes: N expressions, T frames, H height, W width.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from virst_jax.data.samples import Source, Video
from virst_jax.errors import UserError
from virst_jax.evaluation import bitmask
from virst_jax.evaluation.scoring import Row, score_expressions

# a video and texts -> masks bool[N, T, H, W]
Segment = Callable[[Video, Sequence[str]], np.ndarray]


def score_videos(segment: Segment, source: Source, *, exchange: bool = False) -> Iterator[tuple[Row, ...]]:
    """Segments every video of a source and scores its expressions.

    Args:
      exchange: give every expression the text of another one of its video that means something else, and leave out
        those without such another: what a network scores that does not read.

    Yields:
      The scores of a video.
    """
    for index in range(len(source)):
        video = source[index]
        if not isinstance(video, Video) or video.read_masks is None:
            raise UserError(f"{video.name}: held-out data must be videos with masks")
        texts = {i: expression.text for i, expression in enumerate(video.expressions)}
        if exchange:
            texts = _exchange(video, texts)
        if not texts:
            continue
        packed = {i: bitmask.pack(masks) for i, masks in zip(texts, segment(video, list(texts.values())))}

        def read(_: Video, position: int, frames: Sequence[int], packed: dict[int, np.ndarray] = packed) -> np.ndarray:
            return packed[position][list(frames)]

        yield tuple(score_expressions(video, read, positions=list(texts)))


def _exchange(video: Video, texts: dict[int, str]) -> dict[int, str]:
    assert video.read_masks is not None
    truth = np.stack([video.read_masks(i, range(video.num_frames)) for i in texts])
    given = {}
    for i in texts:
        others = [k for k in texts if k != i and (truth[k] != truth[i]).any()]
        if others and truth[i].any():
            given[i] = texts[min(others, key=lambda k: (k - i) % len(truth))]
    return given


def summarize(rows: Sequence[Row]) -> dict[str, float]:
    """Means over expressions: j_and_f, j, f, j_and_f/CATEGORY; no_target_accuracy and target_accuracy if they apply.

    No-target accuracy is the share of expressions without a target for which nothing was segmented; target accuracy
    the share of the others for which something was.

    Raises:
      UserError: there are none.
    """
    if not rows:
        raise UserError("no expression was scored; the held-out data is empty")
    out = {
        "j_and_f": float(np.mean([row.JF for row in rows])),
        "j": float(np.mean([row.J for row in rows])),
        "f": float(np.mean([row.F for row in rows])),
    }
    for category in sorted({row.category for row in rows}):
        out[f"j_and_f/{category or 'all'}"] = float(np.mean([row.JF for row in rows if row.category == category]))
    if none := [row.pred_pixels == 0 for row in rows if not row.gt_pixels]:
        out["no_target_accuracy"] = float(np.mean(none))
    if some := [row.pred_pixels > 0 for row in rows if row.gt_pixels]:
        out["target_accuracy"] = float(np.mean(some))
    return out
