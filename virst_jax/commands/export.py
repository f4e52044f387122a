"""`virst export`: a result of `virst segment` or `virst track` in the forms that other programs read."""

import argparse
from pathlib import Path

HELP = """Write a result of `virst segment` or `virst track` in the form that another program reads.

coco        COCO's JSON: frames are images, objects have run-length codes, track_id joins an object's frames
coco-video  YouTube-VIS's JSON: one video, an annotation for each object
yolo        Ultralytics' text files of outlines, a line for each object, and data.yaml
davis       palette images of object numbers
png-ids     grey images of object numbers
webm-alpha  the video where objects are, transparent elsewhere (VP9); needs the video
prores      likewise in ProRes 4444 (.mov)
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
    from virst_jax.io.result_folder import mask_set, read_result, video_path
    from virst_jax.io.video import StridedReader, open_video

    result = read_result(args.result)
    masks = mask_set(result)
    video = None
    if args.format in exports.NEED_VIDEO:
        given = args.video or video_path(result)
        if given:
            lowest = {"every": 1, "max_frames": 1, "start": 0, "end": 0}
            taken = {k: result[k].integer(low) for k, low in lowest.items() if result[k].value is not None}
            video = open_video(given)
            video = StridedReader(video, **taken) if taken else video
    print(f"wrote {exports.export(args.format, masks, args.out, video)}")
    return 0
