"""Scores masks that are there already: other systems' PNG folders, or an earlier evaluation's masks."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from tqdm import tqdm

from virst_jax.data.samples import Video
from virst_jax.errors import UserError
from virst_jax.evaluation.benchmarks import Opened, VideoScores, protocol_of, score_davis_indexed, score_video
from virst_jax.evaluation.predictions import MaskReader, PngReader, StoredReader
from virst_jax.evaluation.workers import Result, Workers, reason


@dataclass(frozen=True)
class Scoring:
    """How the masks of a folder are read and scored. Picklable."""

    folder: Path
    read_pred: MaskReader | None  # None: palette PNGs of Ref-DAVIS17, an image for all objects

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
    pool = Workers(source, scoring, min(workers, len(order)))
    with tqdm(total=len(order), desc="scoring", unit="video", disable=None if progress else True) as bar:

        def take(name: str, result: Result) -> None:
            try:
                scores[name] = result()
            except Exception as error:  # one bad video does not end the others
                errors[name] = reason(error)
                tqdm.write(f"video {name}: {errors[name]}")
            bar.update()

        try:
            for name, index in order:
                result = pool.submit(name, index)
                if result is not None:
                    take(name, result)
            for name, result in pool.results(wait=True):
                take(name, result)
        finally:
            pool.close()
    return [scores[name] for name, _ in order if name in scores], errors
