"""Masks as bits, 64 pixels a word: counts and outlines of a frame cost what its objects' box costs.

Axes: T frames, H height, W width, D = ceil(W / 64) words a row; bit b of word d is the pixel in column 64 d + b, and
the bits beyond W are 0. All that is counted here is symmetric in rows and columns, so a transposed frame [W, H], as
column-major run-length codes decode to, gives the same numbers.
"""

import math
import sys
from dataclasses import dataclass

import numpy as np

from virst_jax.errors import UserError

BOUNDARY_TOLERANCE = 0.008  # of the frame's diagonal
WORD = 64


@dataclass(frozen=True)
class FrameCounts:
    """What the scores of frames are made of; every field float64[T] or int64[T]."""

    intersection: np.ndarray  # pixels
    union: np.ndarray  # pixels
    pred: np.ndarray  # pixels
    boundary: np.ndarray  # F-measure, 0..1


def pack(mask: np.ndarray) -> np.ndarray:
    """Bits of masks.

    Args:
      mask: bool or integer[..., H, W], set where it is not zero.

    Returns:
      uint64[..., H, D].
    """
    bits = np.packbits(mask, axis=-1, bitorder="little")
    words = -(-mask.shape[-1] // WORD)
    if bits.shape[-1] != words * 8 or not bits.flags.c_contiguous:
        padded = np.zeros((*bits.shape[:-1], words * 8), np.uint8)
        padded[..., : bits.shape[-1]] = bits
        bits = padded
    packed = bits.view("<u8")
    return packed if sys.byteorder == "little" else packed.astype(np.uint64)


def unpack(words: np.ndarray, width: int) -> np.ndarray:
    """The bool[..., H, W] of bits uint64[..., H, D]."""
    octets = np.ascontiguousarray(words, "<u8").view(np.uint8)
    return np.unpackbits(octets, axis=-1, count=width, bitorder="little").view(bool)


def count(words: np.ndarray) -> np.ndarray:
    """Set pixels of every frame: uint64[..., H, D] -> int64[...]."""
    return np.bitwise_count(words).sum(axis=(-2, -1), dtype=np.int64)


def boundary_radius(height: int, width: int, tolerance: float = BOUNDARY_TOLERANCE) -> float:
    """Pixels by which outlines may be apart: `tolerance` if at least 1, else that part of the diagonal, rounded up."""
    return float(tolerance if tolerance >= 1 else math.ceil(tolerance * math.sqrt(height**2 + width**2)))


def count_frames(pred: np.ndarray, gt: np.ndarray, width: int, radius: float) -> FrameCounts:
    """Counts and boundary F of pairs of frames.

    Args:
      pred, gt: uint64[T, H, D], see `pack`.
      width: W, pixels.
      radius: of the boundary's tolerance, pixels, see `boundary_radius`.

    Raises:
      UserError: the shapes differ.
    """
    if pred.shape != gt.shape:
        raise UserError(f"packed masks differ in shape: {list(pred.shape)} and {list(gt.shape)}; resize the prediction")
    return FrameCounts(
        intersection=count(pred & gt),
        union=count(pred | gt),
        pred=count(pred),
        boundary=np.array([boundary_f(p, g, width, radius) for p, g in zip(pred, gt, strict=True)], np.float64),
    )


def boundary_f(pred: np.ndarray, gt: np.ndarray, width: int, radius: float) -> float:
    """F-measure of two frames' outlines, uint64[H, D] each; 1 where neither has an outline.

    An outline pixel is matched if the other outline has one at a Euclidean distance of at most `radius` pixels. Equals
    the published algorithm (release: utils/evaluation/metrics.py, f_measure) on the whole frame.
    """
    either = pred | gt
    rows = np.flatnonzero(either.any(axis=1))
    if not len(rows):
        return 1.0
    columns = np.flatnonzero(np.bitwise_or.reduce(either[rows[0] : rows[-1] + 1], axis=0))
    first, last = int(columns[0]), int(columns[-1])
    if first and (either[:, first] & np.uint64(1)).any():
        first -= 1  # the outline reaches one pixel further left
    # one background row above and below, where the frame has them: the crop's outlines are then those of the frame
    top, bottom = max(int(rows[0]) - 1, 0), min(int(rows[-1]) + 2, pred.shape[0])
    edge = (width - 1) % WORD if last == pred.shape[1] - 1 else None
    crop = np.stack([pred[top:bottom, first : last + 1], gt[top:bottom, first : last + 1]])
    lines = outline(crop, edge)
    sizes = count(lines)
    if not sizes.all():
        return float(sizes[0] == sizes[1])
    near = dilate(lines, radius)
    matched = count(lines & near[::-1])
    precision, recall = (matched / sizes).tolist()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def outline(words: np.ndarray, edge: int | None) -> np.ndarray:
    """One-pixel outlines, half a pixel towards the origin: set where the right, lower or diagonal pixel differs.

    Beyond the frame's last row and column stand copies of them, so there is no outline along the frame's edge.

    Args:
      words: uint64[n, H, D].
      edge: the bit of the last word that is the frame's last column; None if the words end before the frame does.

    Returns:
      uint64[n, H, D].
    """
    right = words >> np.uint64(1)
    right[..., :-1] |= words[..., 1:] << np.uint64(WORD - 1)
    if edge is not None:
        right[..., -1] |= words[..., -1] & np.uint64(1 << edge)
    result = words ^ right
    result[:, :-1] |= words[:, :-1] ^ words[:, 1:]
    result[:, :-1] |= words[:, :-1] ^ right[:, 1:]
    result[:, -1] |= words[:, -1] ^ right[:, -1]
    return result


def dilate(words: np.ndarray, radius: float) -> np.ndarray:
    """Bits at a distance of at most `radius` pixels of a set bit.

    A disk is a stack of runs, one a row: the frames are widened to every length of run that the disk has, shortest
    first, and laid over themselves at the rows where it has them.

    Args:
      words: uint64[n, H, D].

    Returns:
      uint64[n, H, D]; bits beyond the input's columns may be set.
    """
    masks, height, depth = words.shape
    squared, reach = math.floor(radius * radius), math.floor(radius)
    # All frames in one row of words, so that one shift moves everything. Zero rows around the frames and zero bits
    # between the rows keep a neighbour's bits away, and what a later shift brings back.
    used = int(np.bitwise_or.reduce(words[..., -1], axis=None)).bit_length()
    stride = depth + -(-max(0, reach - (WORD - used)) // WORD)
    rows = np.zeros((masks * (height + reach) + reach, stride), np.uint64)
    frames = rows[reach:].reshape(masks, height + reach, stride)
    frames[:, :height, :depth] = words
    run = rows.reshape(-1)

    result, scratch = np.zeros_like(run), np.empty_like(run)
    half = 0
    for dy in range(reach, -1, -1):
        length = math.isqrt(squared - dy * dy)
        while half < length:
            step = min(length - half, 2 * half + 1, WORD - 1)
            run = _widen(run, step, scratch)
            half += step
        offset = dy * stride
        if not offset:
            result |= run
        elif offset < len(run):
            result[offset:] |= run[:-offset]
            result[:-offset] |= run[offset:]
    return result.reshape(rows.shape)[reach:].reshape(frames.shape)[:, :height, :depth]


def _widen(flat: np.ndarray, bits: int, scratch: np.ndarray) -> np.ndarray:
    """Bits set here, `bits` bits before or `bits` bits behind (1 to 63)."""
    here, there = np.uint64(bits), np.uint64(WORD - bits)
    result = flat << here
    result |= flat
    np.right_shift(flat, here, out=scratch)
    result |= scratch
    np.right_shift(flat[:-1], there, out=scratch[1:])
    result[1:] |= scratch[1:]
    np.left_shift(flat[1:], there, out=scratch[1:])
    result[:-1] |= scratch[1:]
    return result
