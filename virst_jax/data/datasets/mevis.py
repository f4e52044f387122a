"""MeViS v1 and v2, and any data set laid out like them.

FOLDER/{train,valid_u,valid}/
  JPEGImages/VIDEO/FRAME.jpg
  meta_expressions.json        {"videos": {VIDEO: {"vid_id", "frames": [FRAME], "expressions": {ID: {"exp": text,
                               "obj_id": [int], "anno_id": [int]}}}}}
  mask_dict.json               {str(anno_id): [code or null for every frame]}; missing where masks are not public

An expression means the union of its annotations; in v2 one without annotations means nothing ("no-target"). The codes
of an annotation are in the order of "frames", which is the order of the video. Follows data/d2_datasets/mevis_utils.py
of the release, which calls valid_u "mevis_valid" and valid "mevis_test".
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from virst_jax.data.datasets import plain
from virst_jax.data.datasets.files import find_folder, first_file
from virst_jax.data.datasets.json_index import JsonMembers, index_members
from virst_jax.data.datasets.layout import Entry, Layout, VideoRecord, index_videos, read_videos
from virst_jax.data.datasets.readers import RleMasks, find_frames
from virst_jax.data.datasets.source import IndexedSource, Problem
from virst_jax.data.samples import Video
from virst_jax.errors import UserError

SPLITS = ("train", "valid_u", "valid")
META = ("meta_expressions.json",)
META_V2 = ("meta_expressions_v2.json", "meta_expressions_v2_release.json")
NO_TARGET = "no-target"  # category of an expression that means nothing
_VIDEO_KEYS = frozenset({"vid_id", "frames", "expressions", "height", "width", "length", "source", "category"})
_EXPRESSION_KEYS = frozenset({"exp", "obj_id", "anno_id", "type_id", "exp_id", "category", "audio"})


def open_mevis(root: Path, split: str) -> IndexedSource:
    """MeViS v1. Raises UserError: a file is missing or not in this layout."""
    folder = find_folder(root, ("mevis", "MeViS"), SPLITS) / split
    return open_layout("mevis", folder, split, META)


def open_mevis_v2(root: Path, split: str) -> IndexedSource:
    """MeViS v2; expressions carry the category "target" or "no-target" where that is public.

    Raises UserError: a file is missing or not in this layout.
    """
    folder = find_folder(root, ("mevis_v2", "MeViSv2", "mevis", "MeViS"), SPLITS) / split
    return open_layout("mevis_v2", folder, split, META_V2, category=_target_or_not)


def open_custom(root: Path, split: str) -> IndexedSource:
    """One's own videos in MeViS layout, or with a table of sentences (see plain): in `root` itself, or in root/SPLIT if
    a split is named. A folder without splits is all for training.

    Raises UserError: a file is missing or not in this layout.
    """
    folder = root / split if split else root
    if split == "train" and not folder.is_dir():
        folder, split = root, ""
    if (folder / plain.TABLE).is_file():
        return plain.open_plain("custom", folder, split)
    return open_layout("custom", folder, split, (*META, *META_V2, plain.TABLE))


def open_layout(
    name: str,
    folder: Path,
    split: str,
    meta_names: tuple[str, ...],
    *,
    category: Callable[[Entry], str] | None = None,
    rewrite: Callable[[str], str] | None = None,
) -> IndexedSource:
    """A folder in MeViS layout.

    Args:
      meta_names: names of the expressions' file, the first that exists is taken.
      category: of an expression.
      rewrite: changes an expression's text.

    Raises:
      UserError: a file is missing or not in this layout.
    """
    meta = first_file(folder, meta_names)
    v2 = folder / "mask_dict_v2.json"
    masks_file = v2 if meta_names == META_V2 and v2.is_file() else folder / "mask_dict.json"
    masks = index_members(masks_file) if masks_file.exists() else None
    layout = Layout(partial(_annotations, masks), _VIDEO_KEYS, _EXPRESSION_KEYS)
    if category is not None:
        layout = replace(layout, category=category)
    if rewrite is not None:
        layout = replace(layout, rewrite=rewrite)
    problems: list[Problem] = []
    records = index_videos(read_videos(meta), layout, problems)
    make = partial(make_video, str(folder / "JPEGImages"), masks)
    return IndexedSource(name, split, str(folder), records, make, tuple(problems))


def make_video(images: str, masks: JsonMembers | None, record: VideoRecord) -> Video:
    """The sample of a record. Reads the header of the first frame.

    Raises:
      UserError: the first frame is missing or no image.
    """
    frames = find_frames(images, record.name, record.frames)
    size = frames.size()
    read_masks = None
    if masks is not None:
        read_masks = RleMasks(masks, record.targets, len(record.frames), size)
    return Video(record.name, len(record.frames), size, record.expressions, frames, read_masks, frames.names)


def _annotations(masks: JsonMembers | None, entry: Entry) -> tuple[str, ...]:
    """Ids of the annotations that an expression means: numbers or texts, in a list or one alone."""
    if masks is None:
        return ()
    stated = entry.fields["anno_id"]
    if stated.value is None:
        raise UserError("names no anno_id although there are masks")
    ids = stated.identifiers()
    strange = [i for i in ids if i not in masks]
    if strange:
        more = f" and {len(strange) - 8} more" if len(strange) > 8 else ""
        raise UserError(f"annotation {', '.join(i[:40] for i in strange[:8])}{more} is not in {masks.path}")
    return ids


def _target_or_not(entry: Entry) -> str:
    fields = entry.fields
    if "anno_id" not in fields and "obj_id" not in fields:
        return ""
    return "target" if fields["anno_id"].identifiers() or fields["obj_id"].identifiers() else NO_TARGET
