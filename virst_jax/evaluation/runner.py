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
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from tqdm import tqdm

from virst_jax.data.samples import Video
from virst_jax.errors import UserError, kind_of, printable
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
from virst_jax.evaluation.workers import Workers, reason
from virst_jax.io import atomic
from virst_jax.io.json_files import read_json
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
    exchange: Callable[[], None] = lambda: None,
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
      exchange: called when all this process's files are there, before it looks at those of others.

    Raises:
      UserError: `out` holds results of other settings, or two videos share a name.
      OSError: the disk is full.
    """
    if not 0 <= process_index < process_count:
        raise UserError(f"process {process_index} of {process_count}: numbers go from 0 to {process_count - 1}")
    fingerprint = fingerprint_of(settings)
    _claim(out, settings, fingerprint, overwrite)
    for kind in ("masks", "scores", "errors", "report", "Annotations"):
        atomic.remove_leftovers(out / kind, deep=True)  # of runs that were killed
    atomic.remove_leftovers(out)
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
                except Exception as error:  # one bad video does not end the others
                    _record(out, name, error)
                bar.n = done + 1
                bar.refresh()
            bar.set_postfix_str("scoring")
            scorer.finish()
    finally:
        scorer.close()
    exchange()
    return _conclude(source, out, fingerprint, [name for name, _ in order], tuple(computed))


@dataclass(frozen=True)
class StoredScores:
    """The file of a video's scores."""

    fingerprint: str
    masks: list[int]  # checksums of the masks that were scored
    public: bool  # whether the annotated masks are there
    image: bool
    scores: VideoScores


def read_scores(out: Path, name: str, fingerprint: str | None = None) -> StoredScores | None:
    """The file of a video's scores; None if it is missing, empty, damaged or of another fingerprint."""
    try:
        data = read_json(_file(out, "scores", name))
        stored = StoredScores(
            data["fingerprint"].text(),
            [crc.integer() for crc in data["masks"].elements()],
            data["public"].boolean(),
            data["image"].boolean(),
            VideoScores.from_json(data),
        )
    except UserError:
        return None
    return stored if fingerprint in (None, stored.fingerprint) else None


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


@dataclass(frozen=True)
class _ScoreStored:
    """Scores the stored masks of a video. Picklable."""

    masks: str

    def __call__(self, source: Opened, index: int) -> VideoScores:
        return score_video(source, cast(Video, source[index]), StoredReader(self.masks))


class _Scorer:
    """Scores videos as their masks are made, here or in worker processes, and writes the files."""

    def __init__(self, source: Opened, out: Path, fingerprint: str, workers: int):
        self.out, self.fingerprint = out, fingerprint
        self.pool = Workers(source, _ScoreStored(str(out / "masks")), workers)
        self.pending: dict[str, tuple[bool, list[int]]] = {}  # whether an image, and checksums of the masks

    def submit(self, name: str, index: int, video: Video) -> None:
        folder = self.out / "masks"
        checksums = [read_masks(mask_file(folder, name, e.id)).checksum for e in video.expressions]
        known = read_scores(self.out, name, self.fingerprint)
        public = video.read_masks is not None
        if known is not None and known.masks == checksums and known.public == public:
            return
        self.pending[name] = video.is_image, checksums
        if not public:
            self._write(name, None)
            return
        result = self.pool.submit(name, index)
        if result is not None:
            self._write(name, result())
        self._collect(wait=False)

    def finish(self) -> None:
        self._collect(wait=True)

    def close(self) -> None:
        self.pool.close()

    def _collect(self, wait: bool) -> None:
        for name, result in self.pool.results(wait):
            try:
                self._write(name, result())
            except Exception as error:  # one bad video does not end the others
                _record(self.out, name, error)

    def _write(self, name: str, scores: VideoScores | None) -> None:
        is_image, checksums = self.pending.pop(name)
        content = {
            "video": name,
            "image": is_image,
            "fingerprint": self.fingerprint,
            "masks": checksums,
            "public": scores is not None,
            **(scores or VideoScores(())).as_dict(),
        }
        text = json.dumps(content, ensure_ascii=False, indent=1)
        atomic.write_bytes(_file(self.out, "scores", name), text.encode(), parents=True)


def _conclude(source: Opened, out: Path, fingerprint: str, names: list[str], computed: tuple[str, ...]) -> Outcome:
    """Sums up if every video is scored or has failed."""
    errors: dict[str, str] = {}
    scores: list[VideoScores] = []
    finished, images = 0, False
    for name in names:
        error = _file(out, "errors", name)
        data = None if error.is_file() else read_scores(out, name, fingerprint)
        if error.is_file():
            errors[name] = _read_error(error)
        elif data is not None:
            finished += 1
            images = data.image
            if data.public:
                scores.append(data.scores)
    summary = None
    if scores and finished + len(errors) == len(names):
        summary = summarize(source.name, source.split, images, scores)
    return Outcome(len(names), finished, errors, tuple(scores), summary, computed)


def _claim(out: Path, settings: dict[str, Any], fingerprint: str, overwrite: bool) -> None:
    path = out / "settings.json"
    if path.is_file() and not overwrite:
        try:
            stored = read_json(path)
            before, old = stored["fingerprint"].text(), stored["settings"].object()
        except UserError as error:
            raise UserError(f"{error}; or delete it to go on") from error
        if before != fingerprint:
            differ = [k for k in sorted({*old, *settings}) if old.get(k) != settings.get(k)]
            what = ", ".join(f"{k} {_brief(old.get(k))} then, {_brief(settings.get(k))} now" for k in differ[:3])
            raise UserError(f"{out}: holds results of other settings ({what}); choose another workdir, or overwrite")
    content = {"fingerprint": fingerprint, "settings": settings}
    atomic.write_bytes(path, json.dumps(content, sort_keys=True, indent=1).encode(), parents=True)


def _brief(value: object) -> str:
    return repr(value)[:80] if isinstance(value, str | int | float | None) else kind_of(value)


def _read_error(path: Path) -> str:
    try:
        return read_json(path)["error"].text()
    except UserError as error:
        return f"failed; the reason is lost ({error})"


def _sorted_names(source: Opened) -> list[tuple[str, int]]:
    names = sorted((name, index) for index, name in enumerate(source.names))
    for (name, _), (following, _) in itertools.pairwise(names):
        if name == following:
            raise UserError(f"{source.name}: two videos are named {name!r}; names must differ")
    return names


def _record(out: Path, name: str, error: Exception) -> None:
    if isinstance(error, atomic.WriteError) or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
        raise error
    text = reason(error)
    tqdm.write(f"video {printable(name)}: {text}")
    content = json.dumps({"video": name, "error": text}, indent=1)
    atomic.write_bytes(_file(out, "errors", name), content.encode(), parents=True)


def _file(out: Path, kind: str, name: str) -> Path:
    path = folder_of(out / kind, name)
    return path.with_name(path.name + ".json")
