"""Evaluates a model on a data set: masks, then scores, of every video; restartable, by one process or many.

    OUT/settings.json                  what made the masks, and its fingerprint
    OUT/masks/VIDEO/EXPRESSION.json    masks, see predictions.py
    OUT/scores/VIDEO.json              scores of the video's expressions, with the checksums of the masks scored
    OUT/errors/VIDEO.json              why a video could not be finished
    OUT/report/                        see report.py

Every file appears whole and depends on its video and the settings alone, so neither the number of processes nor a
restart changes one. Processes share nothing but the folder: the one that finishes last writes the report.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import multiprocessing
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from tqdm import tqdm

from virst_jax.data.samples import Video
from virst_jax.errors import UserError
from virst_jax.evaluation.benchmarks import Opened, Summary, VideoScores, score_video, summarize
from virst_jax.evaluation.predictions import (
    StoredMasks,
    StoredReader,
    check_masks,
    folder_of,
    mask_file,
    read_masks,
    write_masks,
)
from virst_jax.io import atomic
from virst_jax.io.masks import encode_mask

Frame = tuple[int, np.ndarray, np.ndarray]  # number, masks bool[N, H, W], scores float[N]
# video, positions of its expressions -> all frames in order
Predict = Callable[[Video, Sequence[int]], Iterator[Frame]]


@dataclass(frozen=True)
class Outcome:
    """How an evaluation ended."""

    videos: int  # of the data set
    finished: int  # by any process
    errors: dict[str, str]  # by video, of any process
    scores: tuple[VideoScores, ...]  # of the finished videos whose masks are public, in the order of their names
    summary: Summary | None  # None: other processes are not done, or nothing could be scored
    computed: tuple[str, ...] = field(default=())  # videos that this call segmented

    @property
    def pending(self) -> int:
        """Videos that other processes have not finished."""
        return self.videos - self.finished - len(self.errors)


def fingerprint_of(settings: dict[str, Any]) -> str:
    """A hash of what determines the masks."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def evaluate(
    source: Opened,
    predict: Predict,
    out: Path,
    settings: dict[str, Any],
    *,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    overwrite: bool = False,
    progress: bool = True,
    after_video: Callable[[Video], None] | None = None,
) -> Outcome:
    """Segments and scores this process's share of the videos; the last process to finish sums up.

    What is there and sound is kept; what is damaged, or made for another text or size, is made again.

    Args:
      predict: gives the masks of a video's expressions, all together.
      settings: what determines the masks (model, seed, precision ...), as JSON.
      process_index, process_count: this process's number among those that share `out`.
      workers: processes that score; 0: this one does. Scores do not depend on it.
      overwrite: replace masks that were made with other settings.
      after_video: called when a video's masks are there.

    Raises:
      UserError: `out` holds results of other settings, or two videos share a name.
      OSError: the disk is full.
    """
    if not 0 <= process_index < process_count:
        raise UserError(f"process {process_index} of {process_count}: numbers go from 0 to {process_count - 1}")
    fingerprint = fingerprint_of(settings)
    _claim(out, settings, fingerprint, overwrite)
    order = _sorted_names(source)
    share = order[process_index::process_count]
    for name, _ in share:
        _file(out, "errors", name).unlink(missing_ok=True)

    computed = []
    scorer = _Scorer(source, out, fingerprint, workers)
    try:
        with tqdm(
            total=len(share),
            desc=f"{source.name} {source.split}".strip(),
            unit="video",
            disable=None if progress else True,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} videos [{elapsed}<{remaining}{postfix}]",
        ) as bar:
            for done, (name, index) in enumerate(share):
                bar.set_postfix_str(name, refresh=False)
                try:
                    video = source[index]
                    if not isinstance(video, Video):
                        raise UserError(
                            f"{source.name} holds questions, not videos to segment; choose another data set"
                        )
                    if _segment(video, predict, out / "masks", fingerprint, bar):
                        computed.append(name)
                    if after_video is not None:
                        after_video(video)
                    scorer.submit(name, index, video)
                except (UserError, OSError) as error:
                    _record(out, name, error)
                bar.n = done + 1
                bar.refresh()
            bar.set_postfix_str("scoring")
            scorer.finish()
    finally:
        scorer.close()
    return _conclude(source, out, fingerprint, [name for name, _ in order], tuple(computed))


