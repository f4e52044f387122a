"""`virst export`: a result of `virst segment` or `virst track` in the forms that other programs read."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from virst_jax.commands import segment_results
from virst_jax.errors import UserError

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
        given = args.video or result.get("video", {}).get("path")
        if given:
            video = open_video(given)
            every, most = result.get("every", 1), result.get("max_frames")
            video = StridedReader(video, every, most) if every != 1 or most is not None else video
    print(f"wrote {exports.export(args.format, masks, args.out, video)}")
    return 0


def read_result(folder: Path) -> dict[str, Any]:
    """The result in a folder.

    Raises:
      UserError: there is none, or it is not whole.
    """
    result = segment_results.read(folder / "result.json")
    if result is None:
        raise UserError(f"{folder}: holds no whole result.json; give a folder that virst segment or virst track wrote")
    return result


def mask_set(result: dict[str, Any]) -> Any:
    """The masks of a result, which are decoded frame by frame.

    Raises:
      UserError: damaged run-length codes, when they are read.
    """
    from virst_jax.io.exports import MaskSet
    from virst_jax.io.masks import decode_mask

    size = (int(result["size"]["height"]), int(result["size"]["width"]))
    objects = result["objects"]

    def masks(frame: int) -> np.ndarray:
        found = [decode_mask(x["rle"][frame], size, f"result.json, {x['expression']!r}") for x in objects]
        return np.stack(found) if found else np.zeros((0, *size), bool)

    return MaskSet(
        Path(result.get("video", {}).get("path") or "video").stem,
        list(result["expressions"]),
        [x.get("object_id", i + 1) for i, x in enumerate(objects)],
        result["frame_names"],
        size,
        float(result.get("fps") or 0),
        result.get("times"),
        [x["scores"] for x in objects],
        masks,
    )
