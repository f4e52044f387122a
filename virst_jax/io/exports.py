"""Masks of a video in the forms that other programs read.

coco        OUT/annotations.json: an image for each frame, an annotation for each object on it, with run lengths
coco-video  OUT/annotations.json: a video, an annotation for each object with a list over its frames (YouTube-VIS)
yolo        OUT/labels/FRAME.txt and OUT/data.yaml: a line for each object, its class and outline as shares of the frame
davis       OUT/Annotations/NAME/FRAME.png: palette images of object numbers
png-ids     OUT/FRAME.png: grey images of object numbers, 8 bits, or 16 for numbers above 255
webm-alpha  OUT/NAME.webm: the video where objects are, transparent elsewhere (VP9)
prores      OUT/NAME.mov: likewise in ProRes 4444, which programs that cut videos read
alpha       OUT/NAME/FRAME.png: 255 where objects are, a matte for programs that cut videos
csv         OUT/boxes.csv: a row for each object and frame: score, area, box

Where objects overlap, images of numbers show the one that comes later.

Axes: N objects, T frames, H, W size.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from virst_jax.errors import UserError
from virst_jax.io import atomic
from virst_jax.io.masks import encode_mask
from virst_jax.io.names import check_name, repeated, shown
from virst_jax.io.reader import Reader

FEWEST_CORNERS = 3
LARGEST_ID = (1 << 16) - 1  # of an object: images of numbers have 16 bits
ALPHA_CRF = "18"


@dataclass(frozen=True)
class MaskSet:
    """The objects of a video.

    Attributes:
      name: of the video.
      labels: of the objects.
      object_ids: their numbers, 1 or more.
      frame_names: of the T frames.
      size: height, width.
      fps: 0: unknown.
      times: of the frames, in seconds; None: unknown.
      scores: of every object, of every frame; None: unknown.
      masks: bool[N, H, W] of a frame by its index.
    """

    name: str
    labels: Sequence[str]
    object_ids: Sequence[int]
    frame_names: Sequence[str]
    size: tuple[int, int]
    fps: float
    times: Sequence[float] | None
    scores: Sequence[Sequence[float | None]]
    masks: Callable[[int], np.ndarray]

    def each(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Frame, object (both counted from 0) and mask bool[H, W], frame by frame, where the object is seen."""
        for frame in range(len(self.frame_names)):
            for number, mask in enumerate(self.masks(frame)):
                if mask.any():
                    yield frame, number, mask


def export(kind: str, masks: MaskSet, out: Path, video: Reader | None = None) -> Path:
    """Writes masks to a new folder.

    Args:
      kind: one of FORMATS.
      out: appears whole, or not at all.
      video: for "webm-alpha".

    Raises:
      UserError: an unknown kind, a folder that exists already, no video where one is needed, one of another size, names
        that make no files, or an object's number out of range.
    """
    if kind not in FORMATS:
        raise UserError(f"unknown format {kind!r}: choose {', '.join(FORMATS)}")
    if out.exists():
        raise UserError(f"{out}: exists already; choose another folder")
    check_name(masks.name, "the video's name")
    for frame_name in masks.frame_names:
        check_name(frame_name, "the frame's name")
    if (twice := repeated(masks.frame_names)) is not None:
        raise UserError(f"two frames are named{shown(twice)}, so one file would take the other's place; rename one")
    for object_id in masks.object_ids:
        if not 1 <= object_id <= LARGEST_ID:
            raise UserError(f"an object has the number {object_id}; numbers from 1 to {LARGEST_ID} can be written")
    if kind in NEED_VIDEO:
        if video is None:
            raise UserError(f"the format {kind} shows the video itself; say where it is with --video")
        if tuple(video.size) != tuple(masks.size) or video.num_frames != len(masks.frame_names):
            raise UserError(f"{video.name}: has other frames than the masks; give the video that was segmented")
    with atomic.new_folder(out) as part:
        FORMATS[kind](masks, part, video)
    return out


def annotation(mask: np.ndarray) -> dict[str, Any]:
    """What COCO says of a mask bool[H, W]: segmentation, area, bbox and iscrowd."""
    height, width = mask.shape
    return {
        "segmentation": {"size": [height, width], "counts": encode_mask(mask)},
        "area": int(mask.sum()),
        "bbox": box_of(mask),
        "iscrowd": 0,
    }


