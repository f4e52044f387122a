"""What a run of `virst segment` leaves beside the masks: overlay, preview, and the table of results."""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from virst_jax.commands.progress import Progress
from virst_jax.errors import UserError
from virst_jax.io import atomic
from virst_jax.io.exports import box_of
from virst_jax.io.masks import encode_mask

if TYPE_CHECKING:
    from virst_jax.io.reader import Reader

OVERLAY, PREVIEW = "overlay.mp4", "preview.png"
SHEET_FRAMES = 8
MOST_NAMED = 24  # objects in a legend: the names of more would hide the images


def is_there(out: Path, result: Mapping[str, Any]) -> bool:
    """Whether all files that a result speaks of are in its folder."""
    masks = (f"{record['folder']}/{name}.png" for record in result["objects"] for name in result["frame_names"])
    return all((out / name).is_file() for name in (OVERLAY, PREVIEW, *masks))


def findings(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of every expression, its folder and in how many frames it was found."""
    return [
        {
            **({"object_id": record["object_id"]} if "object_id" in record else {}),
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


class Images:
    """overlay.mp4 and preview.png, and what of the masks goes into the result; they appear when the block ends.

    Args:
      reader: the video, whose frames are counted.
      out: the folder.
      legend: below the overlay.

    Attributes:
      objects: areas, boxes and run-length codes of every expression.
      lacking: what the overlay lacks, if anything.
      seconds: that the work took.
    """

    def __init__(self, reader: "Reader", expressions: Sequence[str], out: Path, *, legend: bool):
        from virst_jax.io import visualize
        from virst_jax.io.video import VideoWriter

        self._visualize, self._out = visualize, out
        self._named = expressions if len(expressions) <= MOST_NAMED else ()
        self._names, self._times = list(reader.frame_names), reader.times_of(range(reader.num_frames))
        self._strip = visualize.legend(self._named, reader.size[1])[: None if legend and self._named else 0]
        size = (reader.size[0] + len(self._strip), reader.size[1])
        last = len(self._names) - 1
        self._shown = {round(i * last / max(1, SHEET_FRAMES - 1)) for i in range(SHEET_FRAMES)}
        self._sheet: list[np.ndarray] = []
        self._count, self.lacking, self.seconds = 0, "", 0.0
        self.objects: list[dict[str, Any]] = [{"areas": [], "boxes": [], "rle": []} for _ in expressions]
        self._video = VideoWriter(out / OVERLAY, size, reader.fps, reader.format)

    def add(self, frame: np.ndarray, masks: np.ndarray) -> None:
        """The next frame uint8[H, W, 3], and its masks bool[N, H, W]."""
        start = time.perf_counter()
        image = self._visualize.overlay(frame, masks)
        number = self._count
        self._video.write(np.concatenate([image, self._strip]), None if self._times is None else self._times[number])
        if number in self._shown:
            self._sheet.append(image)
        for record, mask in zip(self.objects, masks):
            _measure(record, mask)
        self._count += 1
        self.seconds += time.perf_counter() - start

    def __enter__(self) -> "Images":
        self._video.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._video.__exit__(kind, error, trace)
        if kind is not None:
            return
        self.lacking = self._video.sound_fault
        labels = [_label(self._names[i], None if self._times is None else self._times[i]) for i in sorted(self._shown)]
        with atomic.new_file(self._out / PREVIEW) as file:
            sheet = self._visualize.contact_sheet(self._sheet, labels, self._named)
            Image.fromarray(sheet).save(file, format="PNG")


def write_images(
    reader: "Reader",
    expressions: Sequence[str],
    folders: Sequence[Path],
    out: Path,
    *,
    legend: bool,
    progress: Progress,
) -> tuple[list[dict[str, Any]], str]:
    """As `Images`, from the masks on disk and one more pass over the video.

    Returns:
      Areas, boxes and run-length codes of every expression; what the overlay lacks, if anything.
    """
    from virst_jax.io.video import prefetch

    names = list(reader.frame_names)

    def read() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for name, frame in zip(names, reader):
            yield frame, read_masks(folders, name, reader.size)

    with (
        Images(reader, expressions, out, legend=legend) as images,
        contextlib.closing(prefetch(read(), 4)) as frames,
    ):
        for i, (frame, masks) in enumerate(frames, 1):
            images.add(frame, masks)
            progress("overlay", i, len(names))
    return images.objects, images.lacking


def read_masks(folders: Sequence[Path], name: str, size: tuple[int, int]) -> np.ndarray:
    """The masks bool[N, H, W] of a frame that are on disk.

    Raises:
      UserError: one is missing, broken, or of another size.
    """
    return np.stack([_read_mask(folder / f"{name}.png", size) for folder in folders])


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
