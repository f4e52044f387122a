"""Scores masks that are there already: other systems' PNG folders, or an earlier evaluation's masks."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

from tqdm import tqdm

from virst_jax.data.samples import Video
from virst_jax.errors import UserError
from virst_jax.evaluation.benchmarks import Opened, VideoScores, protocol_of, score_davis_indexed, score_video
from virst_jax.evaluation.predictions import MaskReader, PngReader, StoredReader


@dataclass(frozen=True)
class Scoring:
    """How the masks of a folder are read and scored. Picklable."""

    folder: Path
    read_pred: MaskReader | None  # None: palette PNGs of Ref-DAVIS17, a picture for all objects

    def __call__(self, source: Opened, index: int) -> VideoScores:
        video = cast(Video, source[index])
        if self.read_pred is None:
            return score_davis_indexed(video, self.folder)
        return score_video(source, video, self.read_pred)


def open_predictions(source: Opened, folder: Path) -> Scoring:
    """Finds out what lies in `folder`: FOLDER/masks of eval.py, anno_0..3 of Ref-DAVIS17, or PNGs.

    Raises:
      UserError: there is no such folder, or it is empty.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder that holds VIDEO/EXPRESSION/FRAME.png")
    if (folder / "settings.json").is_file() and (folder / "masks").is_dir():
        return Scoring(folder, StoredReader(str(folder / "masks")))
    if protocol_of(source.name, False) == "ref_davis17" and (folder / "anno_0").is_dir():
        return Scoring(folder, None)
    if not any(folder.iterdir()):
        raise UserError(f"{folder}: is empty; give the folder that holds VIDEO/EXPRESSION/FRAME.png")
    return Scoring(folder, PngReader(str(folder)))


def score_existing(
    source: Opened, scoring: Scoring, *, workers: int = 0, progress: bool = True
) -> tuple[list[VideoScores], dict[str, str]]:
    """Scores of all videos, in the order of their names, and what went wrong, by video.

    Args:
      workers: processes that score; 0: this one does. The scores do not depend on it.
    """
    order = sorted((name, index) for index, name in enumerate(source.names))
    scores: dict[str, VideoScores] = {}
    errors: dict[str, str] = {}
    with tqdm(total=len(order), desc="scoring", unit="video", disable=None if progress else True) as bar:
        for name, result in _results(source, scoring, order, workers):
            try:
                scores[name] = result()
            except (UserError, OSError) as error:
                errors[name] = " ".join(str(error).split())
                tqdm.write(f"video {name}: {errors[name]}")
            bar.update()
    return [scores[name] for name, _ in order if name in scores], errors


Result = Callable[[], VideoScores]


def _results(
    source: Opened, scoring: Scoring, order: list[tuple[str, int]], workers: int
) -> Iterator[tuple[str, Result]]:
    if workers < 1:
        for name, index in order:
            yield name, partial(scoring, source, index)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, max(len(order), 1)), context, _start, (source, scoring)) as pool:
        names = {pool.submit(_score, index): name for name, index in order}
        try:
            for future in as_completed(names):
                yield names[future], future.result
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_STATE: tuple[Opened, Scoring] | None = None  # of a worker


def _start(source: Opened, scoring: Scoring) -> None:
    global _STATE
    _STATE = source, scoring


def _score(index: int) -> VideoScores:
    assert _STATE is not None
    source, scoring = _STATE
    return scoring(source, index)
