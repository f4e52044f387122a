"""`virst segment`: masks of a video as pictures, an overlay, a contact sheet and a table of results.

OUT/<number>-<slug>/<frame>.png   0 and 255, of the video's size; one folder an expression, numbered from 01
OUT/overlay.mp4                   the video with every expression in its colour, and a legend
OUT/preview.png                   a few frames of it
OUT/result.json                   expressions, scores, areas, boxes, run-length codes, frames, timings, versions
OUT/.virst/                       what --resume needs: the run's settings, and the tracker's state until it is through
"""

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import re
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from virst_jax.commands import interrupt
from virst_jax.commands.progress import Progress
from virst_jax.errors import UserError
from virst_jax.io import atomic

if TYPE_CHECKING:
    from virst_jax.api import Model
    from virst_jax.io.video import Reader

HELP = """Segment what sentences describe in a video, and write the masks.

OUT gets a folder of PNG masks (0 and 255) for each expression, overlay.mp4, preview.png and result.json."""
EXAMPLES = """examples:
  virst segment dog.mp4 "the dog" --out masks
  virst segment dog.mp4 "the dog" "what does it chase?" --model virst_7b --dtype bfloat16 --out masks
  virst segment frames/ "the red car" --every 2 --max-frames 100 --out masks
  virst segment dog.mp4 "the dog" --out masks --resume       go on after an interruption"""

STATE = ".virst"
SAVE_SECONDS = 30.0  # between two saves of the tracker's state
SHEET_FRAMES = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", help="a video file, a folder of frames, or a picture")
    parser.add_argument("expressions", nargs="+", metavar="EXPRESSION", help="what to segment, in words")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist (see --resume)")
    add_model_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of frames and wording (default: 0)")
    parser.add_argument("--exact", action="store_true", help="resize as the release does; encodes some frames twice")
    parser.add_argument("--every", type=int, default=1, metavar="K", help="take every K-th frame")
    parser.add_argument("--max-frames", type=int, metavar="N", help="take N frames at most")
    parser.add_argument("--resume", action="store_true", help="go on with what an interrupted run has left in OUT")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model and --dtype, which all commands that load a model share."""
    parser.add_argument("--model", default="tiny", help='model folder, or "tiny", which is in the package (default)')
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of parameters and activations")


def run(args: argparse.Namespace) -> int:
    run_segment(
        args.video,
        args.expressions,
        args.out,
        model=args.model,
        dtype=args.dtype,
        seed=args.seed,
        exact=args.exact,
        every=args.every,
        max_frames=args.max_frames,
        resume=args.resume,
        quiet=args.quiet,
    )
    print(f"wrote {args.out}")
    return 0


def run_segment(
    video: str,
    expressions: Sequence[str],
    out: Path,
    *,
    model: str = "tiny",
    dtype: str | None = None,
    seed: int = 0,
    exact: bool = False,
    every: int = 1,
    max_frames: int | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> None:
    """`segment_to_folder` for a video and a model by name, with a progress bar."""
    if out.exists() and not resume:
        raise UserError(f"{out}: exists already; choose another folder, or --resume to go on with it")
    from virst_jax.io.video import FRAME_SUFFIXES, StridedReader, open_video

    reader: Any = open_video(video)
    if every != 1 or max_frames is not None:
        reader = StridedReader(reader, every, max_frames)
    with Progress(quiet=quiet) as progress:
        progress("load the model", 0, 0)
        segment_to_folder(
            load_model(model, dtype),
            reader,
            expressions,
            out,
            seed=seed,
            exact=exact,
            resume=resume,
            still=Path(video).suffix.lower() in FRAME_SUFFIXES,
            source=_source(video),
            progress=progress,
        )


def load_model(name: str, dtype: str | None = None) -> "Model":
    """virst_jax.load, imported when it is needed."""
    from virst_jax import load

    return load(name, dtype=dtype)


def segment_to_folder(
    model: "Model",
    reader: "Reader",
    expressions: Sequence[str],
    out: Path,
    *,
    seed: int = 0,
    exact: bool = False,
    resume: bool = False,
    still: bool = False,
    source: Mapping[str, Any],
    progress: Progress,
) -> None:
    """Segments a video and writes the folder that this module describes; whatever stops it, --resume goes on.

    Args:
      still: a picture, not a video.
      source: what tells this video from others, for --resume and the result.

    Raises:
      UserError: bad input, or with `resume` a folder of another run.
    """
    from virst_jax.inference.texts import check_expressions

    expressions = check_expressions(model.tokenizer, expressions)
    settings = {
        "video": dict(source),
        "every": getattr(reader, "every", 1),
        "max_frames": getattr(reader, "max_frames", None),
        "expressions": list(expressions),
        "seed": seed,
        "exact": exact,
        "model": {"name": model.name, "config": json.loads(json.dumps(dataclasses.asdict(model.cfg)))},
        "virst_jax": importlib.metadata.version("virst-jax"),
    }
    kept = out / STATE
    settings_file, state_file = kept / "settings.json", kept / "tracker.npz"
    state: dict[str, np.ndarray] | None = None
    if out.exists() and any(out.iterdir()):
        _check_settings(out, settings_file, settings)
        if (out / "result.json").is_file():
            return
        if state_file.is_file():
            with np.load(state_file, allow_pickle=False) as arrays:
                state = dict(arrays)
    kept.mkdir(parents=True, exist_ok=True)
    _write_json(settings_file, settings)
    folders = [out / f"{i:02d}-{slug(text)}" for i, text in enumerate(expressions, 1)]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    names = list(reader.frame_names)
    start = time.perf_counter()
    with model.segment_stream(
        reader, expressions, seed=seed, exact=exact, still=still, progress=progress, state=state
    ) as stream:
        scores = _write_masks(stream, folders, names, state, state_file)
    timings = dict(stream.timings)
    before = time.perf_counter()
    objects = _write_pictures(reader, expressions, folders, names, out, progress)
    timings["overlay"] = time.perf_counter() - before
    timings["total"] = time.perf_counter() - start
    for record, text, folder, row in zip(objects, expressions, folders, scores):
        record.update(expression=text, folder=folder.name, scores=[round(float(score), 4) for score in row])
    numbers = list(getattr(reader, "numbers", range(len(names))))
    result = {
        **settings,
        "model": {"name": model.name, "config": model.cfg.name, "dtype": model.cfg.compute.dtype},
        "size": {"height": reader.size[0], "width": reader.size[1]},
        "fps": reader.fps,
        "frames": numbers,
        "frame_names": names,
        "sampled_frames": [numbers[i] for i in stream.plan.sampled],
        "segmentation_frames": [numbers[i] for i in stream.plan.segmentation],
        "anchors": [numbers[i] for i in stream.plan.anchor_frames],
        "timings": {stage: round(seconds, 3) for stage, seconds in timings.items()},
        "versions": versions(),
        "objects": objects,
    }
    _write_json(out / "result.json", result)
    state_file.unlink(missing_ok=True)


def slug(text: str, length: int = 40) -> str:
    """A folder's name for an expression: its ASCII letters and digits, joined by "-"."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
    return words[:length].rstrip("-") or "expression"


