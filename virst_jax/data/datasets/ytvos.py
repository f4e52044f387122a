"""Ref-YouTube-VOS, and the layout that Ref-DAVIS17 shares with it.

FOLDER/
  meta_expressions/{train,valid,test}/meta_expressions.json   {"videos": {VIDEO: {"frames": [FRAME], "expressions":
                                                              {ID: {"exp": text, "obj_id": str}}}}}
  train/{JPEGImages/VIDEO/FRAME.jpg, Annotations/VIDEO/FRAME.png, meta.json}
  valid/JPEGImages, test/JPEGImages     valid/Annotations/VIDEO/ID/FRAME.png where somebody made them

Training masks are palette pictures whose numbers are the objects. The file of valid lists the videos of test as well:
507 with 305 to be taken away leave 202. A mask_dict.pkl, where there is one, is a pickle and never read.
Follows data/d2_datasets/refytvos_utils.py of the release. Expression ids are in order as text ("10" before "2").
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from virst_jax.data.datasets.files import find_folder, read_json, read_videos
from virst_jax.data.datasets.mevis import parse_frames, parse_text
from virst_jax.data.datasets.readers import BinaryMasks, FrameFiles, LabelMasks
from virst_jax.data.datasets.source import IndexedSource, Problem, unknown_keys
from virst_jax.data.samples import Expression, Video
from virst_jax.errors import UserError

SPLITS = ("train", "valid", "test")
FOLDERS = ("Ref-Youtube-VOS", "refytvos", "ref-youtube-vos", "ref_youtube_vos", "rvos")
NUM_VALID = 202
_VIDEO_KEYS = frozenset({"frames", "expressions", "vid_id"})
_EXPRESSION_KEYS = frozenset({"exp", "obj_id"})


@dataclass(frozen=True)
class VideoRecord:
    """A video whose expressions mean one object each."""

    name: str
    frames: tuple[str, ...]
    expressions: tuple[Expression, ...]
    objects: tuple[int, ...]  # per expression, numbers of the label pictures; 0: not public


def open_ytvos(root: Path, split: str) -> IndexedSource:
    """Ref-YouTube-VOS.

    Raises:
      UserError: a file is missing or not in this layout; the videos of test cannot be told from those of valid.
    """
    folder = find_folder(root, FOLDERS, ("meta_expressions",))
    meta = meta_file(folder, split)
    videos = read_videos(meta)
    problems: list[Problem] = []
    if split == "valid":
        test = meta_file(folder, "test")
        if test.is_file():
            hidden = read_videos(test)
            videos = {video: entry for video, entry in videos.items() if video not in hidden}
        elif len(videos) > NUM_VALID:
            raise UserError(f"{test}: no such file, so the test videos among the {len(videos)} of valid cannot be told")
        else:
            problems.append(Problem(str(test), "no such file; all videos of valid are taken for validation videos"))
    images = folder / split
    objects = read_objects(images / "meta.json") if split == "train" else None
    records = index_videos(meta, videos, problems, partial(_stated_object, split == "train", objects))
    by_expression = (images / "Annotations").is_dir() and split != "train"
    make = partial(make_video, images, split == "train", by_expression)
    return IndexedSource("ref_youtube_vos", split, str(folder), records, make, tuple(problems))


def meta_file(folder: Path, split: str) -> Path:
    """The file with the expressions of a split."""
    return folder / "meta_expressions" / split / "meta_expressions.json"


def read_objects(path: Path) -> dict[str, set[str]] | None:
    """The objects of every video that a meta.json lists; None without the file."""
    if not path.is_file():
        return None
    videos = read_json(path).get("videos", {})
    return {video: {str(key) for key in entry.get("objects", {})} for video, entry in videos.items()}


def index_videos(
    meta: Path,
    videos: dict[str, Any],
    problems: list[Problem],
    object_of: Callable[[str, str, dict[str, Any]], int | str],
) -> tuple[VideoRecord, ...]:
    """The videos in the order of their names, expressions in the order of their ids as text.

    Args:
      object_of: (video, expression id, entry) -> the number of the object, 0 if it is not public, or what is wrong.

    Raises:
      UserError: the file is not in this layout.
    """
    records = []
    for video in sorted(videos):
        frames = parse_frames(meta, video, videos[video], problems)
        if frames is None:
            continue
        problems += unknown_keys(videos[video], _VIDEO_KEYS, f"{meta}: {video}")
        stated = videos[video].get("expressions")
        if not isinstance(stated, dict):
            raise UserError(f'{meta}: video {video} has no "expressions" by id; not in Ref-YouTube-VOS layout')
        expressions, objects = [], []
        for exp_id in sorted(stated):
            where, label = f"{meta}: {video}, expression {exp_id}", f"expression {exp_id} of {video}"
            problems += unknown_keys(stated[exp_id], _EXPRESSION_KEYS, where)
            text = parse_text(where, stated[exp_id].get("exp"), label, problems)
            if text is None:
                continue
            target = object_of(video, exp_id, stated[exp_id])
            if isinstance(target, str):
                problems.append(Problem(where, target, label))
                continue
            expressions.append(Expression(text, exp_id))
            objects.append(target)
        if expressions:
            records.append(VideoRecord(video, frames, tuple(expressions), tuple(objects)))
        else:
            problems.append(Problem(f"{meta}: {video}", "no expression is left", f"video {video}"))
    return tuple(records)


def make_video(folder: Path, labelled: bool, by_expression: bool, record: VideoRecord) -> Video:
    """The sample of a record. Reads the header of the first frame.

    Args:
      labelled: Annotations/VIDEO/FRAME.png hold the numbers of objects.
      by_expression: Annotations/VIDEO/ID/FRAME.png hold masks.

    Raises:
      UserError: the first frame is missing or no picture.
    """
    frames = FrameFiles(str(folder / "JPEGImages" / record.name), record.frames)
    size = frames.size()
    masks: LabelMasks | BinaryMasks | None = None
    annotations = folder / "Annotations" / record.name
    if labelled:
        masks = LabelMasks(str(annotations), record.frames, tuple((o,) for o in record.objects), size)
    elif by_expression:
        masks = BinaryMasks(tuple(str(annotations / e.id) for e in record.expressions), record.frames, size)
    return Video(record.name, len(record.frames), size, record.expressions, frames, masks, record.frames)


def parse_object(fields: dict[str, Any]) -> int | str:
    """The object's number, 1 or more, or what is wrong."""
    stated = str(fields.get("obj_id", ""))
    return int(stated) if stated.isdigit() and int(stated) > 0 else f"obj_id {stated!r} is not an object's number"


def _stated_object(
    wanted: bool, objects: dict[str, set[str]] | None, video: str, exp_id: str, fields: dict[str, Any]
) -> int | str:
    if not wanted:
        return 0
    number = parse_object(fields)
    if objects is not None and isinstance(number, int) and str(number) not in objects.get(video, set()):
        return f"object {number} of {video} is not in meta.json"
    return number
