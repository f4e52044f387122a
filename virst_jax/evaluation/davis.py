"""The official protocol of Ref-DAVIS17: four annotators, one indexed mask each, the measures of DAVIS.

Axes: T frames, H height, W width, D words of packed bits, N_gt annotated objects, N results.

For every annotator the masks of all objects become one image: argmax over the objects and a background of 0.1, so of
masks of 0 and 1 the object with the lowest number has a contested pixel. J and F of all pairs of results and annotated
objects, means over all frames, decide which result belongs to which object (the task that DAVIS calls unsupervised);
pixels annotated as void (255) are left out. Every object counts the same; the score is the mean of the four annotators.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from virst_jax.data.datasets.davis import NUM_ANNOTATORS, expression_parts
from virst_jax.data.datasets.readers import LabelMasks
from virst_jax.data.samples import Video
from virst_jax.errors import UserError
from virst_jax.evaluation import bitmask
from virst_jax.evaluation.predictions import MaskReader, frame_names, read_index
from virst_jax.evaluation.scoring import pieces, ratio

VOID = 255
MAX_RESULTS = 20  # objects in an image


@dataclass(frozen=True)
class ObjectRow:
    """Scores of one object under one annotator, 0..1."""

    video: str
    annotator: int  # from 0
    object: int  # from 1
    J: float
    F: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def score_annotators(video: Video, read_pred: MaskReader) -> list[ObjectRow]:
    """Scores of all annotators' objects in one video.

    Raises:
      UserError: an annotator has no expression for an object, or a frame of either side is missing or of another size.
    """
    objects: dict[int, dict[int, int]] = {}  # annotator -> object -> position
    for position, expression in enumerate(video.expressions):
        if not expression.id.isdigit():
            raise UserError(f"video {video.name}: the expression id {expression.id!r} of Ref-DAVIS17 must be a number")
        number, annotator = expression_parts(expression.id)
        objects.setdefault(annotator, {})[number] = position
    numbers = sorted({n for by_object in objects.values() for n in by_object})
    for annotator in range(NUM_ANNOTATORS):
        missing = [n for n in numbers if n not in objects.get(annotator, {})]
        if missing:
            raise UserError(
                f"video {video.name}: annotator {annotator} has no expression for object {missing[0]}, so the official "
                "protocol cannot be followed; check meta_expressions.json"
            )

    gt, void = annotated_objects(video)
    rows = []
    for annotator in range(NUM_ANNOTATORS):
        taken: np.ndarray | None = None
        results = []
        for number in numbers:
            masks = np.concatenate([read_pred(video, objects[annotator][number], p) for p in pieces(video.num_frames)])
            results.append(masks if taken is None else masks & ~taken)
            taken = masks if taken is None else taken | masks
        rows += match_objects(video, annotator, results, gt, void)
    return rows


def score_indexed(video: Video, folder: Path) -> list[ObjectRow]:
    """Scores of palette PNGs FOLDER/anno_K/VIDEO/FRAME.png, K from 0 to 3, whose values are the objects.

    Raises:
      UserError: an image is missing or of another size; an image has an object that the data set has not.
    """
    gt, void = annotated_objects(video)
    rows = []
    for annotator in range(NUM_ANNOTATORS):
        labels = np.stack(
            [read_index(folder / f"anno_{annotator}" / video.name / f"{n}.png", video.size) for n in frame_names(video)]
        )
        if int(labels.max()) > MAX_RESULTS:
            raise UserError(
                f"{folder / f'anno_{annotator}' / video.name}: has object {int(labels.max())}, DAVIS allows "
                f"{MAX_RESULTS}; the images must be palette PNGs whose values are the objects"
            )
        results = [bitmask.pack(labels == number) for number in range(1, int(labels.max()) + 1)]
        rows += match_objects(video, annotator, results, gt, void)
    return rows


def annotated_objects(video: Video) -> tuple[list[np.ndarray], np.ndarray | None]:
    """Masks of all annotated objects of a video, uint64[T, H, D] each, and of the void pixels, if there are any.

    Raises:
      UserError: the masks are not there.
    """
    reader = video.read_masks
    if reader is None:
        raise UserError(f"video {video.name}: its masks are not there, so nothing can be scored")
    if isinstance(reader, LabelMasks):
        # as DAVIS counts them: the objects of the first frame
        count = int(np.max(reader.labels(0), where=reader.labels(0) != VOID, initial=0))
        parts = [np.stack([reader.labels(i) for i in piece]) for piece in pieces(video.num_frames)]
        gt = [np.concatenate([bitmask.pack(p == n) for p in parts]) for n in range(1, count + 1)]
        void = np.concatenate([bitmask.pack(p == VOID) for p in parts])
        return gt, void if void.any() else None
    first: dict[int, int] = {}
    for position, expression in enumerate(video.expressions):
        first.setdefault(expression_parts(expression.id)[0], position)
    return [
        np.concatenate([bitmask.pack(reader(first[n], piece)) for piece in pieces(video.num_frames)])
        for n in sorted(first)
    ], None


def match_objects(
    video: Video, annotator: int, results: Sequence[np.ndarray], gt: Sequence[np.ndarray], void: np.ndarray | None
) -> list[ObjectRow]:
    """Gives every annotated object the result that fits best, no result twice, and scores them.

    Args:
      results, gt: uint64[T, H, D] each.
      void: uint64[T, H, D], pixels to leave out.
    """
    used = max((i + 1 for i, masks in enumerate(results) if masks.any()), default=0)  # as DAVIS counts: highest index
    results = list(results[:used])
    results += [np.zeros_like(gt[0])] * (len(gt) - len(results))
    height, width = video.size
    radius = bitmask.boundary_radius(height, width)
    if void is not None:
        results, gt = [r & ~void for r in results], [g & ~void for g in gt]
    j, f = np.zeros((2, len(results), len(gt)))
    for n, result in enumerate(results):
        for k, annotated in enumerate(gt):
            counts = bitmask.count_frames(result, annotated, width, radius)
            j[n, k] = ratio(counts.intersection, counts.union).mean()
            f[n, k] = counts.boundary.mean()
    chosen = {int(k): int(n) for n, k in zip(*linear_sum_assignment(-(j + f)), strict=True)}
    return [
        ObjectRow(video.name, annotator, k + 1, float(j[chosen[k], k]), float(f[chosen[k], k])) for k in sorted(chosen)
    ]
