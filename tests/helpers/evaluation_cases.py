"""Predictions that need no network, and F as it was published, for the tests of evaluation.

Run as a program it evaluates a data set, so that tests can share the work among processes and kill them:

    python tests/helpers/evaluation_cases.py NAME ROOT OUT INDEX COUNT DIE_AFTER
"""

import os
import signal
import sys
import zlib
from pathlib import Path

import numpy as np
from scipy import ndimage

from virst_jax.data.datasets.registry import open_dataset
from virst_jax.evaluation import metrics
from virst_jax.evaluation.runner import evaluate

SETTINGS = {"predictor": "shifted"}


def sequence_scores(pred, gt, foreground=None):
    """Means over the frames of masks bool[T, H, W]: J, F, their mean JF, A, and R if `foreground` is given."""
    j, f = float(metrics.region_similarity(pred, gt).mean()), float(metrics.boundary_f(pred, gt).mean())
    scores = {"J": j, "F": f, "JF": (j + f) / 2, "A": float(metrics.accuracy(pred, gt).mean())}
    if foreground is not None:
        scores["R"] = float(metrics.robustness(pred, gt, foreground).mean())
    return scores


def predict_truth(video, expressions):
    for t in range(video.num_frames):
        yield t, np.concatenate([video.read_masks(i, [t]) for i in expressions]), np.ones(len(expressions))


def predict_empty(video, expressions):
    for t in range(video.num_frames):
        yield t, np.zeros((len(expressions), *video.size), bool), -np.ones(len(expressions))


def predict_shifted(video, expressions):
    """The annotated masks, moved by a few pixels and speckled, as the video's name and the frame say."""
    rng = np.random.default_rng(zlib.crc32(video.name.encode()))
    for t, masks, scores in predict_truth(video, expressions):
        moved = np.roll(masks, tuple(rng.integers(-3, 4, 2)), axis=(1, 2))
        yield t, moved ^ (rng.random(moved.shape) < 0.002), scores * rng.random()


def whole_frame_f(pred, gt, tolerance=0.008):
    """F of two masks bool[H, W], by dilating both outlines of the whole frame with a disk."""
    height, width = pred.shape
    radius = int(np.ceil(tolerance * np.sqrt(height**2 + width**2)))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disk = x * x + y * y <= radius * radius

    def outline(mask):
        padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
        return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])

    a, b = outline(pred), outline(gt)
    if not a.any() or not b.any():
        return float(a.any() == b.any())
    precision = (a & ndimage.binary_dilation(b, disk)).sum() / a.sum()
    recall = (b & ndimage.binary_dilation(a, disk)).sum() / b.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def plain_j(pred, gt):
    union = (pred | gt).sum()
    return (pred & gt).sum() / union if union else 1.0


def plain_scores(pred, gt):
    """Mean J and mean F over frames of masks bool[T, H, W]."""
    j = np.mean([plain_j(p, g) for p, g in zip(pred, gt, strict=True)])
    return j, np.mean([whole_frame_f(p, g) for p, g in zip(pred, gt, strict=True)])


def files_of(folder):
    """Contents of all files below a folder, by path."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(Path(folder).rglob("*")) if f.is_file()}


def main(name, root, out, index, count, die_after):
    left = int(die_after)

    def predict(video, expressions):
        nonlocal left
        for frame in predict_shifted(video, expressions):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            yield frame

    source = open_dataset(name, root)
    outcome = evaluate(
        source, predict, Path(out), SETTINGS, process_index=int(index), process_count=int(count), progress=False
    )
    return 1 if outcome.errors else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