def read_scores(out: Path, name: str, fingerprint: str | None = None) -> dict[str, Any] | None:
    """The file of a video's scores; None if it is missing, damaged or of another fingerprint."""
    try:
        data = json.loads(_file(out, "scores", name).read_text("utf-8"))
        sound = {"fingerprint", "masks", "public", "image", "rows", "objects"} <= data.keys()
    except (OSError, ValueError, AttributeError):
        return None
    return data if sound and fingerprint in (None, data["fingerprint"]) else None


def missing_expressions(video: Video, folder: Path, fingerprint: str | None = None) -> list[tuple[int, str]]:
    """Positions of the expressions whose stored masks are not there or not sound, and what is wrong with them."""
    missing = []
    for position, expression in enumerate(video.expressions):
        path = mask_file(folder, video.name, expression.id)
        try:
            wrong = check_masks(read_masks(path), video, position, fingerprint)
        except UserError as error:
            wrong = str(error)
        if wrong:
            missing.append((position, wrong))
    return missing


def _segment(video: Video, predict: Predict, folder: Path, fingerprint: str, bar: tqdm) -> bool:
    """Makes what is missing of a video's masks; whether there was any."""
    missing = [position for position, _ in missing_expressions(video, folder, fingerprint)]
    if not missing:
        return False
    # all expressions even if one is missing: the batch that a mask was computed in may show in its last bits
    everyone = range(len(video.expressions))
    counts: list[list[str]] = [[] for _ in everyone]
    scores: list[list[float]] = [[] for _ in everyone]
    before = bar.n
    with contextlib.closing(_checked(predict, video, everyone)) as frames:
        for frame, masks, presence in frames:
            for position in missing:
                counts[position].append(encode_mask(masks[position]))
                scores[position].append(float(presence[position]))
            bar.n = before + (frame + 1) / video.num_frames
            bar.update(0)
    for position in missing:
        expression = video.expressions[position]
        write_masks(
            folder,
            StoredMasks(
                video.name,
                expression.id,
                expression.text,
                fingerprint,
                video.size,
                tuple(counts[position]),
                tuple(scores[position]),
            ),
        )
    return True


def _checked(predict: Predict, video: Video, positions: Sequence[int]) -> Generator[Frame, None, None]:
    """What `predict` gives, if it is what it must be."""
    expected, shape = 0, (len(positions), *video.size)
    frames = predict(video, positions)
    try:
        for frame, masks, presence in frames:
            if frame != expected or masks.shape != shape:
                raise UserError(
                    f"video {video.name}: the model gave frame {frame} with masks {list(masks.shape)}, expected frame "
                    f"{expected} with {list(shape)}"
                )
            expected += 1
            yield frame, masks, presence
    finally:
        if isinstance(frames, Generator):
            frames.close()  # ends the threads that read ahead
    if expected != video.num_frames:
        raise UserError(f"video {video.name}: the model gave {expected} of {video.num_frames} frames")


_SOURCE: Opened | None = None  # of a scoring worker


def _start_worker(source: Opened) -> None:
    global _SOURCE
    _SOURCE = source


def _score_in_worker(index: int, masks: str) -> VideoScores:
    assert _SOURCE is not None
    return _score(_SOURCE, index, masks)


def _score(source: Opened, index: int, masks: str) -> VideoScores:
    return score_video(source, cast(Video, source[index]), StoredReader(masks))


