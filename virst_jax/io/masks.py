"""Masks in COCO's forms: run lengths, compressed or not, and polygons. Everything is checked before it is drawn.

A code runs down the columns of a frame. pycocotools trusts what it is given: runs that cover less than the frame leave
pixels of whatever memory held before, and coordinates that are no numbers, or very large ones, end the process.

Axes: H height, W width.
"""

from collections.abc import Sequence

import numpy as np

from virst_jax.errors import UserError, kind_of

Size = tuple[int, int]  # height, width

MAX_PIXELS = 1 << 28  # of a mask
_OUTSIDE = 8  # sides of a frame by which a polygon may leave it


def encode_mask(mask: np.ndarray) -> str:
    """The compressed code of a mask bool[H, W]: `counts` of pycocotools."""
    pixels = np.asarray(mask, bool).T.reshape(-1)
    edges = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    runs = np.diff(np.concatenate([[0] if pixels[:1].any() else [], [0], edges, [len(pixels)]]).astype(np.int64))
    return write_runs(runs)


def decode_mask(code: object, size: Size, where: str) -> np.ndarray:
    """A mask in one of COCO's forms: run lengths (compressed or not), polygons, or a list of run lengths.

    Args:
      where: file and place, for messages.

    Returns:
      bool[H, W].

    Raises:
      UserError: it is none of these, of another size, or does not cover the frame; polygons with coordinates that are
        no numbers or far outside.
    """
    check_size(size, where)
    parts = [code] if isinstance(code, dict) else code
    if not isinstance(parts, list) or not parts:
        raise UserError(f"{where}: not a mask in COCO's form (found {kind_of(code)}); get the file again")
    mask = np.zeros(size, bool)
    if isinstance(parts[0], dict):
        for part in parts:
            mask |= decode_runs(runs_of_code(part, size, where), size)
        return mask
    return draw_polygons(parts, size, where)


def check_size(size: Size, where: str) -> None:
    """Raises UserError: a size that no frame has."""
    height, width = size
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise UserError(f"{where}: a frame of {height}x{width} pixels; from 1 to {MAX_PIXELS} can be read")


def runs_of_code(code: object, size: Size, where: str) -> np.ndarray:
    """Run lengths, int64[runs], of `{"size": [H, W], "counts": text or list}` for a frame of `size`.

    Raises:
      UserError: it is damaged, of another size, or does not cover the frame.
    """
    if not isinstance(code, dict):
        raise UserError(f"{where}: not a mask in COCO's form (found {kind_of(code)}); get the file again")
    stated = code.get("size")
    if not isinstance(stated, list | tuple) or len(stated) != 2 or any(type(n) is not int for n in stated):
        raise UserError(f'{where}: not a mask in COCO\'s form ("size" is not two numbers); get the file again')
    if tuple(stated) != tuple(size):
        found = "x".join(str(n)[:12] for n in stated)
        raise UserError(f"{where}: a mask of {found} pixels for frames of {size[0]}x{size[1]}")
    counts = code.get("counts")
    try:
        if isinstance(counts, bytes):
            counts = counts.decode("latin-1")
        return covering_runs(read_runs(counts) if isinstance(counts, str) else plain_runs(counts), size)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def plain_runs(counts: object) -> np.ndarray:
    """Run lengths that stand in a list, int64[runs]. Raises UserError: it is no list of lengths."""
    if not isinstance(counts, list) or any(type(n) is not int or not 0 <= n <= MAX_PIXELS for n in counts):
        raise UserError('not a mask in COCO\'s form ("counts" is neither a code nor a list of lengths)')
    return np.array(counts, np.int64)


def covering_runs(runs: np.ndarray, size: Size) -> np.ndarray:
    """The same runs, int64[runs], if they cover a frame of `size`: the one check of every code that is decoded.

    Raises:
      UserError: they cover less or more.
    """
    pixels = int(runs.sum())
    if pixels != size[0] * size[1]:
        raise UserError(f"damaged run-length code of a mask: {pixels} pixels, a frame has {size[0] * size[1]}")
    return runs


