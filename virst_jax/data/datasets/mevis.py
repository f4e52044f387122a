"""MeViS v1 and v2, and any data set laid out like them.

FOLDER/{train,valid_u,valid}/
  JPEGImages/VIDEO/FRAME.jpg
  meta_expressions.json        {"videos": {VIDEO: {"vid_id", "frames": [FRAME], "expressions": {ID: {"exp": text,
                               "obj_id": [int], "anno_id": [int]}}}}}
  mask_dict.json               {str(anno_id): [code or null for every frame]}; missing where masks are not public

An expression means the union of its annotations; in v2 one without annotations means nothing ("no-target").
Follows data/d2_datasets/mevis_utils.py of the release, which calls valid_u "mevis_valid" and valid "mevis_test".
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from virst_jax.data.datasets.files import find_folder, first_file, read_videos
from virst_jax.data.datasets.json_index import JsonMembers, index_members
from virst_jax.data.datasets.readers import FrameFiles, RleMasks
from virst_jax.data.datasets.source import IndexedSource, Problem, unknown_keys
from virst_jax.data.samples import Expression, Video
from virst_jax.errors import UserError

SPLITS = ("train", "valid_u", "valid")
META = ("meta_expressions.json",)
META_V2 = ("meta_expressions_v2.json", "meta_expressions_v2_release.json")
NO_TARGET = "no-target"  # category of an expression that means nothing
_SUFFIXES = (".jpg", ".jpeg", ".png")  # the official sets have the first
_VIDEO_KEYS = frozenset({"vid_id", "frames", "expressions", "height", "width", "length", "source", "category"})
_EXPRESSION_KEYS = frozenset({"exp", "obj_id", "anno_id", "type_id", "exp_id", "category", "audio"})


@dataclass(frozen=True)
class VideoRecord:
    """A video in MeViS layout."""

    name: str
    frames: tuple[str, ...]
    expressions: tuple[Expression, ...]
    annotations: tuple[tuple[str, ...], ...] | None  # ids in mask_dict.json, per expression; None: not public


def open_mevis(root: Path, split: str) -> IndexedSource:
    """MeViS v1. Raises UserError: a file is missing or not in this layout."""
    folder = find_folder(root, ("mevis", "MeViS"), SPLITS) / split
    return open_layout("mevis", folder, split, META)


def open_mevis_v2(root: Path, split: str) -> IndexedSource:
    """MeViS v2; expressions carry the category "target" or "no-target" where that is public.

    Raises UserError: a file is missing or not in this layout.
    """
    folder = find_folder(root, ("mevis_v2", "MeViSv2", "mevis", "MeViS"), SPLITS) / split
    return open_layout("mevis_v2", folder, split, META_V2, categorize=_target_or_not)


def open_custom(root: Path, split: str) -> IndexedSource:
    """One's own videos in MeViS layout: in `root` itself, or in root/SPLIT if a split is named.

    Raises UserError: a file is missing or not in this layout.
    """
    return open_layout("custom", root / split if split else root, split, (*META, *META_V2))


def open_layout(
    name: str,
    folder: Path,
    split: str,
    meta_names: tuple[str, ...],
    *,
    images: Path | None = None,
    masks_file: Path | None = None,
    categorize: Callable[[dict[str, Any]], str] | None = None,
    rewrite: Callable[[str], str] | None = None,
) -> IndexedSource:
    """A folder in MeViS layout.

    Args:
      meta_names: names of the expressions' file, the first that exists is taken.
      images: folder of the videos' folders, JPEGImages where not given.
      masks_file: mask_dict.json in `folder` where not given.
      categorize: the category of an expression from its entry.
      rewrite: changes an expression's text.

    Raises:
      UserError: a file is missing or not in this layout.
    """
    meta = first_file(folder, meta_names)
    masks_file = masks_file or first_existing(folder, ("mask_dict_v2.json",), meta_names == META_V2, "mask_dict.json")
    masks = index_members(masks_file) if masks_file.is_file() else None
    problems: list[Problem] = []
    records = []
    for video, entry in read_videos(meta).items():
        record = _record(meta, video, entry, masks, problems, categorize, rewrite)
        if record is not None:
            records.append(record)
    make = partial(make_video, str(images or folder / "JPEGImages"), masks)
    return IndexedSource(name, split, str(folder), tuple(records), make, tuple(problems))


def make_video(images: str, masks: JsonMembers | None, record: VideoRecord) -> Video:
    """The sample of a record. Reads the header of the first frame.

    Raises:
      UserError: the first frame is missing or no picture.
    """
    first = os.path.join(images, record.name, record.frames[0])
    suffix = next((s for s in _SUFFIXES if os.path.isfile(first + s)), _SUFFIXES[0])
    frames = FrameFiles(os.path.join(images, record.name), record.frames, suffix)
    size = frames.size()
    read_masks = None
    if masks is not None and record.annotations is not None:
        read_masks = RleMasks(masks, record.annotations, len(record.frames), size)
    return Video(record.name, len(record.frames), size, record.expressions, frames, read_masks, record.frames)


def parse_frames(meta: Path, video: str, entry: Any, problems: list[Problem]) -> tuple[str, ...] | None:
    """The sorted frame names of a video's entry; None, and a problem, if there are none."""
    frames = entry.get("frames") if isinstance(entry, dict) else None
    if not isinstance(frames, list) or not frames:
        problems.append(Problem(f"{meta}: {video}", "lists no frames", f"video {video}"))
        return None
    return tuple(sorted(str(frame) for frame in frames))


