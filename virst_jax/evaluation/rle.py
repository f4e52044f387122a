"""COCO's compressed run-length codes to and from masks, without drawing a pixel on the way to packed bits.

A code runs down the columns, so the pixels where a run ends are few. Set as bits, a running exclusive-or down the rows,
64 columns at a time, makes them the mask.

Axes: n frames, H height, W width, D words of packed bits (see bitmask.py).
"""

import sys
from collections.abc import Sequence

import numpy as np
from pycocotools import mask as coco

from virst_jax.errors import UserError
from virst_jax.evaluation.bitmask import WORD


def encode_mask(mask: np.ndarray) -> str:
    """The compressed code of a mask bool[H, W]: `counts` of pycocotools."""
    return coco.encode(np.asfortranarray(mask, np.uint8))["counts"].decode("ascii")


def pack_codes(counts: Sequence[str], size: tuple[int, int]) -> np.ndarray:
    """Packed masks of the compressed codes of frames of `size` (height, width): uint64[n, H, D].

    Raises:
      UserError: a code is damaged, or of another size.
    """
    height, width = size
    packed = np.zeros((len(counts), height, -(-width // WORD)), np.uint64)
    starts = np.arange(width) * height
    for bits, code in zip(packed, counts, strict=True):
        ends = np.cumsum(read_runs(code))
        if not len(ends) or ends[-1] != height * width:
            found = ends[-1] if len(ends) else 0
            raise UserError(f"damaged run-length code of a mask: {found} pixels, a frame has {height * width}")
        ends = ends[:-1]
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


def read_runs(code: str) -> np.ndarray:
    """Lengths of the runs, background first, of a compressed code: int64[runs].

    A number is groups of five bits, lowest first, with a sixth that says whether another follows; from the fourth on
    numbers are differences to the one before the last.

    Raises:
      UserError: it is damaged.
    """
    try:
        values = np.frombuffer(code.encode("ascii"), np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError as error:
        raise UserError(f"damaged run-length code of a mask ({error})") from error
    if not len(values):
        return values
    last = (values & 32) == 0
    if not last[-1] or values.min() < 0 or values.max() > 63:
        raise UserError("damaged run-length code of a mask: it ends early, or has strange characters")
    ends = np.flatnonzero(last)
    starts = np.append(0, ends[:-1] + 1)
    digits = ends - starts + 1
    if digits.max() > 12:
        raise UserError("damaged run-length code of a mask: a number is too long")
    place = np.arange(len(values)) - np.repeat(starts, digits)
    numbers = np.add.reduceat((values & 31) << (5 * place), starts)
    negative = (values[ends] & 16) != 0
    numbers -= np.where(negative, np.int64(1) << (5 * digits), 0)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    if numbers.min() < 0:
        raise UserError("damaged run-length code of a mask: a run has a negative length")
    return numbers
