"""result.json, as `virst segment` and `virst track` write it, read with all that may be wrong with it.

Axes: N objects, T frames, H, W size.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from virst_jax.errors import UserError
from virst_jax.io.exports import MaskSet
from virst_jax.io.json_files import Json, read_json
from virst_jax.io.names import name_fault
from virst_jax.io.run_length_masks import RunLengthMasks

RESULT = "result.json"
MAX_SIDE = 1 << 16  # pixels of a video
_LISTS = ("expressions", "frames", "frame_names", "objects")


def read_whole(path: Path) -> dict[str, Any] | None:
    """The result of a run that is through; None if there is none, or the file is empty, cut or damaged."""
    try:
        result = read_json(path).value
        count = len(result["frames"])
        whole = all(isinstance(result[key], list) for key in _LISTS) and len(result["frame_names"]) == count
        objects = result["objects"]
        whole &= len(objects) == len(result["expressions"])
        whole &= all(len(record[key]) == count for record in objects for key in ("areas", "boxes", "rle", "scores"))
        whole &= all(isinstance(area, int) for record in objects for area in record["areas"])
        whole &= all(isinstance(record[key], str) for record in objects for key in ("expression", "folder"))
    except (UserError, KeyError, TypeError):
        return None
    return result if whole else None


def read_result(folder: Path) -> Json:
    """The result in a folder.

    Raises:
      UserError: there is none, or it is not whole.
    """
    file = folder / RESULT
    result = read_whole(file)
    if result is None:
        raise UserError(f"{folder}: holds no whole result.json; give a folder that virst segment or virst track wrote")
    return Json(result, str(file))


def video_path(result: Json) -> str:
    """Where the result says that its video was; empty if it does not."""
    video = result["video"]
    return "" if video.value is None or video["path"].value is None else video["path"].text()


def video_name(result: Json) -> str:
    """The video's name without suffix, for files; "video" if it has none that can name a file."""
    name = Path(video_path(result)).stem
    return "video" if name_fault(name) else name


def masks_of(result: Json) -> RunLengthMasks:
    """The masks, which are decoded when they are read.

    Raises:
      UserError: sizes or sentences that are none; when they are read: damaged run-length codes.
    """
    size = (result["size"]["height"].integer(1, MAX_SIDE), result["size"]["width"].integer(1, MAX_SIDE))
    objects = list(result["objects"].elements())
    labels = [x["expression"].text() for x in objects]
    codes = [x["rle"].value for x in objects]
    count = len(result["frame_names"])
    return RunLengthMasks(codes, count, size, lambda i: f"{result.file}, {labels[i]!r}")


def mask_set(result: Json) -> MaskSet:
    """The masks of a result as they are exported, decoded frame by frame.

    Raises:
      UserError: something in it is of another type or out of range, or, when they are read, damaged run-length codes.
    """
    masks = masks_of(result)
    names = [name.text() for name in result["frame_names"].elements()]
    return MaskSet(
        video_name(result),
        [x["expression"].text() for x in result["objects"].elements()],
        [x["object_id"].integer(1) if "object_id" in x else i + 1 for i, x in enumerate(result["objects"].elements())],
        names,
        (masks.shape[2], masks.shape[3]),
        frames_a_second(result),
        times_of(result, len(names)),
        scores_of(result),
        masks.frame,
    )


def frames_a_second(result: Json) -> float:
    """0: unknown. Raises UserError: it is no number."""
    return 0.0 if result["fps"].value is None else max(result["fps"].number(), 0.0)


def times_of(result: Json, count: int) -> list[float] | None:
    """Seconds of the frames; None: unknown. Raises UserError: no numbers, or not as many as frames."""
    if result["times"].value is None:
        return None
    times = [time.number() for time in result["times"].elements()]
    if len(times) != count:
        raise result["times"].expected(f"{count} numbers")
    return times


def scores_of(result: Json) -> list[list[float | None]]:
    """Of every object, of every frame; None: unknown. Raises UserError: something else."""
    return [
        [None if score.value is None else score.number() for score in record["scores"].elements()]
        for record in result["objects"].elements()
    ]


def plan_of(result: Json) -> Mapping[str, tuple[int, ...]]:
    """Places of the sampled, the segmentation and the anchor frames; empty of what `virst track` wrote.

    Raises:
      UserError: numbers that are no frames of the result.
    """
    place = {frame.integer(0): i for i, frame in enumerate(result["frames"].elements())}
    found = {}
    for key in ("sampled_frames", "segmentation_frames", "anchors"):
        given = result[key]
        numbers = [] if given.value is None else [number.integer(0) for number in given.elements()]
        if any(number not in place for number in numbers):
            raise given.expected("numbers of frames")
        found[key] = tuple(place[number] for number in numbers)
    return found


def as_scores(scores: list[list[float | None]], count: int) -> np.ndarray:
    """float32[N, T], nan where they are unknown."""
    rows = [[np.nan if x is None else x for x in row] for row in scores]
    return np.array(rows, np.float32).reshape(len(scores), count)
