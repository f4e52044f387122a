"""What a run of `virst segment` leaves beside the masks: overlay, preview, and the table of results."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from virst_jax.commands.progress import Progress
from virst_jax.errors import UserError
from virst_jax.io import atomic
from virst_jax.io.exports import box_of
from virst_jax.io.json_files import read_json
from virst_jax.io.masks import encode_mask

if TYPE_CHECKING:
    from virst_jax.io.reader import Reader

OVERLAY, PREVIEW = "overlay.mp4", "preview.png"
SHEET_FRAMES = 8
_WHOLE = ("expressions", "frames", "frame_names", "objects")


def read(path: Path) -> dict[str, Any] | None:
    """The result of a run that is through; None if there is none, or the file is empty, cut or damaged."""
    try:
        result = read_json(path).value
        count = len(result["frames"])
        whole = all(isinstance(result[key], list) for key in _WHOLE) and len(result["frame_names"]) == count
        objects = result["objects"]
        whole &= len(objects) == len(result["expressions"])
        whole &= all(len(record[key]) == count for record in objects for key in ("areas", "boxes", "rle", "scores"))
        whole &= all(isinstance(area, int) for record in objects for area in record["areas"])
        whole &= all(isinstance(record[key], str) for record in objects for key in ("expression", "folder"))
    except (UserError, KeyError, TypeError):
        return None
    return result if whole else None


def is_there(out: Path, result: Mapping[str, Any]) -> bool:
    """Whether all files that a result speaks of are in its folder."""
    masks = (f"{record['folder']}/{name}.png" for record in result["objects"] for name in result["frame_names"])
    return all((out / name).is_file() for name in (OVERLAY, PREVIEW, *masks))


def findings(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of every expression, its folder and in how many frames it was found."""
    return [
        {
            "expression": record["expression"],
            "folder": record["folder"],
            "frames": len(record["areas"]),
            "frames_found": sum(area > 0 for area in record["areas"]),
        }
        for record in result["objects"]
    ]


def write(path: Path, data: Any) -> None:
    """Writes JSON that people can read, whole."""
    atomic.write_text(path, _json(data) + "\n")


def _json(data: Any, depth: int = 0) -> str:
    """JSON with a line for each member of its outer objects, and long lists on one line."""
    if isinstance(data, Mapping) and data and depth < 3:
        lines = (f"{' ' * (depth + 1)}{json.dumps(key)}: {_json(value, depth + 1)}" for key, value in data.items())
        return "{\n" + ",\n".join(lines) + "\n" + " " * depth + "}"
    if isinstance(data, list) and data and isinstance(data[0], Mapping) and depth < 2:
        lines = (" " * (depth + 1) + _json(value, depth + 1) for value in data)
        return "[\n" + ",\n".join(lines) + "\n" + " " * depth + "]"
    return json.dumps(data, ensure_ascii=False)


def write_images(
    reader: "Reader",
    expressions: Sequence[str],
    folders: Sequence[Path],
    out: Path,
    *,
    legend: bool,
    progress: Progress,
) -> tuple[list[dict[str, Any]], str]:
    """overlay.mp4 and preview.png from the masks on disk.

    Returns:
      Areas, boxes and run-length codes of every expression; what the overlay lacks, if anything.
    """
    from virst_jax.io import visualize
    from virst_jax.io.video import VideoWriter, prefetch

    names, times = list(reader.frame_names), reader.times_of(range(reader.num_frames))
    strip = visualize.legend(expressions, reader.size[1])[: None if legend else 0]
    size = (reader.size[0] + len(strip), reader.size[1])
    shown = {round(i * (len(names) - 1) / max(1, SHEET_FRAMES - 1)) for i in range(SHEET_FRAMES)}
    sheet: list[np.ndarray] = []
    objects: list[dict[str, Any]] = [{"areas": [], "boxes": [], "rle": []} for _ in folders]

    def painted() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for name, frame in zip(names, reader):
            masks = np.stack([_read_mask(folder / f"{name}.png", reader.size) for folder in folders])
            yield masks, visualize.overlay(frame, masks)

    with (
        VideoWriter(out / OVERLAY, size, reader.fps, reader.format) as video,
        contextlib.closing(prefetch(painted(), 4)) as frames,
    ):
        for i, (masks, image) in enumerate(frames):
            video.write(np.concatenate([image, strip]), None if times is None else times[i])
            if i in shown:
                sheet.append(image)
            for record, mask in zip(objects, masks):
                _measure(record, mask)
            progress("overlay", i + 1, len(names))
    labels = [_label(names[i], None if times is None else times[i]) for i in sorted(shown)]
    with atomic.new_file(out / PREVIEW) as file:
        Image.fromarray(visualize.contact_sheet(sheet, labels, expressions)).save(file, format="PNG")
    return objects, video.sound_fault


def _label(name: str, time: float | None) -> str:
    return f"frame {name}" if time is None else f"frame {name}, {time:.2f} s"


def _measure(record: dict[str, Any], mask: np.ndarray) -> None:
    """Adds a frame's area, box and run-length code to those of an expression."""
    record["areas"].append(int(mask.sum()))
    record["boxes"].append(box_of(mask) if mask.any() else None)
    record["rle"].append({"size": list(mask.shape), "counts": encode_mask(mask)})


def _read_mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    try:
        with Image.open(path) as image:
            mask = np.asarray(image) > 0
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: the mask is missing or broken; run it again with --overwrite") from error
    if mask.shape != tuple(size):
        raise UserError(f"{path}: {mask.shape[1]}x{mask.shape[0]} pixels are not the video's; was it changed?")
    return mask
