"""One's own videos without JSON: frames or videos, masks as images, and a table of sentences.

FOLDER/
  frames/VIDEO/FRAME.jpg       or videos/VIDEO.mp4, whose frames are named 00000, 00001, ...
  masks/VIDEO/FRAME.png        0 and 255, or the numbers of objects; one for each frame
  sentences.csv                video,sentence,object: what the sentence means; without a number, all that is not 0

A sentence with several objects ("both dogs") takes several numbers, with spaces between them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from virst_jax.data.datasets.files import image_files
from virst_jax.data.datasets.readers import BinaryMasks, LabelMasks, find_frames
from virst_jax.data.datasets.source import IndexedSource, Problem
from virst_jax.data.prompts import normalize_expression
from virst_jax.data.samples import Expression, Video
from virst_jax.errors import UserError
from virst_jax.io.images import SUFFIXES
from virst_jax.io.names import check_name, natural_key
from virst_jax.io.tables import read_table
from virst_jax.io.video import open_video

TABLE = "sentences.csv"
COLUMNS = ("video", "sentence", "object")


@dataclass(frozen=True)
class PlainRecord:
    """A video of the table."""

    name: str
    expressions: tuple[Expression, ...]
    objects: tuple[tuple[int, ...], ...]  # per expression; empty: all that is not 0


@dataclass(frozen=True)
class VideoFile:
    """Frames of a video file."""

    path: str

    def __call__(self, indices: Sequence[int]) -> np.ndarray:
        return open_video(self.path).read(list(indices))


@dataclass(frozen=True)
class PlainMasks:
    """Masks of which some expressions mean numbers and others all that is not 0."""

    labels: LabelMasks
    binary: BinaryMasks

    def __call__(self, position: int, indices: Sequence[int]) -> np.ndarray:
        return (self.labels if self.labels.values[position] else self.binary)(position, indices)


def open_plain(name: str, folder: Path, split: str) -> IndexedSource:
    """A folder in this layout.

    Raises:
      UserError: the table is missing or has other columns.
    """
    problems: list[Problem] = []
    records = _records(folder, problems)
    return IndexedSource(name, split, str(folder), tuple(records), partial(_video, str(folder)), tuple(problems))


def _records(folder: Path, problems: list[Problem]) -> list[PlainRecord]:
    file = folder / TABLE
    videos: dict[str, list[tuple[Expression, tuple[int, ...]]]] = {}
    for line, row in read_table(file, COLUMNS, ("video", "sentence")):
        where = f"{file}, line {line}"
        try:
            video, expression, objects = _row(row, where)
        except UserError as error:
            problems.append(Problem(where, str(error).removeprefix(f"{where}: "), "the line"))
            continue
        kept = videos.setdefault(video, [])
        kept.append((Expression(expression, str(len(kept))), objects))
    return [
        PlainRecord(video, tuple(e for e, _ in kept), tuple(objects for _, objects in kept))
        for video, kept in videos.items()
    ]


def _row(row: dict[str, str], where: str) -> tuple[str, str, tuple[int, ...]]:
    video = check_name(row["video"], f"{where}: the video")
    sentence = row["sentence"]
    normalize_expression(sentence)  # raises for what cannot be read
    stated = row.get("object", "").split()
    if not all(part.isascii() and part.isdecimal() and len(part) < 4 and 0 < int(part) < 255 for part in stated):
        raise UserError(f"{where}: the object is {' '.join(stated)[:40]!r}; give numbers from 1 to 254, or nothing")
    return video, sentence, tuple(int(part) for part in stated)


def _video(root: str, record: PlainRecord) -> Video:
    """The sample of a record; reads the header of the first frame, or counts the frames of a video file.

    Raises:
      UserError: there is neither a folder of frames nor a video of this name, or it has no frames.
    """
    folder = Path(root)
    if (folder / "frames" / record.name).is_dir():
        names = sorted(image_files(folder / "frames" / record.name), key=natural_key)
        if not names:
            raise UserError(f"{folder / 'frames' / record.name}: holds no images ({', '.join(SUFFIXES)})")
        frames = find_frames(folder / "frames", record.name, names)
        size, read, shown = frames.size(), frames, frames.names
    else:
        found = sorted(f for f in (folder / "videos").glob("*") if f.is_file() and f.stem == record.name)
        if len(found) != 1:
            many = f"holds {found[0].name} and {found[1].name}" if found else "there is no such video"
            raise UserError(f"{folder / 'videos' / record.name}: {many}; give one, or a folder of frames in frames/")
        reader = open_video(found[0])
        size, read = reader.size, VideoFile(str(found[0]))  # type: ignore[assignment]
        shown = tuple(f"{i:05d}" for i in range(reader.num_frames))
    masks = folder / "masks" / record.name
    read_masks = None
    if (folder / "masks").is_dir():
        labels = LabelMasks(str(masks), shown, record.objects, size, of_objects=True)
        read_masks = PlainMasks(labels, BinaryMasks((str(masks),) * len(record.objects), shown, size))
    return Video(record.name, len(shown), size, record.expressions, read, read_masks, shown)
