"""Masks of everything in an image: a grid of clicks, of whose masks the good and different ones are kept.

Source: sam2/automatic_mask_generator.py and utils/amg.py of facebookresearch/sam2; the defaults are theirs.

Axes: N masks, G clicks of a call, M masks of a click, H, W size of the image, L mask side, I, J tile.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from virst_jax.errors import UserError
from virst_jax.inference.tiles import MaskTiles
from virst_jax.inference.tracker_steps import TrackerNetwork

NEAR_EDGE = 20  # pixels within which a box touches the edge of a crop
Box = tuple[int, int, int, int]  # x0, y0, x1, y1; the last two are outside
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class AutomaticOptions:
    """How masks are found and which are kept."""

    points_per_side: int = 32
    batch: int = 64  # clicks of a call
    iou_threshold: float = 0.8  # predicted quality, above which a mask is kept
    stability_threshold: float = 0.95  # share of the mask that stays when the logits' threshold rises by the offset
    stability_offset: float = 1.0
    overlap_threshold: float = 0.7  # of two masks whose boxes overlap more, the worse is dropped
    crop_layers: int = 0  # layer i cuts the image into 4^i crops, which find smaller things
    crop_overlap: float = 512 / 1500  # of the first layer's crops, as a share of the image's shorter side
    crop_points_divisor: int = 1  # layer i has points_per_side / divisor^i clicks a side

    def check(self) -> None:
        """Raises UserError: a number out of range."""
        for name, low in (("points_per_side", 1), ("batch", 1), ("crop_layers", 0), ("crop_points_divisor", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low:
                raise UserError(f"{name} is {value!r}; give an integer of {low} or more")
        for name in ("iou_threshold", "stability_threshold", "overlap_threshold", "crop_overlap"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)!r}; give a number from 0 to 1")
        if not self.stability_offset > 0:
            raise UserError(f"stability_offset is {self.stability_offset!r}; give a number above 0")


@dataclass(frozen=True, eq=False)
class ImageMask:
    """A mask that was found."""

    mask: np.ndarray  # bool[H, W]
    box: Box
    predicted_iou: float
    stability: float
    point: tuple[float, float]  # the click, (x, y) in pixels of the image
    crop: Box  # where it was found

    @property
    def area(self) -> int:
        return int(self.mask.sum())


def find_masks(
    network: TrackerNetwork, image: np.ndarray, options: AutomaticOptions, progress: Progress | None = None
) -> list[ImageMask]:
    """Masks of everything in an image, the surest first.

    Args:
      image: uint8[H, W, 3].
      progress: called with "masks", how many clicks are done, and of how many.

    Raises:
      UserError: an option out of range.
    """
    options.check()
    crops = list(crop_boxes((image.shape[0], image.shape[1]), options))
    total, done = sum(len(grid_points(options, layer)) for _, layer in crops), 0

    def tell(clicks: int) -> None:
        nonlocal done
        done += clicks
        if progress is not None:
            progress("masks", done, total)

    found: list[ImageMask] = []
    for crop, layer in crops:
        masks = list(_in_crop(network, image, crop, grid_points(options, layer), options, tell))
        boxes, scores = np.array([x.box for x in masks]), np.array([x.predicted_iou for x in masks])
        found += [masks[i] for i in suppress(boxes, scores, options.overlap_threshold)]
    if len(crops) > 1:  # those of smaller crops go before
        boxes, areas = np.array([x.box for x in found]), np.array([_area(x.crop) for x in found])
        found = [found[i] for i in suppress(boxes, 1 / areas, options.overlap_threshold)]
    return sorted(found, key=lambda x: -x.predicted_iou)


def grid_points(options: AutomaticOptions, layer: int) -> np.ndarray:
    """Clicks of a layer as shares of a crop's width and height, float32[G, 2]."""
    side = max(1, options.points_per_side // options.crop_points_divisor**layer)
    places = (np.arange(side, dtype=np.float32) + 0.5) / side
    return np.stack(np.meshgrid(places, places), -1).reshape(-1, 2)


def crop_boxes(size: tuple[int, int], options: AutomaticOptions) -> Iterator[tuple[Box, int]]:
    """The image, then the crops of every layer, with the layers' numbers."""
    height, width = size
    yield (0, 0, width, height), 0
    for layer in range(1, options.crop_layers + 1):
        count = 2**layer
        overlap = int(options.crop_overlap * min(size) * 2 / count)
        tall, wide = (math.ceil((overlap * (count - 1) + length) / count) for length in size)
        for x in (int((wide - overlap) * i) for i in range(count)):
            for y in (int((tall - overlap) * i) for i in range(count)):
                yield (x, y, min(x + wide, width), min(y + tall, height)), layer


def suppress(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> list[int]:
    """Boxes number[N, 4] without those that overlap a better one by more than `threshold` (intersection over union):
    the indices of the others, best first."""
    kept: list[int] = []
    order = list(np.argsort(-scores, kind="stable"))
    while order:
        best = order.pop(0)
        kept.append(int(best))
        rest = np.array(order, int)
        low, high = np.maximum(boxes[best, :2], boxes[rest, :2]), np.minimum(boxes[best, 2:], boxes[rest, 2:])
        shared = np.clip(high - low, 0, None).prod(-1)
        areas = (boxes[rest, 2:] - boxes[rest, :2]).prod(-1)
        union = (boxes[best, 2:] - boxes[best, :2]).prod() + areas - shared
        order = rest[shared <= threshold * union].tolist()
    return kept


def _in_crop(
    network: TrackerNetwork,
    image: np.ndarray,
    crop: Box,
    grid: np.ndarray,
    options: AutomaticOptions,
    tell: Callable[[int], None],
) -> Iterator[ImageMask]:
    """The masks of one crop that pass the filters."""
    x0, y0, x1, y1 = crop
    size = (y1 - y0, x1 - x0)
    side = network.tracker_cfg.image_size
    # an image is resized as SAM 2's image predictor does, unlike frames of a video
    pixels = network.resize(image[y0:y1, x0:x1], side, "bilinear")
    (features,) = network.encode_batch([pixels], 1)
    tiles = MaskTiles(size, network.tracker_cfg.low_res_size)
    for first in range(0, len(grid), options.batch):
        clicks = grid[first : first + options.batch]
        padded = np.concatenate([clicks, np.repeat(clicks[-1:], options.batch - len(clicks), 0)])
        logits, ious = network.every_mask(features, padded * side)
        quality = np.asarray(ious)[: len(clicks)]
        good = np.argwhere(quality > options.iou_threshold)
        for start in range(0, len(good), options.batch):
            chosen = good[start : start + options.batch]
            for (click, which), (mask, stability) in zip(
                chosen, _measured(network, logits, chosen, tiles, options), strict=True
            ):
                box = _box(mask)
                if stability < options.stability_threshold or box is None:
                    continue
                whole = np.zeros(image.shape[:2], bool)
                whole[y0:y1, x0:x1] = mask
                box = (box[0] + x0, box[1] + y0, box[2] + x0, box[3] + y0)
                if not _cut(box, crop, image.shape[:2]):
                    point = (float(clicks[click, 0] * size[1] + x0), float(clicks[click, 1] * size[0] + y0))
                    yield ImageMask(whole, box, float(quality[click, which]), stability, point, crop)
        tell(len(clicks))


def _measured(
    network: TrackerNetwork, logits: jax.Array, chosen: np.ndarray, tiles: MaskTiles, options: AutomaticOptions
) -> list[tuple[np.ndarray, float]]:
    """Masks bool[H, W] of the chosen logits, and how stable they are."""
    index = np.zeros((options.batch, 2), np.int32)
    index[: len(chosen)] = chosen
    offset = options.stability_offset
    measured = [[network.measure_masks(logits, index, *m, offset) for m in row] for row in tiles.matrices]
    masks = tiles.join([[packed[None] for packed, _, _ in row] for row in measured])[0]
    inner, outer = (sum(np.asarray(tile[k]) for row in measured for tile in row) for k in (1, 2))
    stability = np.asarray(inner) / np.maximum(outer, 1)
    return [(masks[i], float(stability[i])) for i in range(len(chosen))]


def _box(mask: np.ndarray) -> Box | None:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1) if len(rows) else None


def _cut(box: Box, crop: Box, size: Sequence[int]) -> bool:
    """Whether a box touches an edge of its crop that is none of the image."""
    edges = np.array([0, 0, size[1], size[0]])
    at_crop = np.abs(np.array(box) - crop) <= NEAR_EDGE
    at_image = np.abs(np.array(box) - edges) <= NEAR_EDGE
    return bool((at_crop & ~at_image).any())


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])