class _Scorer:
    """Scores videos as their masks are made, here or in worker processes, and writes the files."""

    def __init__(self, source: Opened, out: Path, fingerprint: str, workers: int):
        self.source, self.out, self.fingerprint = source, out, fingerprint
        self.pool: ProcessPoolExecutor | None = None
        self.pending: dict[str, tuple[Future[VideoScores], Video, list[int]]] = {}
        if workers > 0:
            # "spawn": a fork would copy the threads' locks of the accelerator's runtime
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(workers, context, _start_worker, (source,))

    def submit(self, name: str, index: int, video: Video) -> None:
        folder = self.out / "masks"
        checksums = [read_masks(mask_file(folder, name, e.id)).checksum for e in video.expressions]
        known = read_scores(self.out, name, self.fingerprint)
        public = video.read_masks is not None
        if known is not None and known["masks"] == checksums and known["public"] == public:
            return
        if not public:
            self._write(video, checksums, None)
        elif self.pool is None:
            self._write(video, checksums, _score(self.source, index, str(folder)))
        else:
            self.pending[name] = (self.pool.submit(_score_in_worker, index, str(folder)), video, checksums)
            self._collect(wait=False)

    def finish(self) -> None:
        self._collect(wait=True)

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def _collect(self, wait: bool) -> None:
        for name, (future, video, checksums) in list(self.pending.items()):
            if wait or future.done():
                del self.pending[name]
                try:
                    self._write(video, checksums, future.result())
                except (UserError, OSError) as error:
                    _record(self.out, name, error)

    def _write(self, video: Video, checksums: list[int], scores: VideoScores | None) -> None:
        content = {
            "video": video.name,
            "image": video.is_image,
            "fingerprint": self.fingerprint,
            "masks": checksums,
            "public": scores is not None,
            **(scores or VideoScores(())).as_dict(),
        }
        atomic.write_bytes(
            _file(self.out, "scores", video.name),
            json.dumps(content, ensure_ascii=False, indent=1).encode(),
            parents=True,
        )


def _conclude(source: Opened, out: Path, fingerprint: str, names: list[str], computed: tuple[str, ...]) -> Outcome:
    """Sums up if every video is scored or has failed."""
    errors: dict[str, str] = {}
    scores: list[VideoScores] = []
    finished, images = 0, False
    for name in names:
        error = _file(out, "errors", name)
        data = None if error.is_file() else read_scores(out, name, fingerprint)
        if error.is_file():
            errors[name] = json.loads(error.read_text("utf-8"))["error"]
        elif data is not None:
            finished += 1
            images = data["image"]
            if data["public"]:
                scores.append(VideoScores.from_dict(data))
    summary = None
    if scores and finished + len(errors) == len(names):
        summary = summarize(source.name, source.split, images, scores)
    return Outcome(len(names), finished, errors, tuple(scores), summary, computed)


def _claim(out: Path, settings: dict[str, Any], fingerprint: str, overwrite: bool) -> None:
    path = out / "settings.json"
    if path.is_file() and not overwrite:
        try:
            before = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not readable ({error}); delete it to go on") from error
        if before.get("fingerprint") != fingerprint:
            old = before.get("settings", {})
            differ = [k for k in sorted({*old, *settings}) if old.get(k) != settings.get(k)]
            what = ", ".join(f"{k} {old.get(k)!r} then, {settings.get(k)!r} now" for k in differ[:3])
            raise UserError(f"{out}: holds results of other settings ({what}); choose another workdir, or overwrite")
    content = {"fingerprint": fingerprint, "settings": settings}
    atomic.write_bytes(path, json.dumps(content, sort_keys=True, indent=1).encode(), parents=True)


def _sorted_names(source: Opened) -> list[tuple[str, int]]:
    names = sorted((name, index) for index, name in enumerate(source.names))
    for (name, _), (following, _) in itertools.pairwise(names):
        if name == following:
            raise UserError(f"{source.name}: two videos are named {name!r}; names must differ")
    return names


def _record(out: Path, name: str, error: Exception) -> None:
    if isinstance(error, atomic.WriteError) or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
        raise error
    text = " ".join(str(error).split())
    tqdm.write(f"video {name}: {text}")
    atomic.write_bytes(
        _file(out, "errors", name), json.dumps({"video": name, "error": text}, indent=1).encode(), parents=True
    )


def _file(out: Path, kind: str, name: str) -> Path:
    path = folder_of(out / kind, name)
    return path.with_name(path.name + ".json")
