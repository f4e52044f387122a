"""COCO's compressed run-length codes as packed masks, without drawing a pixel on the way.

A code runs down the columns, so the pixels where a run ends are few. Set as bits, a running exclusive-or down the rows,
64 columns at a time, makes them the mask.

Axes: n frames, H height, W width, D words of packed bits (see bitmask.py).
"""

import sys
from collections.abc import Sequence

import numpy as np

from virst_jax.evaluation.bitmask import WORD
from virst_jax.io.masks import covering_runs, read_runs


def pack_codes(counts: Sequence[str], size: tuple[int, int]) -> np.ndarray:
    """Packed masks of the compressed codes of frames of `size` (height, width): uint64[n, H, D].

    Raises:
      UserError: a code is damaged, or of another size.
    """
    height, width = size
    packed = np.zeros((len(counts), height, -(-width // WORD)), np.uint64)
    starts = np.arange(width) * height
    for bits, code in zip(packed, counts, strict=True):
        ends = np.cumsum(covering_runs(read_runs(code), size))[:-1]
        ends = ends[ends < height * width]
        if not len(ends):
            continue
        columns, rows = np.divmod(ends, height)
        words, shifts = np.divmod(columns, WORD)
        np.bitwise_xor.at(bits, (rows, words), np.uint64(1) << shifts.astype(np.uint64))
        np.bitwise_xor.accumulate(bits, axis=0, out=bits)
        # a column starts as the one before ends
        inside = np.searchsorted(ends, starts) % 2
        octets = np.zeros(bits.shape[1] * 8, np.uint8)
        octets[: -(-width // 8)] = np.packbits(inside.astype(bool), bitorder="little")
        carry = octets.view("<u8")
        bits ^= carry if sys.byteorder == "little" else carry.astype(np.uint64)
    return packed