def box_of(mask: np.ndarray) -> list[int]:
    """Left, top, width and height of what a mask shows; zeros for nothing."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return [0, 0, 0, 0]
    top, left = int(rows[0]), int(columns[0])
    return [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]


def coco(masks: MaskSet) -> dict[str, Any]:
    """COCO's JSON: frames as images, labels as categories; `track_id` joins the annotations of an object."""
    height, width = masks.size
    categories = _categories(masks)
    images = [
        {"id": i + 1, "file_name": f"{name}.png", "height": height, "width": width, "frame": i}
        for i, name in enumerate(masks.frame_names)
    ]
    annotations: list[dict[str, Any]] = []
    for frame, number, mask in masks.each():
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": frame + 1,
                "category_id": categories[masks.labels[number]],
                "track_id": masks.object_ids[number],
                "score": masks.scores[number][frame],
                **annotation(mask),
            }
        )
    return {
        "info": {"description": masks.name},
        "images": images,
        "categories": [{"id": number, "name": label} for label, number in categories.items()],
        "annotations": annotations,
    }


def coco_video(masks: MaskSet) -> dict[str, Any]:
    """YouTube-VIS's JSON: one video, and for each object lists over its frames, null where it is not seen."""
    count, (height, width) = len(masks.frame_names), masks.size
    categories = _categories(masks)
    annotations: list[dict[str, Any]] = [
        {
            "id": i + 1,
            "video_id": 1,
            "category_id": categories[label],
            "track_id": object_id,
            "iscrowd": 0,
            "height": height,
            "width": width,
            "segmentations": [None] * count,
            "bboxes": [None] * count,
            "areas": [None] * count,
        }
        for i, (label, object_id) in enumerate(zip(masks.labels, masks.object_ids, strict=True))
    ]
    for frame, number, mask in masks.each():
        made = annotation(mask)
        for name, key in (("segmentations", "segmentation"), ("bboxes", "bbox"), ("areas", "area")):
            annotations[number][name][frame] = made[key]
    files = [f"{masks.name}/{name}.jpg" for name in masks.frame_names]
    return {
        "info": {"description": masks.name},
        "videos": [{"id": 1, "height": height, "width": width, "length": count, "file_names": files}],
        "categories": [{"id": number, "name": label} for label, number in categories.items()],
        "annotations": annotations,
    }


def outlines(mask: np.ndarray) -> list[np.ndarray]:
    """The outlines of a mask bool[H, W], float64[P, 2] each as (x, y) in pixels; those of holes are among them."""
    import contourpy

    padded = np.pad(mask, 1).astype(float)  # so that outlines are closed at the frame's edge
    height, width = mask.shape
    lines = contourpy.contour_generator(z=padded).lines(0.5)
    # pixel i reaches from i to i + 1, contourpy's nodes are the pixels' centres
    moved = (np.clip(np.asarray(line)[:-1] - 0.5, 0, (width, height)) for line in lines)
    return [line for line in moved if len(line) >= FEWEST_CORNERS]


def joined_outline(mask: np.ndarray) -> np.ndarray | None:
    """All outlines of a mask bool[H, W] as one polygon float64[P, 2]; None: there is none.

    Parts and holes are joined by bridges without width from the nearest corner to the nearest corner, there and back. A
    program that fills the polygon, by either rule, draws the mask with its holes.
    """
    from scipy.spatial import cKDTree

    lines = sorted(outlines(mask), key=len, reverse=True)
    if not lines:
        return None
    whole = lines[0]
    for line in lines[1:]:
        distances, nearest = cKDTree(whole).query(line)
        there = int(np.argmin(distances))
        here = int(nearest[there])
        around = np.concatenate([line[there:], line[: there + 1]])
        whole = np.concatenate([whole[: here + 1], around, whole[here:]])
    return whole