def decode_runs(runs: np.ndarray, size: Size) -> np.ndarray:
    """The mask bool[H, W] of runs, background first, that cover the frame."""
    height, width = size
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def read_runs(code: str) -> np.ndarray:
    """Lengths of the runs, background first, of a compressed code: int64[runs].

    A number is groups of five bits, lowest first, with a sixth that says whether another follows; from the fourth on
    numbers are differences to the one before the last.

    Raises:
      UserError: it is damaged.
    """
    try:
        values = np.frombuffer(code.encode("ascii"), np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        raise UserError("damaged run-length code of a mask: it has strange characters") from None
    if not len(values):
        return values
    last = (values & 32) == 0
    if not last[-1] or values.min() < 0 or values.max() > 63:
        raise UserError("damaged run-length code of a mask: it ends early, or has strange characters")
    ends = np.flatnonzero(last)
    starts = np.append(0, ends[:-1] + 1)
    digits = ends - starts + 1
    if digits.max() > 8:  # 40 bits, so that no sum of them overflows
        raise UserError("damaged run-length code of a mask: a number is too long")
    place = np.arange(len(values)) - np.repeat(starts, digits)
    numbers = np.add.reduceat((values & 31) << (5 * place), starts)
    negative = (values[ends] & 16) != 0
    numbers -= np.where(negative, np.int64(1) << (5 * digits), 0)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    if numbers.min() < 0 or numbers.max() > MAX_PIXELS:
        raise UserError("damaged run-length code of a mask: a run has a negative length, or a very large one")
    return numbers


def write_runs(runs: np.ndarray) -> str:
    """The compressed code of runs int64[runs]: what `read_runs` reads, as pycocotools writes it."""
    numbers = np.array(runs, np.int64)
    numbers[3:] -= runs[1:-2]
    digits = np.ones(len(numbers), np.int64)  # groups of five bits, one of them the sign
    while (short := (numbers >> (5 * digits - 1)) != np.where(numbers < 0, -1, 0)).any():
        digits[short] += 1
    place = np.arange(digits.max(initial=1))
    groups = (numbers[:, None] >> (5 * place)) & 31
    groups |= np.where(place < digits[:, None] - 1, 32, 0)  # another one follows
    return (groups + 48)[place < digits[:, None]].astype(np.uint8).tobytes().decode("ascii")


def draw_polygons(polygons: Sequence[object], size: Size, where: str) -> np.ndarray:
    """The union of polygons [x0, y0, x1, y1, ...] in pixels: bool[H, W]. Those of less than three points are left out.

    Raises:
      UserError: a polygon is no list of finite numbers, lies far outside of the frame, or is longer than any outline
        in it; none has three points.
    """
    from pycocotools import mask as coco  # an extra: inference does without

    height, width = size
    reach = _OUTSIDE * max(size)
    drawn = []
    for polygon in polygons:
        if not isinstance(polygon, list | tuple) or any(type(v) not in (int, float) for v in polygon):
            raise UserError(f"{where}: not a mask in COCO's form (a polygon is no list of numbers); get the file again")
        if any(not -reach <= v <= reach for v in polygon):  # NaN is neither
            raise UserError(f"{where}: a polygon lies far outside of the {height}x{width} pixels; get the file again")
        if len(polygon) % 2:
            raise UserError(f"{where}: a polygon has an odd number of coordinates; get the file again")
        if len(polygon) < 6:
            continue
        points = np.asarray(polygon, np.float64).reshape(-1, 2)
        length = float(np.abs(points - np.roll(points, 1, 0)).max(1).sum())
        if length > 4 * height * width + 64 * reach:
            raise UserError(f"{where}: a polygon is longer than an outline can be; get the file again")
        drawn.append(points.reshape(-1).tolist())
    if not drawn:
        raise UserError(f"{where}: not a mask in COCO's form (no polygon of three points); get the file again")
    mask = np.zeros(size, bool)
    for code in coco.frPyObjects(drawn, height, width):
        mask |= coco.decode(code).astype(bool)
    return mask
