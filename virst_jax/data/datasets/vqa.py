"""Video question answering in LLaVA-Video's layout.

FOLDER/
  *_processed.json        [{"id": str, "video": "academic_source/.../NAME.mp4", "data_source": str,
                          "conversations": [{"from": "human" | "gpt", "value": str}]}]
  JPEGImages/academic_source/.../NAME/*.jpg     frames, in the order of their names

The release reads 0_30_s_academic_v0_1_cap_processed.json alone, the first question and answer of an entry, and its
frames in whatever order the file system lists them; here every turn is given and the frames are sorted. "<image>" is
taken out of the questions. Follows data/video_vqa_dataset.py of the release.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from virst_jax.data.datasets.files import find_folder, find_image, image_files
from virst_jax.data.datasets.readers import stack_frames
from virst_jax.data.datasets.source import IndexedSource, Problem, unknown_keys
from virst_jax.data.samples import Question
from virst_jax.errors import UserError
from virst_jax.io.json_files import Json, read_json
from virst_jax.io.names import check_name, find_entry, natural_key

SPLITS = ("train",)
_KEYS = frozenset({"id", "conversations", "data_source", "video", "image", "duration"})


@dataclass(frozen=True)
class _Record:
    name: str
    folder: str
    turns: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Frames:
    paths: tuple[str, ...]

    def path(self, index: int) -> str:
        return self.paths[index]

    def __call__(self, indices: Sequence[int]) -> np.ndarray:
        return stack_frames([self.path(i) for i in indices])


def open_vqa(root: Path, split: str) -> IndexedSource:
    """Questions about videos; all *_processed.json files of the folder together.

    Raises UserError: there is no such file, or it is not in this layout.
    """
    folder = find_folder(root, ("LLaVA-Video-178K/0_30_s_academic_v0_1", "0_30_s_academic_v0_1"), ("JPEGImages",))
    files = sorted(folder.glob("*_processed.json"))
    if not files:
        raise UserError(f"{folder}: holds no *_processed.json; check the data set's folder")
    problems: list[Problem] = []
    records = []
    for path in files:
        for number, entry in enumerate(read_json(path).elements()):
            where, label = f"{path}: entry {number}", f"entry {number}"
            try:
                record = _record(where, number, entry, problems)
            except UserError as error:
                problems.append(Problem.of(error, label, str(path)))
                continue
            if record is None:
                problems.append(Problem(where, "no question with an answer", label))
            else:
                records.append(record)
    make = partial(_question, str(folder / "JPEGImages"))
    return IndexedSource("llava_video", split, str(folder), tuple(records), make, tuple(problems))


def _record(where: str, number: int, entry: Json, problems: list[Problem]) -> _Record | None:
    if "video" not in entry:
        raise UserError(f'{where}: has no "video"')
    video = check_name(entry["video"].text(), f"{where}: the video", nested=True)
    name = entry["id"].identifier() if "id" in entry else str(number)
    problems += unknown_keys(entry, _KEYS, where)
    spoken = [] if entry["conversations"].value is None else list(entry["conversations"].elements())
    turns = []
    for question, answer in zip(spoken[::2], spoken[1::2]):
        if question["from"].value != "human" or answer["from"].value != "gpt":
            continue
        asked, told = question["value"].text().replace("<image>", "").strip(), answer["value"].text().strip()
        if asked and told:
            turns.append((asked, told))
    return _Record(name, os.path.splitext(video)[0], tuple(turns)) if turns else None


def _question(images: str, record: _Record) -> Question:
    folder = find_entry(images, record.folder)
    files = image_files(folder)
    if not files:
        raise UserError(f"{folder}: no frames (*.jpg); extract them from the video, or take the entry out")
    names = [find_image(folder, files, stem, ".jpg")[0] for stem in sorted(files, key=natural_key)]
    paths = tuple(os.path.join(folder, name) for name in names)
    return Question(record.name, len(paths), record.turns, _Frames(paths))
