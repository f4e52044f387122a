"""Ref-YouTube-VOS, and the layout that Ref-DAVIS17 shares with it.

FOLDER/
  meta_expressions/{train,valid,test}/meta_expressions.json   {"videos": {VIDEO: {"frames": [FRAME], "expressions":
                                                              {ID: {"exp": text, "obj_id": str}}}}}
  train/{JPEGImages/VIDEO/FRAME.jpg, Annotations/VIDEO/FRAME.png, meta.json}
  valid/JPEGImages, test/JPEGImages     valid/Annotations/VIDEO/ID/FRAME.png where somebody made them

Training masks are palette images whose numbers are the objects. The file of valid lists the videos of test as well:
507 with 305 to be taken away leave 202. A mask_dict.pkl, where there is one, is a pickle and never read.
Follows data/d2_datasets/refytvos_utils.py of the release. Expression ids are in order as text ("10" before "2").
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from virst_jax.data.datasets.files import find_folder
from virst_jax.data.datasets.layout import Entry, Layout, VideoRecord, index_videos, read_videos
from virst_jax.data.datasets.readers import BinaryMasks, LabelMasks, find_frames
from virst_jax.data.datasets.source import IndexedSource, Problem
from virst_jax.data.samples import Video
from virst_jax.errors import UserError
from virst_jax.io.json_files import Json, read_json

SPLITS = ("train", "valid", "test")
FOLDERS = ("Ref-Youtube-VOS", "refytvos", "ref-youtube-vos", "ref_youtube_vos", "rvos")
NUM_VALID = 202
_VIDEO_KEYS = frozenset({"frames", "expressions", "vid_id"})
_EXPRESSION_KEYS = frozenset({"exp", "obj_id"})


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
            hidden = read_videos(test).object()
            kept = {video: entry for video, entry in videos.object().items() if video not in hidden}
            videos = Json(kept, str(meta), Json(None, str(meta)), "videos")
        elif len(videos) > NUM_VALID:
            raise UserError(f"{test}: no such file, so the test videos among the {len(videos)} of valid cannot be told")
        else:
            problems.append(Problem(str(test), "no such file; all videos of valid are taken for validation videos"))
    images = folder / split
    objects = read_objects(images / "meta.json") if split == "train" else None
    target = partial(_stated_object, objects) if split == "train" else _not_public
    records = index_videos(videos, layout_of(target), problems)
    by_expression = (images / "Annotations").is_dir() and split != "train"
    make = partial(make_video, images, split == "train", by_expression)
    return IndexedSource("ref_youtube_vos", split, str(folder), records, make, tuple(problems))


def layout_of(target: Callable[[Entry], int]) -> Layout:
    """The layout, with what gives the number of an expression's object; videos and ids are in order as text."""
    return Layout(target, _VIDEO_KEYS, _EXPRESSION_KEYS, in_order=True)


def meta_file(folder: Path, split: str) -> Path:
    """The file with the expressions of a split."""
    return folder / "meta_expressions" / split / "meta_expressions.json"


def read_objects(path: Path) -> dict[str, set[str]] | None:
    """The objects of every video that a meta.json lists; None without the file.

    Raises UserError: it is not in its form.
    """
    if not path.exists():
        return None
    videos = read_json(path)["videos"]
    return {video: set(entry["objects"].object() if "objects" in entry else ()) for video, entry in videos.members()}


def make_video(folder: Path, labelled: bool, by_expression: bool, record: VideoRecord) -> Video:
    """The sample of a record. Reads the header of the first frame.

    Args:
      labelled: Annotations/VIDEO/FRAME.png hold the numbers of objects.
      by_expression: Annotations/VIDEO/ID/FRAME.png hold masks.

    Raises:
      UserError: the first frame is missing or no image.
    """
    frames = find_frames(folder / "JPEGImages", record.name, record.frames)
    size = frames.size()
    masks: LabelMasks | BinaryMasks | None = None
    annotations = folder / "Annotations" / record.name
    if labelled:
        values = tuple((number,) for number in record.targets)
        masks = LabelMasks(str(annotations), frames.names, values, size, of_objects=True)
    elif by_expression:
        masks = BinaryMasks(tuple(str(annotations / e.id) for e in record.expressions), frames.names, size)
    return Video(record.name, len(record.frames), size, record.expressions, frames, masks, frames.names)


def parse_object(fields: Json) -> int:
    """The object's number, 1 or more. Raises UserError: there is none."""
    stated = fields["obj_id"].identifier() if "obj_id" in fields else ""
    if not (stated.isascii() and stated.isdigit() and len(stated) < 10 and int(stated)):
        raise UserError(f"obj_id {stated[:20]!r} is not an object's number")
    return int(stated)


def _stated_object(objects: dict[str, set[str]] | None, entry: Entry) -> int:
    number = parse_object(entry.fields)
    if objects is not None and str(number) not in objects.get(entry.video, set()):
        raise UserError(f"object {number} of {entry.video} is not in meta.json")
    return number


def _not_public(entry: Entry) -> int:
    return 0
