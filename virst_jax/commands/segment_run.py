"""One run of `virst segment`: its folder is claimed for it alone, and it goes on where an earlier one stopped."""

import contextlib
import dataclasses
import importlib.metadata
import json
import shutil
import time
import unicodedata
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from virst_jax.commands import _common, interrupt, segment_results
from virst_jax.commands.progress import Tell
from virst_jax.errors import UserError
from virst_jax.io import atomic, lock, timeline
from virst_jax.io.json_files import read_json
from virst_jax.io.npz import read_npz
from virst_jax.io.result_folder import RESULT, read_whole
from virst_jax.io.shared_pass import SharedPass

if TYPE_CHECKING:
    from virst_jax.api import Model
    from virst_jax.inference.shared_batches import StreamEncoder
    from virst_jax.inference.survey import Survey
    from virst_jax.io.reader import Reader

STATE, SOFT = ".virst", "soft"
SAVE_SECONDS = 30.0  # between two saves of the tracker's state
PAINTED = 8  # frames that wait for the overlay at most
SETTINGS, TRACKER = "settings.json", "tracker.npz"


@contextlib.contextmanager
def claimed(out: Path, *, resume: bool = False, overwrite: bool = False) -> Iterator[None]:
    """Holds a folder for this run; it is made, and if nothing is written to it, it is removed again.

    Raises:
      UserError: another run is at work there, or it holds something that this run must not touch.
    """
    made = not out.exists()
    try:
        with lock.exclusive(out / STATE, shown=out):
            others = [entry.name for entry in out.iterdir() if entry.name != STATE]
            kept = [entry.name for entry in (out / STATE).iterdir() if entry.name != lock.LOCK]
            if others and not (kept or RESULT in others):
                asked = "so --overwrite leaves it alone; " if overwrite else ""
                raise UserError(f"{out}: holds files that virst segment has not written; {asked}choose another folder")
            if resume and not (out / STATE / SETTINGS).is_file() and (others or kept):
                raise UserError(f"{out}: holds no run to go on with; choose another folder, or --overwrite")
            if (others or kept) and not (resume or overwrite):
                raise UserError(
                    f"{out}: exists already; choose another folder, --resume to go on with it, or --overwrite to "
                    "replace it"
                )
            if kept:
                atomic.remove_leftovers(out, deep=True)
            yield
    finally:
        for folder in (out / STATE, out)[: 2 if made else 1]:  # only if they are empty
            with contextlib.suppress(OSError):
                folder.rmdir()


def clear_folder(out: Path) -> None:
    """Removes what an earlier run has left in a folder that is claimed."""
    for entry in [*out.iterdir(), *(out / STATE).iterdir()]:
        if entry.name in (STATE, lock.LOCK):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


