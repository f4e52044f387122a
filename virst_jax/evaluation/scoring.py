"""Scores of one video's expressions, frame by frame in packed bits; memory does not grow with the video's length.

Axes: T frames of a video, n frames of a piece, H height, W width, D words of packed bits (see bitmask.py).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from virst_jax.data.datasets.readers import RleMasks
from virst_jax.data.samples import Video
from virst_jax.errors import UserError
from virst_jax.evaluation import bitmask
from virst_jax.evaluation.predictions import MaskReader
from virst_jax.evaluation.rle import pack_codes

PIECE = 16  # frames at a time

# frame numbers -> bool[n, H, W]
FrameMasks = Callable[[Sequence[int]], np.ndarray]


@dataclass(frozen=True)
class Row:
    """Scores of one expression, 0..1, means over its frames. None: the benchmark does not ask for it."""

    video: str
    expression: str
    text: str
    category: str
    frames: int
    J: float
    F: float
    JF: float
    intersection: int  # pixels, all frames together
    union: int
    pred_pixels: int
    gt_pixels: int
    A: float | None = None
    R: float | None = None
    A_script: float | None = None  # as the release's script computes it on files of 0 and 255
    R_script: float | None = None
    J_unignored: float | None = None  # with ignored pixels counted as background, as the release does
    intersection_unignored: int | None = None
    union_unignored: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def score_expressions(
    video: Video,
    read_pred: MaskReader,
    *,
    foreground: FrameMasks | None = None,
    ignored: np.ndarray | None = None,
    boundaries: bool = True,
    positions: Sequence[int] | None = None,
) -> list[Row]:
    """Scores the expressions of a video.

    Args:
      read_pred: the predicted masks.
      foreground: all objects of a frame; asks for A and R (ReVOS).
      ignored: bool[H, W], pixels to leave out (ReasonSeg).
      boundaries: whether F is wanted; without it F is J.
      positions: of the expressions; None: all.

    Raises:
      UserError: the masks are not public, or a frame of either is missing, damaged or of another size.
    """
    if video.read_masks is None:
        raise UserError(f"video {video.name}: its masks are not public, so nothing can be scored")
    skipped = None if ignored is None else bitmask.pack(ignored)
    every = None
    if foreground is not None:  # pixels of every frame
        every = np.concatenate([bitmask.count(pack_frames(video, foreground(p))) for p in pieces(video.num_frames)])
    chosen = range(len(video.expressions)) if positions is None else positions
    return [_score(video, i, read_pred, every, skipped, boundaries) for i in chosen]


def pieces(num_frames: int) -> Iterator[range]:
    """The frames of a video, some at a time."""
    return (range(start, min(start + PIECE, num_frames)) for start in range(0, num_frames, PIECE))


def pack_frames(video: Video, masks: np.ndarray) -> np.ndarray:
    """Packs annotated masks[n, H, W].

    Raises:
      UserError: they are not of the video's size.
    """
    if masks.shape[1:] != video.size:
        raise UserError(
            f"video {video.name}: its masks are {list(masks.shape[1:])} pixels, its frames {list(video.size)}"
        )
    return bitmask.pack(masks)


def pack_annotations(video: Video, position: int, indices: Sequence[int]) -> np.ndarray:
    """Packed annotated masks of an expression, uint64[n, H, D]; run-length codes are not drawn first.

    Raises:
      UserError: they are missing, damaged or of another size.
    """
    reader = video.read_masks
    assert reader is not None
    if isinstance(reader, RleMasks):
        every = [(anno_id, reader.codes(anno_id)) for anno_id in reader.ids[position]]
        chosen = [(anno_id, [codes[i] for i in indices]) for anno_id, codes in every]
        if all(_is_compressed(c, video.size) for _, codes in chosen for c in codes):
            words = np.zeros((len(indices), *bitmask.pack(np.zeros(video.size, bool)).shape), np.uint64)
            for anno_id, codes in chosen:
                present = [n for n, code in enumerate(codes) if code]
                try:
                    words[present] |= pack_codes([codes[n]["counts"] for n in present], video.size)
                except UserError as error:
                    raise UserError(f"{reader.where(anno_id)}, video {video.name}: {error}") from error
            return words
    return pack_frames(video, reader(position, indices))  # names what is unusual


def _is_compressed(code: object, size: tuple[int, int]) -> bool:
    return not code or (
        isinstance(code, dict) and isinstance(code.get("counts"), str) and code.get("size") == list(size)
    )


def overlap_surplus(video: Video, position: int, indices: Sequence[int]) -> np.ndarray | None:
    """How many annotations of an expression lie on a pixel beyond the first: uint8[n, H, W]; None if that is unknown.

    Only where an expression's annotations are stored one by one can they overlap.
    """
    reader = video.read_masks
    if not isinstance(reader, RleMasks):
        return None
    ids = reader.ids[position]
    if len(ids) < 2:
        return None
    total = np.zeros((len(indices), *video.size), np.uint8)
    for anno_id in ids:
        total += RleMasks(reader.masks, ((anno_id,),), reader.num_frames, reader.size)(0, indices)
    return np.where(total > 1, total - 1, 0).astype(np.uint8)


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, 1 where whole is 0: float64."""
    return np.where(whole == 0, 1.0, part / np.maximum(whole, 1))