def versions() -> dict[str, str]:
    """What a result depends on."""
    import jax

    packages = ("virst-jax", "jax", "jaxlib", "flax", "numpy", "pillow", "av")
    device = jax.devices()[0]
    return {
        **{name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "device": f"{device.platform}: {device.device_kind}",
    }


def _source(given: str) -> dict[str, Any]:
    """What tells a video from another one: its path, size and a digest of its beginning and end."""
    path = Path(given)
    digest = hashlib.blake2b(digest_size=16)
    if path.is_dir():
        files = sorted(path.iterdir())
        for file in files:
            digest.update(f"{file.name}:{file.stat().st_size};".encode())
        size = len(files)
    else:
        size = path.stat().st_size
        with path.open("rb") as content:
            digest.update(content.read(1 << 20))
            content.seek(max(0, size - (1 << 20)))
            digest.update(content.read())
    return {"path": given, "bytes" if path.is_file() else "files": size, "digest": digest.hexdigest()}


def _check_settings(out: Path, file: Path, settings: Mapping[str, Any]) -> None:
    try:
        before = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{out}: holds no run to go on with; choose another folder") from error

    def known(run: Mapping[str, Any]) -> dict[str, Any]:
        return {**run, "video": {k: v for k, v in run.get("video", {}).items() if k != "path"}}

    now, then = known(settings), known(before)
    other = sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key))
    if other:
        raise UserError(
            f"{out}: holds another run ({', '.join(other)} differ); give the same arguments or another folder"
        )