class SegmentRun:
    """Segments a video and writes the folder that virst_jax.commands.segment describes.

    Whatever stops it, the same run goes on from there.

    Args:
      reader: the video.
      out: a folder that is claimed.
      source: what tells the video from others, for going on and for the result.
      notes: for the result.
      legend: below the overlay.
      device: its name, for the result; None: JAX's default.
      overwrite: remove what an earlier run has left.
      survey: of the video with the same seed; None: it is taken when it is needed.
      encoder: its part of batches that several runs share; None: it shares none.
      instances: an object for each instance that an expression means. Tracking then begins again after a stop.
      soft: also write probabilities.

    Raises:
      UserError: bad expressions, or a folder of another run.
    """

    def __init__(
        self,
        model: "Model",
        reader: "Reader",
        expressions: Sequence[str],
        out: Path,
        *,
        seed: int = 0,
        exact: bool = False,
        source: Mapping[str, Any],
        notes: Sequence[str] = (),
        legend: bool = True,
        device: str | None = None,
        overwrite: bool = False,
        progress: Tell,
        survey: "Survey | None" = None,
        encoder: "StreamEncoder | None" = None,
        instances: bool = False,
        soft: bool = False,
    ):
        from virst_jax.inference.plan import Options
        from virst_jax.inference.texts import check_expressions

        self.instances, self.soft = instances, soft
        self.encoder = encoder
        self.survey, self.options = survey, Options(seed, exact, still=reader.still)
        self.model, self.reader, self.out, self.progress = model, reader, out, progress
        self.seed, self.exact, self.notes, self.legend = seed, exact, list(notes), legend
        self.overwrite, self.device = overwrite, device
        self.expressions = check_expressions(model.tokenizer, expressions)
        self.state_file = out / STATE / TRACKER
        self.settings = {
            "video": dict(source),
            "every": getattr(reader, "every", 1),
            "max_frames": getattr(reader, "max_frames", None),
            "start": getattr(reader, "start", 0) or None,  # as runs of earlier versions, which have none
            "end": getattr(reader, "end", None),
            "expressions": list(self.expressions),
            "seed": seed,
            "exact": exact,
            "instances": instances or None,
            "soft": soft or None,
            "model": {"name": model.name, "config": json.loads(json.dumps(dataclasses.asdict(model.cfg)))},
            "virst_jax": importlib.metadata.version("virst-jax"),
        }

    def run(self) -> dict[str, Any]:
        """Does what is left to do, and gives the content of result.json."""
        state = self._begin()
        finished = read_whole(self.out / RESULT)
        if finished is not None and segment_results.is_there(self.out, finished):
            return finished
        start = time.perf_counter()
        survey = self.survey or self._survey(pixels=state is None)
        names = list(self.reader.frame_names)
        with contextlib.ExitStack() as stack:
            frames = stack.enter_context(contextlib.closing(SharedPass(self.reader)))
            stream = stack.enter_context(
                self.model.segment_stream(
                    frames,
                    self.expressions,
                    seed=self.seed,
                    exact=self.exact,
                    still=self.reader.still,
                    instances=self.instances,
                    soft=self.soft,
                    progress=self.progress,
                    state=state,
                    survey=survey,
                    encoder=self.encoder,
                )
            )
            stream.prepare()  # how many instances there are
            folders = [self.out / f"{i:02d}-{slug(text)}" for i, text in zip(stream.object_ids, stream.labels)]
            for folder in folders:
                folder.mkdir(exist_ok=True)
                if self.soft:
                    (self.out / SOFT / folder.name).mkdir(parents=True, exist_ok=True)
            legend = [f"{text} ({i})" for i, text in zip(stream.object_ids, stream.labels)]
            images = stack.enter_context(
                segment_results.Images(
                    self.reader, legend if self.instances else stream.labels, self.out, legend=self.legend
                )
            )
            scores = _MaskFiles(stream, frames, images, folders, names, self.state_file).write(state)
        objects = images.objects
        self.notes += [images.lacking] if images.lacking else []
        timings = {**stream.timings, "overlay": images.seconds, "total": time.perf_counter() - start}
        for record, text, number, folder, row in zip(objects, stream.labels, stream.object_ids, folders, scores):
            record.update(expression=text, folder=folder.name, scores=[round(float(score), 4) for score in row])
            if self.instances:
                record["object_id"] = number
        result = self._result(names, stream.plan, timings, objects)
        segment_results.write(self.out / RESULT, result)
        self.state_file.unlink(missing_ok=True)
        return result

    def _survey(self, pixels: bool) -> "Survey":
        from virst_jax.inference.survey import take_survey

        with timeline.span("survey"):
            resize = self.model.network.resize
            return take_survey(self.model.cfg, self.reader, self.options, self.progress, pixels=pixels, resize=resize)

    def _begin(self) -> dict[str, np.ndarray] | None:
        """Compares what is there with this run, makes the folders, and gives the tracker's state, if any."""
        from virst_jax.inference import resume

        settings_file = self.out / STATE / SETTINGS
        if self.overwrite:
            clear_folder(self.out)
        if any(entry.name != STATE for entry in self.out.iterdir()) or settings_file.exists():
            _check_settings(self.out, settings_file, self.settings)
        for name in (RESULT, segment_results.OVERLAY, segment_results.PREVIEW):  # what is written last
            atomic.check_place(self.out / name)
        segment_results.write(settings_file, self.settings)
        if not self.state_file.exists():
            return None
        try:
            state = read_npz(self.state_file, "it is of no use")
            next_frame = resume.unpack(state, self.model.network.steps, len(self.expressions))[0]
            scores = state.get("scores")
            if next_frame and (scores is None or scores.shape != (len(self.expressions), next_frame)):
                raise UserError(f"{self.state_file}: holds no scores of {next_frame} frames")
        except UserError as error:
            _common.tell(f"note: {error} (tracking begins again)")
            return None
        return state

    def _result(self, names: Sequence[str], plan: Any, timings: Mapping[str, float], objects: list) -> dict[str, Any]:
        reader, model = self.reader, self.model
        numbers = list(getattr(reader, "numbers", range(len(names))))
        times = reader.times_of(range(len(names)))
        damaged = [numbers[i] for i in reader.damaged]
        return {
            **self.settings,
            "expressions": [record["expression"] for record in objects],
            "sentences": list(self.expressions),
            "model": {"name": model.name, "config": model.cfg.name, "dtype": model.cfg.compute.dtype},
            "notes": self.notes,
            "size": {"height": reader.size[0], "width": reader.size[1]},
            "fps": reader.fps,
            "frames": numbers,
            "frame_names": names,
            "times": None if times is None else [round(time, 6) for time in times],
            "damaged_frames": damaged,
            "lost_frames": reader.num_lost,
            "cut": reader.is_cut,
            "sampled_frames": [numbers[i] for i in plan.sampled],
            "segmentation_frames": [numbers[i] for i in plan.segmentation],
            "anchors": [numbers[i] for i in plan.anchor_frames],
            "timings": {stage: round(seconds, 3) for stage, seconds in timings.items()},
            "versions": _common.versions(self.device),
            "objects": objects,
        }


