"""Quality of masks: region similarity J, boundary F, and the accuracy A and robustness R of ReVOS.

Axes: T frames, H height, W width; any leading axes before H and W are kept, so that one frame [H, W], a
sequence [T, H, W] and many objects [N, T, H, W] are scored by the same call. A mask is bool, or a number that
counts as set where it is not zero. Every score lies in 0..1, 1 is best.
Follows utils/evaluation/metrics.py and utils/evaluation/eval_revos.py of the release for masks of 0 and 1.
"""

import numpy as np
from numpy.typing import ArrayLike

from virst_jax.errors import UserError
from virst_jax.evaluation import bitmask
from virst_jax.evaluation.bitmask import BOUNDARY_TOLERANCE


def region_similarity(pred: ArrayLike, gt: ArrayLike) -> np.ndarray:
    """Jaccard index (J) of every frame; 1 where both masks are empty.

    Args:
      pred, gt: mask[..., H, W].

    Returns:
      float64[...].

    Raises:
      UserError: the shapes differ or have fewer than two axes.
    """
    pred, gt = _masks(pred=pred, gt=gt)
    pred_bits, gt_bits = bitmask.pack(pred), bitmask.pack(gt)
    intersection, union = bitmask.count(pred_bits & gt_bits), bitmask.count(pred_bits | gt_bits)
    return np.where(union == 0, 1.0, intersection / np.maximum(union, 1))[()]


def boundary_f(pred: ArrayLike, gt: ArrayLike, tolerance: float = BOUNDARY_TOLERANCE) -> np.ndarray:
    """F-measure of the masks' outlines (F) of every frame; 1 where neither mask has an outline.

    A pixel of one outline is matched if the other outline comes within the tolerance (Euclidean distance).

    Args:
      pred, gt: mask[..., H, W].
      tolerance: pixels if at least 1, else a part of the frame's diagonal, rounded up to whole pixels.

    Returns:
      float64[...].

    Raises:
      UserError: the shapes differ or have fewer than two axes.
    """
    pred, gt = _masks(pred=pred, gt=gt)
    height, width = pred.shape[-2:]
    radius = bitmask.boundary_radius(height, width, tolerance)
    frames = zip(pred.reshape(-1, height, width), gt.reshape(-1, height, width), strict=True)
    scores = np.array(
        [bitmask.boundary_f(bitmask.pack(p), bitmask.pack(g), width, radius) for p, g in frames], np.float64
    )
    return scores.reshape(pred.shape[:-2])[()]


def accuracy(pred: ArrayLike, gt: ArrayLike) -> np.ndarray:
    """Share of the pixels, background included, on which the masks agree (ReVOS's A).

    Args:
      pred, gt: mask[..., H, W].

    Returns:
      float64[...].

    Raises:
      UserError: the shapes differ or have fewer than two axes.
    """
    pred, gt = _masks(pred=pred, gt=gt)
    return (np.count_nonzero(pred == gt, axis=(-2, -1)) / (pred.shape[-2] * pred.shape[-1]))[()]


def robustness(pred: ArrayLike, gt: ArrayLike, foreground: ArrayLike) -> np.ndarray:
    """One minus the falsely set pixels over the foreground's, not below 0 (ReVOS's R).

    Args:
      pred, gt: mask[..., H, W].
      foreground: mask[..., H, W], all objects of the frame.

    Returns:
      float64[...].

    Raises:
      UserError: the shapes differ or have fewer than two axes.
    """
    pred, gt, foreground = _masks(pred=pred, gt=gt, foreground=foreground)
    false_pixels = np.count_nonzero(pred & ~gt, axis=(-2, -1))
    return np.maximum(1 - false_pixels / (np.count_nonzero(foreground, axis=(-2, -1)) + 1e-6), 0.0)[()]


def _masks(**named: ArrayLike) -> list[np.ndarray]:
    arrays = {name: np.asarray(mask) for name, mask in named.items()}
    (first, reference), *rest = arrays.items()
    if reference.ndim < 2:
        raise UserError(f"mask {first!r} must have shape [..., H, W], not {list(reference.shape)}")
    for name, mask in rest:
        if mask.shape != reference.shape:
            raise UserError(
                f"masks differ in shape: {first!r} is {list(reference.shape)}, {name!r} is {list(mask.shape)}; "
                "resize the prediction to the size of the annotation"
            )
    return [mask if mask.dtype == bool else mask != 0 for mask in arrays.values()]
