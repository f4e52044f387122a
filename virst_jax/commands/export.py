"""`virst export`: a result of `virst segment` or `virst track` in the forms that other programs read."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from virst_jax.commands import segment_results
from virst_jax.errors import UserError
from virst_jax.io.json_files import Json
from virst_jax.io.names import name_fault

if TYPE_CHECKING:
    from virst_jax.io.exports import MaskSet

MAX_SIDE = 1 << 16  # pixels of a video

HELP = """Write a result of `virst segment` or `virst track` in the form that another program reads.

coco        COCO's JSON: frames are images, objects have run-length codes, track_id joins an object's frames
coco-video  YouTube-VIS's JSON: one video, an annotation for each object
yolo        Ultralytics' text files of outlines, and data.yaml
davis       palette images of object numbers
png-ids     grey images of object numbers
webm-alpha  the video where objects are, transparent elsewhere (VP9); needs the video
alpha       images of 255 where objects are: a matte
csv         a table: score, area and box of each object on each frame"""
EXAMPLES = """examples:
  virst export masks --format coco --out masks_coco
  virst export masks --format webm-alpha --video dog.mp4 --out cut"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from virst_jax.io.exports import FORMATS

    parser.add_argument("result", type=Path, help="folder that virst segment or virst track has written")
    parser.add_argument("--format", required=True, choices=list(FORMATS), help="see above")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it must not exist")
    parser.add_argument("--video", help="the video that was segmented (default: where the result says it was)")


def run(args: argparse.Namespace) -> int:
    from virst_jax.io import exports
    from virst_jax.io.video import StridedReader, open_video

    result = read_result(args.result)
    masks = mask_set(result)
    video = None
    if args.format in exports.NEED_VIDEO:
        given = args.video or _video_path(result)
        if given:
            every, most = (
                None if result[key].value is None else result[key].integer(1) for key in ("every", "max_frames")
            )
            video = open_video(given)
            video = video if every is most is None else StridedReader(video, every or 1, most)
    print(f"wrote {exports.export(args.format, masks, args.out, video)}")
    return 0


def read_result(folder: Path) -> Json:
    """The result in a folder.

    Raises:
      UserError: there is none, or it is not whole.
    """
    file = folder / "result.json"
    result = segment_results.read(file)
    if result is None:
        raise UserError(f"{folder}: holds no whole result.json; give a folder that virst segment or virst track wrote")
    return Json(result, str(file))


def _video_path(result: Json) -> str:
    """Where the result says that its video was; empty if it does not."""
    video = result["video"]
    return "" if video.value is None or video["path"].value is None else video["path"].text()


def mask_set(result: Json) -> "MaskSet":
    """The masks of a result, which are decoded frame by frame.

    Raises:
      UserError: something in it is of another type or out of range, or, when they are read, damaged run-length codes.
    """
    from virst_jax.io.exports import MaskSet
    from virst_jax.io.masks import decode_mask

    size = (result["size"]["height"].integer(1, MAX_SIDE), result["size"]["width"].integer(1, MAX_SIDE))
    objects = list(result["objects"].elements())
    labels = [x["expression"].text() for x in objects]
    codes = [x["rle"].value for x in objects]
    names = [name.text() for name in result["frame_names"].elements()]
    times = None if result["times"].value is None else [time.number() for time in result["times"].elements()]
    if times is not None and len(times) != len(names):
        raise result["times"].expected(f"{len(names)} numbers")
    fps = 0.0 if result["fps"].value is None else result["fps"].number()

    def masks(frame: int) -> np.ndarray:
        found = [decode_mask(x[frame], size, f"{result.file}, {label!r}") for x, label in zip(codes, labels)]
        return np.stack(found) if found else np.zeros((0, *size), bool)

    name = Path(_video_path(result)).stem
    return MaskSet(
        "video" if name_fault(name) else name,
        labels,
        [x["object_id"].integer(1) if "object_id" in x else i + 1 for i, x in enumerate(objects)],
        names,
        size,
        max(fps, 0.0),
        times,
        [[None if score.value is None else score.number() for score in x["scores"].elements()] for x in objects],
        masks,
    )
