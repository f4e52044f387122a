"""What the patches of a clip show, from its label maps: objects, and where and when each begins and ends.

Axes: n frames of a clip, H height, W width, P = grid * grid patches of a frame.
"""

import numpy as np

SEEN = 0.12  # share of a patch that an object must cover to be what the patch shows
ENOUGH = 0.3  # share of its largest area in the clip at which an object counts as there
BINS = 6  # of a coordinate
# a coordinate is a letter, as others spend tokens on locations: column and row, first and last; a time is a digit
COORDINATES = ("abcdef", "ghijkl", "mnopqr", "stuvwx")
FIRST, LAST = "01234", "56789"  # times in fifths of the clip
PATCH_WORDS = 12  # W: an object's words, and up to six of its path


def objects_of_patches(labels: np.ndarray, count: int, grid: int) -> np.ndarray:
    """The object that covers most of each patch: int[n, P], 0 for bare background, count + 1 where it is too little.

    Args:
      labels: uint8[n, H, W], objects from 1 on.
    """
    height, width = labels.shape[1:]
    patch = (np.arange(height) * grid // height)[:, None] * grid + np.arange(width) * grid // width
    size, every = np.bincount(patch.ravel()), np.arange(grid**2)
    rows = []
    for frame in labels:
        pixels = np.bincount((frame.astype(int) * grid**2 + patch).ravel(), minlength=(count + 1) * grid**2)
        cover = pixels.reshape(count + 1, grid**2) / size
        best = cover[1:].argmax(0) + 1 if count else np.zeros(grid**2, int)
        enough = np.where(cover[best, every] >= SEEN, best, count + 1)
        rows.append(np.where(cover[0] == 1, 0, enough))
    return np.stack(rows)


def paths_in_words(labels: np.ndarray, count: int) -> list[str]:
    """For each object, a letter each for column and row where it is first, and, in a clip of several frames, where it
    is last, and a digit each for first and last time; empty where it is never seen.

    Args:
      labels: uint8[n, H, W], objects from 1 on.
    """
    frames, height, width = labels.shape
    y, x = np.arange(height)[:, None] * (BINS / height), np.arange(width) * (BINS / width)
    found = []
    for k in range(1, count + 1):
        mask = labels == k
        area = mask.sum((1, 2))
        there = np.flatnonzero(area >= max(1, ENOUGH * area.max()))
        if not len(there):
            found.append("")
            continue
        ends = [there[0], there[-1]] if frames > 1 else [there[0]]
        at = [(int((mask[t] * x).sum() / area[t]), int((mask[t] * y).sum() / area[t])) for t in ends]
        letters = "".join(row[value] for row, value in zip(COORDINATES, (v for pair in at for v in pair)))
        times = "".join(row[t * len(row) // frames] for row, t in zip((FIRST, LAST), ends)) if frames > 1 else ""
        found.append(letters + times)
    return found