def parse_text(where: str, text: Any, label: str, problems: list[Problem]) -> str | None:
    """An expression's text as it stands, for the release does not trim it; None, and a problem, if it is empty."""
    if not isinstance(text, str) or not text.strip():
        problems.append(Problem(where, "the expression is empty", label))
        return None
    return text


def first_existing(folder: Path, names: tuple[str, ...], wanted: bool, default: str) -> Path:
    """The first of `names` that is a file, if they are wanted; else the default."""
    found = [folder / name for name in names if wanted and (folder / name).is_file()]
    return found[0] if found else folder / default


def _record(
    meta: Path,
    video: str,
    entry: Any,
    masks: JsonMembers | None,
    problems: list[Problem],
    categorize: Callable[[dict[str, Any]], str] | None,
    rewrite: Callable[[str], str] | None,
) -> VideoRecord | None:
    frames = parse_frames(meta, video, entry, problems)
    if frames is None:
        return None
    problems += unknown_keys(entry, _VIDEO_KEYS, f"{meta}: {video}")
    stated = entry.get("expressions")
    if not isinstance(stated, dict):
        raise UserError(f'{meta}: video {video} has no "expressions" by id; check that the file is in MeViS layout')
    expressions, annotations = [], []
    for exp_id, fields in stated.items():
        where, label = f"{meta}: {video}, expression {exp_id}", f"expression {exp_id} of {video}"
        if not isinstance(fields, dict):
            raise UserError(f'{where}: expected an object with "exp"; check that the file is in MeViS layout')
        problems += unknown_keys(fields, _EXPRESSION_KEYS, where)
        text = parse_text(where, fields.get("exp"), label, problems)
        if text is None:
            continue
        ids = tuple(str(i) for i in fields.get("anno_id") or ())
        if masks is not None:
            if "anno_id" not in fields:
                problems.append(Problem(where, "names no anno_id although there are masks", label))
                continue
            strange = [i for i in ids if i not in masks]
            if strange:
                problems.append(Problem(where, f"annotation {', '.join(strange)} is not in {masks.path}", label))
                continue
        category = categorize(fields) if categorize else ""
        expressions.append(Expression(rewrite(text) if rewrite else text, str(exp_id), category))
        annotations.append(ids)
    if not expressions:
        problems.append(Problem(f"{meta}: {video}", "no expression is left", f"video {video}"))
        return None
    return VideoRecord(video, frames, tuple(expressions), tuple(annotations) if masks is not None else None)


def _target_or_not(fields: dict[str, Any]) -> str:
    if "anno_id" not in fields and "obj_id" not in fields:
        return ""
    return "target" if fields.get("anno_id") or fields.get("obj_id") else NO_TARGET
