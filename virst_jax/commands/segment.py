"""`virst segment`: masks of a video as images, an overlay, a contact sheet and a table of results.

OUT/<number>-<name>/<frame>.png   0 and 255, of the video's size; one folder an expression, numbered from 01
OUT/soft/<the same>               with --soft, probabilities of 0 to 255
OUT/overlay.mp4                   the video with every expression in its colour, and a legend
OUT/preview.png                   a few frames of it
OUT/result.json                   expressions, scores, areas, boxes, run-length codes, frames, times, versions
OUT/.virst/                       what --resume needs: the run's settings, and the tracker's state until it is through
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from virst_jax.commands import _common, segment_results
from virst_jax.commands.progress import Progress, Tell
from virst_jax.commands.segment_run import SegmentRun, claimed
from virst_jax.errors import UserError
from virst_jax.io import atomic, small_model, timeline

if TYPE_CHECKING:
    from virst_jax.api import Model
    from virst_jax.inference.shared_batches import StreamEncoder
    from virst_jax.inference.survey import Survey
    from virst_jax.io.reader import Reader

HELP = """Segment what sentences describe in a video, and write the masks.

OUT gets a folder of PNG masks (0 and 255) for each expression, overlay.mp4, preview.png and result.json.
Without --model, the small model of this package answers, which knows moving coloured shapes and nothing else.

Many videos are segmented with one model, each into a folder of its own in OUT, where VIDEO is a folder of videos (or of
folders of frames), a pattern with * in quotes, or a list: a CSV file with the columns video, sentence and, if you like,
name, or a .jsonl file with an object of these on each line. A video that fails does not stop the others; results.csv
and results.json in OUT tell of each, and the exit status is 1 if one has failed."""
EXAMPLES = """examples:
  virst segment dog.mp4 "the dog" --model virst_7b --out masks
  virst segment dog.mp4 "the dog" "what does it chase?" --model virst_7b --dtype bfloat16 --out masks
  virst segment frames/ "the red car" --model virst_7b --fps 25 --every 2 --max-frames 100 --out masks
  virst segment dog.mp4 "the dog" --model virst_7b --out masks --resume       go on after an interruption
  virst segment "clips/*.mp4" "the dog" --model virst_7b --out masks          one model, many videos
  virst segment list.csv --model virst_7b --out masks"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", help=f"{_common.VIDEO_HELP}; or many: a folder of them, a pattern, a list")
    parser.add_argument("expressions", nargs="*", metavar="EXPRESSION", help="what to segment, in words")
    parser.add_argument("--out", type=Path, required=True, help="folder to write (see --resume and --overwrite)")
    _common.add_model_arguments(parser)
    _common.add_video_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of frames and wording (default: 0)")
    parser.add_argument("--exact", action="store_true", help="resize as the release does; encodes some frames twice")
    parser.add_argument(
        "--instances", action="store_true", help="an object of its own for each instance that a sentence means"
    )
    parser.add_argument("--soft", action="store_true", help="also write probabilities, as images of 0 to 255")
    parser.add_argument("--every", type=int, default=1, metavar="K", help="take every K-th frame")
    parser.add_argument("--max-frames", type=int, metavar="N", help="take N frames at most")
    parser.add_argument("--start", type=int, default=0, metavar="N", help="begin at frame N (default: 0)")
    parser.add_argument(
        "--concurrency",
        type=int,
        default=1,
        metavar="N",
        help="of many videos, work on N at the same time; their frames share the encoder's batches (default: 1)",
    )
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a timeline for ui.perfetto.dev to this file")
    parser.add_argument("--end", type=int, metavar="N", help="end with frame N (default: the video's last)")
    add_output_arguments(parser)


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """What is written, and whether over what is there."""
    parser.add_argument(
        "--no-legend", action="store_true", help="write overlay.mp4 in the video's size, without legend"
    )
    going_on = parser.add_mutually_exclusive_group()
    going_on.add_argument("--resume", action="store_true", help="go on with what an interrupted run has left in OUT")
    going_on.add_argument("--overwrite", action="store_true", help="remove what another run has written to OUT")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress, no notes")


def run(args: argparse.Namespace) -> int:
    from virst_jax.commands import segment_many, video_list

    for text in args.expressions:
        if video_list.looks_like_video(text):
            raise UserError(
                f"{text}: looks like a second video where a sentence is expected; for many videos give their folder, a "
                "pattern in quotes ('clips/*.mp4'), or a list"
            )
    if args.concurrency < 1:
        raise UserError(f"--concurrency {args.concurrency}: give 1 video or more")
    items = video_list.find_items(args.video, args.expressions)
    with timeline.recorded(args.trace):
        if items is not None:
            return segment_many.run_many(args, items)
        result = run_segment(args, args.video, args.expressions)
    report(args, result)
    return 0