def _write_masks(
    stream: Any, folders: Sequence[Path], names: Sequence[str], state: Mapping[str, np.ndarray] | None, file: Path
) -> np.ndarray:
    """Writes the masks as they come, and the state from time to time; returns all scores float32[N, T]."""
    scores = [] if state is None else list(state["scores"].T[: stream.first])
    writing: list[Future[None]] = []
    saved = time.monotonic()

    def flush(left: int) -> None:
        while len(writing) > left:
            writing.pop(0).result()

    def save() -> None:
        flush(0)
        kept = stream.state()
        if int(kept["next"]):
            kept["scores"] = np.stack(scores[: int(kept["next"])], axis=1)
            atomic.write_npz(file, kept)

    with ThreadPoolExecutor(max_workers=4, thread_name_prefix="png") as pool:
        try:
            for frame in stream:
                interrupt.check()
                scores.append(frame.scores)
                for folder, mask in zip(folders, frame.masks):
                    writing.append(pool.submit(write_mask, folder / f"{names[frame.index]}.png", mask))
                flush(4 * len(folders))  # memory stays flat when the disk is slower than the tracker
                if time.monotonic() - saved > SAVE_SECONDS:
                    save()
                    saved = time.monotonic()
            save()
        except BaseException:
            # a second error here must not hide the first
            with contextlib.suppress(Exception):
                save()
            raise
    return np.stack(scores, axis=1)


def write_mask(path: Path, mask: np.ndarray) -> None:
    """Writes bool[H, W] as a PNG of 0 and 255, which appears whole."""
    with atomic.new_file(path) as file:
        Image.fromarray(mask.astype(np.uint8) * 255).save(file, format="PNG", compress_level=3)


def _write_json(path: Path, data: Any) -> None:
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


def _write_pictures(
    reader: "Reader",
    expressions: Sequence[str],
    folders: Sequence[Path],
    names: Sequence[str],
    out: Path,
    progress: Progress,
) -> list[dict[str, Any]]:
    """overlay.mp4 and preview.png from the masks on disk; areas, boxes and run-length codes of every expression."""
    from virst_jax.io import visualize
    from virst_jax.io.masks import encode_mask
    from virst_jax.io.video import VideoWriter, prefetch

    strip = visualize.legend(expressions, reader.size[1])
    size = (reader.size[0] + len(strip), reader.size[1])
    shown = {round(i * (len(names) - 1) / max(1, SHEET_FRAMES - 1)) for i in range(SHEET_FRAMES)}
    sheet: list[np.ndarray] = []
    objects: list[dict[str, Any]] = [{"areas": [], "boxes": [], "rle": []} for _ in folders]

    def painted() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for name, frame in zip(names, reader):
            masks = np.stack([_read_mask(folder / f"{name}.png", reader.size) for folder in folders])
            yield masks, visualize.overlay(frame, masks)

    with (
        VideoWriter(out / "overlay.mp4", size, reader.fps) as video,
        contextlib.closing(prefetch(painted(), 4)) as frames,
    ):
        for i, (masks, image) in enumerate(frames):
            video.write(np.concatenate([image, strip]))
            if i in shown:
                sheet.append(image)
            for record, mask in zip(objects, masks):
                record["areas"].append(int(mask.sum()))
                record["boxes"].append(_box(mask))
                record["rle"].append({"size": list(mask.shape), "counts": encode_mask(mask)})
            progress("overlay", i + 1, len(names))
    labels = [f"frame {names[i]}" for i in sorted(shown)]
    with atomic.new_file(out / "preview.png") as file:
        Image.fromarray(visualize.contact_sheet(sheet, labels, expressions)).save(file, format="PNG")
    return objects


def _box(mask: np.ndarray) -> list[int] | None:
    """Left, top, width and height of what a mask shows."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    top, left = int(rows[0]), int(columns[0])
    return [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]


def _read_mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    try:
        with Image.open(path) as image:
            mask = np.asarray(image) > 0
    except (OSError, SyntaxError) as error:
        raise UserError(f"{path}: the mask is missing or broken; remove the output folder and run again") from error
    if mask.shape != tuple(size):
        raise UserError(f"{path}: {mask.shape[1]}x{mask.shape[0]} pixels are not the video's; was it changed?")
    return mask
