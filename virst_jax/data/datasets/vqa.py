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
from typing import Any

import numpy as np

from virst_jax.data.datasets.files import find_folder, read_json
from virst_jax.data.datasets.readers import stack_frames
from virst_jax.data.datasets.source import IndexedSource, Problem, unknown_keys
from virst_jax.data.samples import Question
from virst_jax.errors import UserError

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
        entries = read_json(path)
        if not isinstance(entries, list):
            raise UserError(f"{path}: expected a list of conversations; check that it is the right file")
        for number, entry in enumerate(entries):
            record = _record(path, number, entry, problems)
            if record is not None:
                records.append(record)
    make = partial(_question, str(folder / "JPEGImages"))
    return IndexedSource("llava_video", split, str(folder), tuple(records), make, tuple(problems))


def _record(path: Path, number: int, entry: Any, problems: list[Problem]) -> _Record | None:
    where = f"{path}: entry {number}"
    if not isinstance(entry, dict) or not isinstance(entry.get("video"), str):
        problems.append(Problem(where, 'has no "video"', f"entry {number}"))
        return None
    problems += unknown_keys(entry, _KEYS, where)
    turns = []
    spoken = [(str(turn.get("from")), str(turn.get("value", ""))) for turn in entry.get("conversations") or ()]
    for (asker, question), (answerer, answer) in zip(spoken[::2], spoken[1::2]):
        question = question.replace("<image>", "").strip()
        if (asker, answerer) == ("human", "gpt") and question and answer.strip():
            turns.append((question, answer.strip()))
    if not turns:
        problems.append(Problem(where, "no question with an answer", f"entry {number}"))
        return None
    return _Record(str(entry.get("id", number)), os.path.splitext(entry["video"])[0], tuple(turns))


def _question(images: str, record: _Record) -> Question:
    folder = os.path.join(images, record.folder)
    names = sorted(name for name in os.listdir(folder) if name.endswith(".jpg")) if os.path.isdir(folder) else []
    if not names:
        raise UserError(f"{folder}: no frames (*.jpg); extract them from the video, or take the entry out")
    paths = tuple(os.path.join(folder, name) for name in names)
    return Question(record.name, len(paths), record.turns, _Frames(paths))