def table(masks: MaskSet) -> str:
    """A row for each object and frame, as CSV."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["object", "label", "frame", "name", "time", "score", "area", "x", "y", "width", "height"])
    for frame, name in enumerate(masks.frame_names):
        time = "" if masks.times is None else f"{masks.times[frame]:.6f}"
        for number, mask in enumerate(masks.masks(frame)):
            area, box, score = int(mask.sum()), box_of(mask), masks.scores[number][frame]
            place = box if area else ["", "", "", ""]
            shown = "" if score is None else score
            writer.writerow([masks.object_ids[number], masks.labels[number], frame, name, time, shown, area, *place])
    return file.getvalue()


def label_map(masks: np.ndarray, object_ids: Sequence[int]) -> np.ndarray:
    """Masks bool[N, H, W] as one image of object numbers, uint8[H, W], or uint16 for numbers above 255."""
    out = np.zeros(masks.shape[1:], np.uint8 if max(object_ids, default=0) < 256 else np.uint16)
    for object_id, mask in zip(object_ids, masks, strict=True):
        out[mask] = object_id
    return out


def davis_palette() -> list[int]:
    """The palette of PASCAL VOC and DAVIS: 256 colours as 768 numbers, whose bits are those of the index."""
    index = np.arange(256)
    colors = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= ((index >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colors.reshape(-1).tolist()


def _categories(masks: MaskSet) -> dict[str, int]:
    return {label: i + 1 for i, label in enumerate(dict.fromkeys(masks.labels))}


def _write_json(data: dict[str, Any], out: Path) -> None:
    (out / "annotations.json").write_text(json.dumps(data, ensure_ascii=False) + "\n")


def _yolo(masks: MaskSet, out: Path, video: Reader | None) -> None:
    categories, (height, width) = _categories(masks), masks.size
    lines: dict[int, list[str]] = {frame: [] for frame in range(len(masks.frame_names))}
    for frame, number, mask in masks.each():
        polygon = joined_outline(mask)
        if polygon is not None:
            numbers = (polygon / (width, height)).reshape(-1)
            kind = categories[masks.labels[number]] - 1
            lines[frame].append(" ".join([str(kind), *(f"{x:.6f}" for x in numbers)]))
    (out / "labels").mkdir()
    for frame, name in enumerate(masks.frame_names):
        (out / "labels" / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines[frame]))
    names = "".join(
        f"  {number - 1}: {json.dumps(label, ensure_ascii=False)}\n" for label, number in categories.items()
    )
    (out / "data.yaml").write_text(f"path: .\ntrain: images\nval: images\nnames:\n{names}")


def _davis(masks: MaskSet, out: Path, video: Reader | None) -> None:
    if max(masks.object_ids, default=0) > 255:
        raise UserError(f"object {max(masks.object_ids)} has no colour in a palette of 255; use png-ids")
    folder, palette = out / "Annotations" / masks.name, davis_palette()
    folder.mkdir(parents=True)
    for frame, name in enumerate(masks.frame_names):
        image = Image.fromarray(label_map(masks.masks(frame), masks.object_ids))
        image.putpalette(palette)
        image.save(folder / f"{name}.png")


def _png_ids(masks: MaskSet, out: Path, video: Reader | None) -> None:
    for frame, name in enumerate(masks.frame_names):
        Image.fromarray(label_map(masks.masks(frame), masks.object_ids)).save(out / f"{name}.png")


def _alpha(masks: MaskSet, out: Path, video: Reader | None) -> None:
    (out / masks.name).mkdir()
    for frame, name in enumerate(masks.frame_names):
        matte = masks.masks(frame).any(0).astype(np.uint8) * 255
        Image.fromarray(matte).save(out / masks.name / f"{name}.png")


def _csv(masks: MaskSet, out: Path, video: Reader | None) -> None:
    (out / "boxes.csv").write_text(table(masks))


def _transparent(
    suffix: str, codec: str, pixels: str, options: dict[str, str], masks: MaskSet, out: Path, video: Reader | None
) -> None:
    """The video where objects are, transparent elsewhere."""
    import av

    from virst_jax.io.video_writer import DEFAULT_FPS

    assert video is not None
    height, width = masks.size
    with av.open(str(out / f"{masks.name}.{suffix}"), "w", format=suffix) as container:
        rate = Fraction(masks.fps if masks.fps > 0 else DEFAULT_FPS).limit_denominator(1001)
        stream: Any = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        for frame, image in enumerate(video):
            alpha = np.where(masks.masks(frame).any(axis=0), 255, 0).astype(np.uint8)
            picture = av.VideoFrame.from_ndarray(np.dstack([image, alpha]), format="rgba")
            container.mux(stream.encode(picture.reformat(format=pixels)))
        container.mux(stream.encode(None))


FORMATS: dict[str, Callable[[MaskSet, Path, Reader | None], None]] = {
    "coco": lambda masks, out, video: _write_json(coco(masks), out),
    "coco-video": lambda masks, out, video: _write_json(coco_video(masks), out),
    "yolo": _yolo,
    "davis": _davis,
    "png-ids": _png_ids,
    "webm-alpha": partial(_transparent, "webm", "libvpx-vp9", "yuva420p", {"crf": ALPHA_CRF, "b": "0"}),
    "prores": partial(_transparent, "mov", "prores_ks", "yuva444p10le", {"profile": "4444", "alpha_bits": "16"}),
    "alpha": _alpha,
    "csv": _csv,
}
NEED_VIDEO = ("webm-alpha", "prores")
