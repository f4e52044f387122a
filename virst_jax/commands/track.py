"""`virst track`: objects that a person points at, tracked through a video.

OUT/<number>-<name>/<frame>.png   0 and 255, of the video's size; one folder an object
OUT/overlay.mp4, preview.png, result.json   as `virst segment` writes them
"""

import argparse
import contextlib
import importlib.metadata
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from virst_jax.commands import _common, everything, interrupt, segment, segment_results
from virst_jax.commands.progress import Progress
from virst_jax.commands.segment_run import RESULT, SETTINGS, STATE, claimed, clear_folder, slug, write_mask
from virst_jax.errors import UserError
from virst_jax.io import atomic, small_model

if TYPE_CHECKING:
    from virst_jax.inference.automatic import AutomaticOptions
    from virst_jax.inference.session import Session
    from virst_jax.io.reader import Reader

HELP = """Track objects through a video, or segment them in an image, from points, boxes and masks.

With --everything, the objects of an image are found without any of these: a grid of clicks is tried, and the masks
that are good, stable and different are kept, the surest first.

--object and --frame hold for the prompts behind them, until they are given again; without them, prompts are for object
1 and frame 0. Several prompts of an object on one frame are read together. Coordinates are pixels of the video,
counted from 0 at the top left. --model is a tracker that `virst convert --sam2` wrote, or a VIRST model, which also
reads sentences (--text)."""
EXAMPLES = """examples:
  virst track dog.mp4 --model sam2_large --point 120,340 --out masks
  virst track dog.mp4 --model sam2_large --point 120,340 --object 2 --frame 30 --box 10,20,200,180 --out masks
  virst track dog.mp4 --model sam2_large --mask first.png --frame 12 --out masks
  virst track dog.mp4 --model virst_7b --text "the dog" --object 1 --frame 40 --negative 300,80 --out masks
  virst track photo.jpg --model sam2_large --box 10,20,200,180 --out masks
  virst track photo.jpg --model sam2_large --everything --crop-layers 1 --out masks"""