def _score(
    video: Video,
    position: int,
    read_pred: MaskReader,
    foreground: np.ndarray | None,
    skipped: np.ndarray | None,
    boundaries: bool,
) -> Row:
    assert video.read_masks is not None
    height, width = video.size
    radius = bitmask.boundary_radius(height, width)
    counts: dict[str, list[np.ndarray]] = {}

    def add(**values: np.ndarray) -> None:
        for name, value in values.items():
            counts.setdefault(name, []).append(value)

    for piece in pieces(video.num_frames):
        gt = pack_annotations(video, position, piece)
        pred = read_pred(video, position, piece)
        if skipped is not None:
            add(all_inter=bitmask.count(pred & gt), all_union=bitmask.count(pred | gt))
            gt, pred = gt & ~skipped, pred & ~skipped
        add(inter=bitmask.count(pred & gt), union=bitmask.count(pred | gt))
        add(pred=bitmask.count(pred), gt=bitmask.count(gt))
        if boundaries:
            add(f=np.array([bitmask.boundary_f(p, g, width, radius) for p, g in zip(pred, gt, strict=True)]))
        if foreground is not None:
            surplus = overlap_surplus(video, position, piece)
            falsely = np.zeros(len(piece), np.int64)
            if surplus is not None:
                falsely = np.where(bitmask.unpack(pred, width), surplus, 0).sum(axis=(1, 2), dtype=np.int64)
            add(surplus=falsely)

    values = {name: np.concatenate(parts) for name, parts in counts.items()}
    j = ratio(values["inter"], values["union"])
    j_mean = float(j.mean())
    f_mean = float(values["f"].mean()) if boundaries else j_mean
    expression = video.expressions[position]
    extra: dict[str, Any] = {}
    if foreground is not None:
        extra |= _accuracy_and_robustness(values, foreground, height * width)
    if skipped is not None:
        extra |= {
            "J_unignored": float(ratio(values["all_inter"], values["all_union"]).mean()),
            "intersection_unignored": int(values["all_inter"].sum()),
            "union_unignored": int(values["all_union"].sum()),
        }
    return Row(
        video=video.name,
        expression=expression.id,
        text=expression.text,
        category=expression.category,
        frames=video.num_frames,
        J=j_mean,
        F=f_mean,
        JF=(j_mean + f_mean) / 2,
        intersection=int(values["inter"].sum()),
        union=int(values["union"].sum()),
        pred_pixels=int(values["pred"].sum()),
        gt_pixels=int(values["gt"].sum()),
        **extra,
    )


def _accuracy_and_robustness(values: dict[str, np.ndarray], foreground: np.ndarray, pixels: int) -> dict[str, float]:
    """A and R of masks of 0 and 1, and as utils/evaluation/eval_revos.py of the release has them for 0 and 255.

    The script compares 255 with 1, so only common background agrees, and multiplies in uint8: (1 - annotations) * 255
    is 255 where a pixel is falsely set, and the number of annotations beyond the first where it is rightly set.
    """
    false_pixels = values["pred"] - values["inter"]
    everything = foreground + 1e-6
    return {
        "A": float(((pixels - values["union"] + values["inter"]) / pixels).mean()),
        "R": float(np.maximum(1 - false_pixels / everything, 0.0).mean()),
        "A_script": float(((pixels - values["union"]) / pixels).mean()),
        "R_script": float(np.maximum(1 - (255 * false_pixels + values["surplus"]) / everything, 0.0).mean()),
    }