def run_segment(args: argparse.Namespace, video: str, expressions: Sequence[str]) -> dict[str, Any]:
    """Segments a video into the folder `args.out` and gives the result.

    Args:
      args: the options of `virst segment`.

    Raises:
      UserError: bad input, a folder that cannot be written or that another run holds, or a model that cannot be loaded.
    """
    from virst_jax.api import find_model
    from virst_jax.data.prompts import normalize_expression
    from virst_jax.inference.placement import device_context
    from virst_jax.inference.plan import Options
    from virst_jax.inference.resizing import make_resizer
    from virst_jax.inference.survey import take_survey
    from virst_jax.io import model_folder

    reader = open_reader(args, video)
    for text in expressions:
        normalize_expression(text)
    atomic.check_writable(args.out)
    notes = [small_model.NOTE] if small_model.is_small(args.model) and not getattr(args, "at_home", False) else []
    with claimed(args.out, resume=args.resume, overwrite=args.overwrite), Progress(quiet=args.quiet) as progress:
        for note in notes:
            if not args.quiet:
                _common.tell(f"note: {note}")
        # before the model, which may take minutes: a damaged video is told first
        cfg = model_folder.read_config(find_model(args.model))
        resize = make_resizer(args.resize, device_context(args.device))
        options = Options(args.seed, args.exact, still=reader.still)
        survey = take_survey(cfg, reader, options, progress, resize=resize)
        progress("load the model", 0, 0)
        model = _common.load_model(args)
        return segment_into(
            args, video, reader, expressions, args.out, model=model, notes=notes, progress=progress, survey=survey
        )


def open_reader(args: argparse.Namespace, video: str) -> "Reader":
    """A video, as far as the options take it."""
    from virst_jax.io.video import StridedReader, open_video

    reader = open_video(video, fps=args.fps, allow_damaged=args.allow_damaged)
    if (args.every, args.max_frames, args.start, args.end) == (1, None, 0, None):
        return reader
    return StridedReader(reader, args.every, args.max_frames, args.start, args.end)


def segment_into(
    args: argparse.Namespace,
    video: str,
    reader: "Reader",
    expressions: Sequence[str],
    out: Path,
    *,
    model: "Model",
    notes: Sequence[str],
    progress: Tell,
    survey: "Survey | None" = None,
    encoder: "StreamEncoder | None" = None,
) -> dict[str, Any]:
    """Segments a video into a folder that is claimed, and gives the result.

    Raises:
      UserError: bad input, or a folder of another run.
    """
    job = SegmentRun(
        model,
        reader,
        expressions,
        out,
        seed=args.seed,
        exact=args.exact,
        source=source_of(video),
        notes=notes,
        legend=not args.no_legend,
        device=args.device,
        overwrite=args.overwrite,
        progress=progress,
        survey=survey,
        encoder=encoder,
        instances=args.instances,
        soft=args.soft,
    )
    return job.run()


def report(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Prints per sentence whether and where something was found."""
    found = [{**row, "folder": str(args.out / row["folder"])} for row in segment_results.findings(result)]
    damaged = {"damaged_frames": result.get("damaged_frames", []), "cut": result.get("cut", False)}
    if args.json:
        told = {"out": str(args.out), "notes": result.get("notes", []), **damaged, "objects": found}
        print(json.dumps(told, indent=1, ensure_ascii=False))
        return
    if not args.quiet:
        for note in result.get("notes", []):
            if note != small_model.NOTE:  # that one was told at the start
                _common.tell(f"note: {note}")
    texts = [row["expression"] for row in found]
    for row in found:
        where = f"found in {row['frames_found']} of {row['frames']} frames" if row["frames_found"] else "not found"
        several = "object_id" in row and texts.count(row["expression"]) > 1
        number = f" ({row['object_id']})" if several else ""
        print(f"{row['expression']!r}{number}: {where}")
    for text in result.get("sentences", []):
        if text not in result["expressions"]:
            print(f"{text!r}: not found")
    if damaged["damaged_frames"] or damaged["cut"]:
        from virst_jax.io.video_file import ranges

        bad = f"frames {ranges(damaged['damaged_frames'])} are damaged" if damaged["damaged_frames"] else ""
        cut = "the file is cut short" if damaged["cut"] else ""
        _common.tell(f"note: {'; '.join(filter(None, (bad, cut)))}: their masks cannot be trusted")
    print(f"wrote {args.out}")
    sys.stdout.flush()


def source_of(given: str) -> dict[str, Any]:
    """What tells a video from another one: its path, size and a digest of its beginning and end."""
    import hashlib

    path = Path(given)
    digest = hashlib.blake2b(digest_size=16)
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if not f.name.startswith("."))
        for file in files:
            digest.update(f"{file.name}:{file.stat().st_size};".encode("utf-8", "surrogateescape"))
        return {"path": given, "files": len(files), "digest": digest.hexdigest()}
    size = path.stat().st_size
    with path.open("rb") as content:
        digest.update(content.read(1 << 20))
        content.seek(max(0, size - (1 << 20)))
        digest.update(content.read())
    return {"path": given, "bytes": size, "digest": digest.hexdigest()}