@dataclass
class Given:
    """What was given for one object on one frame."""

    points: list[tuple[float, float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    box: tuple[float, ...] | None = None
    mask: Path | None = None


class _Prompt(argparse.Action):
    """Collects prompts in the order in which they are given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        kept = list(getattr(namespace, "prompts", None) or [])
        kept.append(((option_string or "").lstrip("-"), values))
        namespace.prompts = kept


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", help=_common.VIDEO_HELP)
    prompts = parser.add_argument_group("prompts")
    prompt: dict[str, Any] = {"action": _Prompt, "default": argparse.SUPPRESS}
    prompts.add_argument("--object", type=int, metavar="ID", help="what follows is for this object", **prompt)
    prompts.add_argument("--frame", type=int, metavar="N", help="what follows is on this frame", **prompt)
    prompts.add_argument("--point", metavar="X,Y", help="a point on the object", **prompt)
    prompts.add_argument("--negative", metavar="X,Y", help="a point beside the object", **prompt)
    prompts.add_argument("--box", metavar="X0,Y0,X1,Y1", help="a box around the object", **prompt)
    prompts.add_argument("--mask", type=Path, metavar="FILE", help="an image of the object's mask", **prompt)
    prompts.add_argument("--text", metavar="SENTENCE", help="a sentence that begins an object (VIRST models)", **prompt)
    parser.set_defaults(prompts=[])
    everything.add_arguments(parser)
    parser.add_argument("--start", type=int, metavar="N", help="where tracking begins (default: the first prompt)")
    parser.add_argument("--direction", choices=["forward", "backward", "both"], default="both", help="(default: both)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="first frame of the range (default: 0)")
    parser.add_argument("--last", type=int, metavar="N", help="last frame of the range (default: the video's)")
    parser.add_argument("--exclusive", action="store_true", help="masks of different objects do not overlap")
    parser.add_argument("--out", type=Path, required=True, help="folder to write (see --overwrite)")
    _common.add_model_arguments(parser)
    _common.add_video_arguments(parser)
    parser.add_argument("--no-legend", action="store_true", help="write overlay.mp4 in the video's size")
    parser.add_argument("--overwrite", action="store_true", help="remove what another run has written to OUT")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress, no notes")


def run(args: argparse.Namespace) -> int:
    from virst_jax.io.video import open_video

    options = everything.read_options(args)
    texts, given = read_prompts(args.prompts) if options is None else ({}, {})
    reader = open_video(args.video, fps=args.fps, allow_damaged=args.allow_damaged)
    atomic.check_writable(args.out)
    notes = [small_model.NOTE] if small_model.is_small(args.model) else []
    with claimed(args.out, overwrite=args.overwrite), Progress(quiet=args.quiet) as progress:
        for note in notes:
            if not args.quiet:
                _common.tell(f"note: {note}")
        progress("load the model", 0, 0)
        session = open_session(args, reader)
        if options is None:
            _add_prompts(session, texts, given, progress)
            result = _track(args, session, notes, progress)
        else:
            result = _find(args, session, options, notes, progress)
    segment.report(args, result)
    return 0


def read_prompts(prompts: Sequence[tuple[str, Any]]) -> tuple[dict[int, str], dict[tuple[int, int], Given]]:
    """Prompts in the order of the command line -> sentences by object, and the others by object and frame.

    Raises:
      UserError: none, or numbers that are none.
    """
    texts: dict[int, str] = {}
    given: dict[tuple[int, int], Given] = {}
    object_id, frame = 1, 0
    for kind, value in prompts:
        if kind == "object":
            object_id = value
        elif kind == "frame":
            frame = value
        elif kind == "text":
            if object_id in texts:
                raise UserError(f"object {object_id} has two sentences; give --object ID before the second")
            texts[object_id] = value
        else:
            _add_given(given.setdefault((object_id, frame), Given()), kind, value, f"object {object_id}, frame {frame}")
    if not texts and not given:
        raise UserError(
            "no prompt was given; add --point X,Y, --box X0,Y0,X1,Y1, --mask FILE or --text SENTENCE, or --everything"
        )
    return texts, given


def _add_given(place: Given, kind: str, value: Any, where: str) -> None:
    if kind == "mask":
        if place.mask is not None:
            raise UserError(f"{where}: two masks were given; give one")
        place.mask = value
    elif kind == "box":
        if place.box is not None:
            raise UserError(f"{where}: two boxes were given; give one, or another --object")
        place.box = _numbers(value, 4, "--box")
    else:
        x, y = _numbers(value, 2, f"--{kind}")
        place.points.append((x, y))
        place.labels.append(int(kind == "point"))


def _numbers(text: str, count: int, option: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != count:
        raise UserError(f"{option} {text}: give {count} numbers with commas between them, without spaces")
    return numbers


def open_session(args: argparse.Namespace, reader: "Reader") -> "Session":
    """A session of the model that the options name: a tracker alone or a VIRST model.

    Raises:
      UserError: no such model or device.
    """
    from virst_jax.io import tracker_folder

    if tracker_folder.is_tracker(args.model):
        from virst_jax import load_tracker

        tracker = load_tracker(
            args.model, dtype=args.dtype, device=args.device, check=not args.no_check, resize=args.resize
        )
        return tracker.session(reader, exclusive=args.exclusive)
    return _common.load_model(args).session(reader, exclusive=args.exclusive)


def _add_prompts(
    session: "Session", texts: Mapping[int, str], given: Mapping[tuple[int, int], Given], progress: Progress
) -> None:
    from virst_jax.inference.text_session import TextSession
    from virst_jax.io.mask_images import read_binary

    for _, frame in given:
        session.masks(frame)  # a frame that is not there shows before the work
    if texts:
        if not isinstance(session, TextSession):
            raise UserError("a tracker reads no sentences; leave --text out, or give a VIRST model with --model")
        session.add_text(list(texts.values()), object_ids=list(texts), progress=progress)
    for (object_id, frame), what in given.items():
        if what.mask is not None:
            session.add_mask(object_id, frame, read_binary(what.mask))
        if what.points or what.box is not None:
            # behind a mask, points correct it
            session.add_points(object_id, frame, what.points or None, what.labels or None, box=what.box)


@dataclass(frozen=True)
class _Shown:
    """What the result says of an object beside its masks."""

    object_id: int
    label: str
    scores: np.ndarray  # float32[T], nan: unknown
    more: Mapping[str, Any]

    def folder(self, out: Path) -> Path:
        return out / f"{self.object_id:02d}-{slug(self.label)}"


def _track(args: argparse.Namespace, session: "Session", notes: Sequence[str], progress: Progress) -> dict[str, Any]:
    """Tracks the objects of a session, and writes what was found."""
    reader, start = session.reader, time.perf_counter()
    passed = session.propagate(
        args.start, direction=args.direction, first=args.first, last=args.last, progress=progress
    )
    scores = np.full((len(session.labels), reader.num_frames), np.nan, np.float32)
    objects = [
        _Shown(object_id, label, row, {"anchors": list(session.anchors[object_id])})
        for (object_id, label), row in zip(session.labels.items(), scores)
    ]
    _begin(args, objects)
    with contextlib.closing(passed):
        for shown in passed:
            interrupt.check()
            scores[:, shown.index] = shown.scores
            _write(args, objects, reader.frame_names[shown.index], shown.masks)
    for index in np.flatnonzero(np.isnan(scores).all(0)).tolist():
        shown = session.masks(index)  # prompted outside of the range, or never reached
        scores[:, index] = shown.scores
        _write(args, objects, reader.frame_names[index], shown.masks)
    return _finish(args, reader, objects, notes, time.perf_counter() - start, progress)


def _find(
    args: argparse.Namespace,
    session: "Session",
    options: "AutomaticOptions",
    notes: Sequence[str],
    progress: Progress,
) -> dict[str, Any]:
    """Finds everything in the image of a session, and writes it."""
    reader, start = session.reader, time.perf_counter()
    found = everything.find(session, options, progress)
    objects = [
        _Shown(number, f"object {number}", np.array([x.predicted_iou], np.float32), everything.described(x))
        for number, x in enumerate(found, 1)
    ]
    _begin(args, objects)
    _write(args, objects, reader.frame_names[0], [x.mask for x in found])
    return _finish(args, reader, objects, notes, time.perf_counter() - start, progress)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    prompts = [[kind, str(value)] for kind, value in args.prompts]
    return {"video": segment.source_of(args.video), "prompts": prompts or [["everything", ""]]}


def _begin(args: argparse.Namespace, objects: Sequence[_Shown]) -> None:
    """Makes the folders of the masks."""
    if args.overwrite:
        clear_folder(args.out)
    for item in objects:
        item.folder(args.out).mkdir(exist_ok=True)
    (args.out / STATE).mkdir(exist_ok=True)
    segment_results.write(args.out / STATE / SETTINGS, _settings(args))


def _write(args: argparse.Namespace, objects: Sequence[_Shown], name: str, masks: Iterable[np.ndarray]) -> None:
    for item, mask in zip(objects, masks, strict=True):
        write_mask(item.folder(args.out) / f"{name}.png", mask)


def _finish(
    args: argparse.Namespace,
    reader: "Reader",
    objects: Sequence[_Shown],
    notes: Sequence[str],
    seconds: float,
    progress: Progress,
) -> dict[str, Any]:
    """Images of the masks that were written, and result.json."""
    start, names, labels = time.perf_counter(), list(reader.frame_names), [item.label for item in objects]
    records, lacking = segment_results.write_images(
        reader,
        labels,
        [item.folder(args.out) for item in objects],
        args.out,
        legend=not args.no_legend,
        progress=progress,
    )
    for record, item in zip(records, objects):
        rounded = [None if np.isnan(score) else round(float(score), 4) for score in item.scores]
        record.update(object_id=item.object_id, expression=item.label, folder=item.folder(args.out).name)
        record.update(scores=rounded, **item.more)
    times = reader.times_of(range(len(names)))
    result = {
        **_settings(args),
        "expressions": labels,
        "model": {"name": args.model},
        "virst_jax": importlib.metadata.version("virst-jax"),
        "notes": [*notes, *filter(None, [lacking])],
        "size": {"height": reader.size[0], "width": reader.size[1]},
        "fps": reader.fps,
        "frames": list(range(len(names))),
        "frame_names": names,
        "times": None if times is None else [round(t, 6) for t in times],
        "damaged_frames": list(reader.damaged),
        "cut": reader.is_cut,
        "timings": {"track": round(seconds, 3), "total": round(seconds + time.perf_counter() - start, 3)},
        "versions": _common.versions(args.device),
        "objects": records,
    }
    segment_results.write(args.out / RESULT, result)
    return result