def slug(text: str, length: int = 40) -> str:
    """A folder's name for an expression: its letters and digits, of any script, joined by "-"."""
    kept = [c if unicodedata.category(c)[0] in "LMN" else " " for c in unicodedata.normalize("NFC", text.lower())]
    words = "-".join("".join(kept).split())[:length]
    while len(words.encode()) > 180:  # file systems hold 255 bytes
        words = words[:-1]
    return words.rstrip("-") or "expression"


def write_mask(path: Path, mask: np.ndarray) -> None:
    """Writes bool[H, W] as a PNG of 0 and 255, which appears whole."""
    write_grey(path, mask.astype(np.uint8) * 255)


def write_grey(path: Path, image: np.ndarray) -> None:
    """Writes uint8[H, W] as a PNG, which appears whole."""
    with timeline.span("write PNG"), atomic.new_file(path) as file:
        Image.fromarray(image).save(file, format="PNG", compress_level=3)


class _MaskFiles:
    """Writes a stream's masks by several threads, the overlay by one, and the tracker's state from time to time.

    Args:
      frames: the pass over the video from which the stream reads.
    """

    def __init__(
        self,
        stream: Any,
        frames: SharedPass,
        images: segment_results.Images,
        folders: Sequence[Path],
        names: Sequence[str],
        state_file: Path,
    ):
        self.stream, self.frames, self.images = stream, frames, images
        self.folders, self.names, self.state_file = folders, names, state_file
        self.scores: list[np.ndarray] = []
        self.writing: list[Future[None]] = []
        self.painting: deque[Future[None]] = deque()

    def write(self, state: Mapping[str, np.ndarray] | None) -> np.ndarray:
        """All scores float32[N, T]. Whatever stops it, the state is saved."""
        self.scores = [] if state is None else list(state["scores"].T[: self.stream.first])
        for i in range(self.stream.first):  # an earlier run has their masks
            interrupt.check()
            self.images.add(
                self.frames.take(i), segment_results.read_masks(self.folders, self.names[i], self.frames.size)
            )
        saved = time.monotonic()
        with (
            ThreadPoolExecutor(max_workers=4, thread_name_prefix="png") as pool,
            ThreadPoolExecutor(max_workers=1, thread_name_prefix="overlay") as painter,
        ):
            try:
                for frame in self.stream:
                    interrupt.check()
                    self.scores.append(frame.scores)
                    for folder, mask in zip(self.folders, frame.masks):
                        path = folder / f"{self.names[frame.index]}.png"
                        self.writing.append(pool.submit(write_mask, path, mask))
                    if frame.soft is not None:
                        for folder, grey in zip(self.folders, frame.soft):
                            path = folder.parent / SOFT / folder.name / f"{self.names[frame.index]}.png"
                            self.writing.append(pool.submit(write_grey, path, grey))
                    # beside the device's work: what is done here keeps the next frames from being started
                    self.painting.append(painter.submit(self._paint, self.frames.take(frame.index), frame.masks))
                    while len(self.painting) > PAINTED:
                        self.painting.popleft().result()
                    self._wait(4 * len(self.folders))  # memory stays flat when the disk is slower than the tracker
                    if time.monotonic() - saved > SAVE_SECONDS:
                        self._save()
                        saved = time.monotonic()
                while self.painting:
                    self.painting.popleft().result()
                self._save()
            except BaseException:
                # a second error here must not hide the first
                with contextlib.suppress(Exception):
                    self._save()
                raise
        return np.stack(self.scores, axis=1)

    def _paint(self, image: np.ndarray, masks: np.ndarray) -> None:
        with timeline.span("overlay"):
            self.images.add(image, masks)

    def _wait(self, left: int) -> None:
        while len(self.writing) > left:
            self.writing.pop(0).result()

    def _save(self) -> None:
        self._wait(0)
        kept = self.stream.state()
        if int(kept["next"]):
            kept["scores"] = np.stack(self.scores[: int(kept["next"])], axis=1)
            atomic.write_npz(self.state_file, kept)


def _check_settings(out: Path, file: Path, settings: Mapping[str, Any]) -> None:
    try:
        before = read_json(file).object()
    except UserError as error:
        raise UserError(f"{error}; without it no run can go on: choose another folder, or --overwrite") from error

    def known(run: Mapping[str, Any]) -> dict[str, Any]:
        video = run.get("video")
        return {**run, "video": {k: v for k, v in video.items() if k != "path"} if isinstance(video, dict) else video}

    now, then = known(settings), known(before)
    other = sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key))
    if other:
        raise UserError(
            f"{out}: holds another run ({', '.join(other)} differ); give the same arguments, another folder, or "
            "--overwrite"
        )
