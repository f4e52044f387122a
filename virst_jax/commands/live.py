"""`virst live`: what sentences describe in frames as they come, from a camera, a pipe, or a network stream.

OUT/overlay.mp4    the frames that were computed, every expression in its colour, and a legend
OUT/boxes.ndjson   a line of JSON for each of these frames, written when the frame is done
OUT/result.json    the source, the settings, how many frames came and were dropped, latencies
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from virst_jax.commands import _common, interrupt
from virst_jax.commands.segment_run import SETTINGS, STATE, claimed, clear_folder
from virst_jax.errors import UserError
from virst_jax.io import atomic, small_model

if TYPE_CHECKING:
    from virst_jax.inference.live import LiveFrame, LiveStats, LiveStream

HELP = """Segment what sentences describe in frames as they come; each is seen once.

SOURCE is a camera (/dev/video0), - for a pipe, an address (rtsp://, http://, udp://), or a file. Every K frames the
sentences are read again on the last frames; those in between are tracked. OUT gets overlay.mp4, boxes.ndjson with a
line for each frame, and result.json; --stdout writes the lines, or the overlay as MPEG-TS, to the output. Ctrl-C ends
with whole files. Each sentence has one mask; --instances and --soft are for virst segment. Without --model, the small
model of this package answers, which knows moving coloured shapes and nothing else."""
EXAMPLES = """examples:
  virst live /dev/video0 "the cup" --model virst_7b --out cup
  ffmpeg -re -i dog.mp4 -f mpegts - | virst live - "the dog" --model virst_7b --out dog
  virst live rtsp://camera/stream "a person" --model virst_7b --stdout boxes | jq .objects
  virst live /dev/video0 "the cup" --model virst_7b --stdout overlay | ffplay -"""

OVERLAY, BOXES, RESULT = "overlay.mp4", "boxes.ndjson", "result.json"
STREAMS = ("boxes", "overlay")
WHOLE_VIDEO = {"--instances": "instances: each sentence has one mask", "--soft": "probabilities, only masks"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a camera, - for a pipe, an address, or a file")
    parser.add_argument("expressions", nargs="+", metavar="EXPRESSION", help="what to segment, in words")
    parser.add_argument("--out", type=Path, help="folder to write; without it, --stdout boxes")
    parser.add_argument("--stdout", choices=STREAMS, help="what to write to the output")
    parser.add_argument("--overwrite", action="store_true", help="remove what another run has written to OUT")
    _common.add_model_arguments(parser)
    parser.add_argument("--every", type=int, default=30, metavar="K", help="frames between readings (default: 30)")
    parser.add_argument("--window", type=int, metavar="N", help="frames that a reading looks back on (default: 4 K)")
    parser.add_argument(
        "--late",
        choices=["drop", "block"],
        help="frames that come too fast: leave out the oldest, or let the source wait (default: drop for cameras and "
        "addresses, else block)",
    )
    parser.add_argument("--room", type=int, default=4, metavar="N", help="frames that may wait (default: 4)")
    parser.add_argument("--max-frames", type=int, metavar="N", help="end after N frames")
    parser.add_argument("--seed", type=int, default=0, help="of the wording (default: 0)")
    parser.add_argument("--format", metavar="NAME", help="of the source, where FFmpeg cannot find it out: mjpeg, ...")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="for FFmpeg, such as video_size=1280x720 or framerate=30",
    )
    parser.add_argument("--quiet", action="store_true", help="no notes")
    for name in WHOLE_VIDEO:  # known, so that the error says what to do
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    for name, what in WHOLE_VIDEO.items():
        if getattr(args, name.removeprefix("--")):
            raise UserError(f"live streams have no {what}; record the video, then take virst segment {name}")
    if args.max_frames is not None and args.max_frames < 1:
        raise UserError(f"at most {args.max_frames} frames leave nothing; give 1 or more")
    options = dict(_option(text) for text in args.option)
    shown = args.stdout or (None if args.out else "boxes")
    if small_model.is_small(args.model) and not args.quiet:
        _common.tell(f"note: {small_model.NOTE}")
    with contextlib.ExitStack() as stack:
        if args.out:
            atomic.check_writable(args.out)
            stack.enter_context(claimed(args.out, overwrite=args.overwrite))
        stream = _common.load_model(args).live(
            args.source,
            args.expressions,
            every=args.every,
            window=args.window,
            late=args.late,
            room=args.room,
            seed=args.seed,
            format=args.format,
            options=options,
        )
        stack.enter_context(stream)
        if not args.quiet:
            _common.tell("the steps are compiled, then the source is opened ...")
        fps = stream.open().fps
        if args.out:
            if args.overwrite:
                clear_folder(args.out)
            atomic.write_json(args.out / STATE / SETTINGS, {"source": args.source})  # so that --overwrite knows it
        fault = _write(args, stream, fps, shown)
    if not args.quiet or fault:
        _common.tell(f"{stream.stats}{f'; wrote {args.out}' if args.out else ''}")
    if isinstance(fault, UserError):
        raise fault
    interrupt.check()
    return 0 if fault is None else 1


def _option(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise UserError(f"--option {text}: give KEY=VALUE")
    return key, value


def _write(args: argparse.Namespace, stream: "LiveStream", fps: float, shown: str | None) -> BaseException | None:
    """Writes all frames until the source ends or the command is told to; gives what ended it early, if anything."""
    sinks: list[Any] = []
    fault: BaseException | None = None
    with contextlib.ExitStack() as stack:
        if args.out:
            lines = stack.enter_context((args.out / BOXES).open("w", encoding="utf-8"))
            sinks += [_Lines(lines, stream.expressions), stack.enter_context(_Overlay(args.out / OVERLAY, stream, fps))]
        if shown == "boxes":
            sinks.append(_Lines(sys.stdout, stream.expressions))
        elif shown == "overlay":
            sinks.append(stack.enter_context(_Transport(stream, fps)))
        stack.enter_context(interrupt.gently(stream.stop))
        try:
            for frame in _first(stream, args.max_frames):
                for sink in sinks:
                    sink.add(frame)
        except UserError as error:  # the source broke off: what came before it is kept
            fault = error
        except BrokenPipeError as error:  # nobody reads our output any more
            fault = error
            stream.stop()
            _common.tell("nobody reads the output any more")
    if args.out:
        result = _result(args, stream, fps, fault)
        atomic.write_text(args.out / RESULT, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return fault


def _first(stream: "LiveStream", count: int | None) -> Iterator["LiveFrame"]:
    for number, frame in enumerate(stream, 1):
        yield frame
        if number == count:
            stream.stop()
            return


def _result(args: argparse.Namespace, stream: "LiveStream", fps: float, fault: BaseException | None) -> dict[str, Any]:
    return {
        "source": args.source,
        "fps": fps,
        "expressions": list(stream.expressions),
        "model": args.model,
        "every": args.every,
        "window": args.window,
        "late": args.late,
        "room": args.room,
        "seed": args.seed,
        **stats_of(stream.stats),
        "ended_by": None if fault is None else str(fault) or type(fault).__name__,
        "versions": _common.versions(args.device),
    }


def stats_of(stats: "LiveStats") -> dict[str, Any]:
    """For JSON; latencies in seconds."""
    there = stats.frames > 0
    return {
        "frames": stats.frames,
        "dropped": stats.dropped,
        "readings": stats.readings,
        "seconds": round(stats.seconds, 3),
        "latency": {
            name: round(getattr(stats, key), 4) if there else None
            for name, key in (("median", "p50"), ("95%", "p95"), ("longest", "longest"))
        },
    }


class _Lines:
    """A line of JSON for each frame, which is there as soon as the frame is done."""

    def __init__(self, file: IO[str], expressions: Sequence[str]):
        self._file, self._expressions = file, expressions

    def add(self, frame: "LiveFrame") -> None:
        self._file.write(json.dumps(line_of(frame, self._expressions), ensure_ascii=False) + "\n")
        self._file.flush()


def line_of(frame: "LiveFrame", expressions: Sequence[str]) -> dict[str, Any]:
    """What is told of a frame: boxes are [x, y, width, height] in pixels, null where nothing was found."""
    from virst_jax.io.exports import box_of

    return {
        "frame": frame.index,
        "time": None if frame.time is None else round(frame.time, 4),
        "latency": round(frame.latency, 4),
        "dropped": frame.dropped,
        "read": frame.is_reading,
        "objects": [
            {
                "expression": text,
                "score": round(float(score), 4),
                "area": int(mask.sum()),
                "box": box_of(mask) if mask.any() else None,
            }
            for text, mask, score in zip(expressions, frame.masks, frame.scores)
        ],
    }


class _Painter:
    """Frames with their masks, and a legend below."""

    def __init__(self, expressions: Sequence[str]):
        from virst_jax.io import visualize

        self._expressions, self._visualize = expressions, visualize
        self._strip: np.ndarray | None = None

    def paint(self, frame: "LiveFrame") -> np.ndarray:
        if self._strip is None:
            self._strip = self._visualize.legend(self._expressions, frame.image.shape[1])
        return np.concatenate([self._visualize.overlay(frame.image, frame.masks), self._strip])


class _Overlay(contextlib.AbstractContextManager["_Overlay"]):
    """overlay.mp4, which appears when the block ends."""

    def __init__(self, path: Path, stream: "LiveStream", fps: float):
        self._path, self._painter, self._fps = path, _Painter(stream.expressions), fps
        self._stack = contextlib.ExitStack()
        self._video: Any = None

    def add(self, frame: "LiveFrame") -> None:
        from virst_jax.io.video import VideoWriter

        image = self._painter.paint(frame)
        if self._video is None:
            size = (image.shape[0], image.shape[1])
            self._video = self._stack.enter_context(VideoWriter(self._path, size, self._fps))
        seconds = frame.time if frame.time is not None or not self._fps else frame.index / self._fps
        self._video.write(image, seconds)

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


class _Transport(contextlib.AbstractContextManager["_Transport"]):
    """The overlay as MPEG-TS on the output, which players show while it comes."""

    def __init__(self, stream: "LiveStream", fps: float):
        self._painter, self._fps = _Painter(stream.expressions), fps if fps > 0 else 25.0
        self._container: Any = None

    def add(self, frame: "LiveFrame") -> None:
        import av

        image = self._painter.paint(frame)
        image = image[: image.shape[0] // 2 * 2, : image.shape[1] // 2 * 2]
        if self._container is None:
            sys.stdout.flush()
            at_once = {"flush_packets": "1"}
            self._container = av.open(f"pipe:{sys.stdout.fileno()}", "w", format="mpegts", options=at_once)
            options = {"preset": "ultrafast", "tune": "zerolatency", "crf": "22"}
            rate = Fraction(self._fps).limit_denominator(1001)
            self._stream = self._container.add_stream("libx264", rate=rate, options=options)
            self._stream.height, self._stream.width, self._stream.pix_fmt = image.shape[0], image.shape[1], "yuv420p"
            self._base, self._last = Fraction(1, 90_000), -1
            self._stream.codec_context.time_base = self._base
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        seconds = frame.index / self._fps if frame.time is None else frame.time
        picture.pts = self._last = max(self._last + 1, round(seconds / self._base))
        picture.time_base = self._base
        self._container.mux(self._stream.encode(picture))

    def __exit__(self, kind: Any, *error: Any) -> None:
        if self._container is None:
            return
        with contextlib.suppress(OSError):  # nobody reads it
            if kind is None:
                self._container.mux(self._stream.encode(None))
            self._container.close()
