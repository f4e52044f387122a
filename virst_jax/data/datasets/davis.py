"""Ref-DAVIS17, laid out as Ref-YouTube-VOS.

FOLDER/
  meta_expressions/{train,valid}/meta_expressions.json
  {train,valid}/{JPEGImages/VIDEO/FRAME.jpg, Annotations/VIDEO/FRAME.png}

Every object has four expressions, one from each annotator: id = 4 * (object - 1) + annotator, objects counting from 1
as in the label pictures and annotators from 0. Follows data/d2_datasets/refytvos_utils.py of the release, which scores
against a mask_dict.pkl made of the same pictures.
"""

from functools import partial
from pathlib import Path
from typing import Any

from virst_jax.data.datasets.files import find_folder, read_videos
from virst_jax.data.datasets.source import IndexedSource, Problem
from virst_jax.data.datasets.ytvos import index_videos, make_video, meta_file, parse_object, read_objects

SPLITS = ("train", "valid")
FOLDERS = ("davis17", "ref-davis", "Ref-DAVIS17", "ref_davis17")
NUM_VALID = 30
NUM_ANNOTATORS = 4


def open_davis(root: Path, split: str) -> IndexedSource:
    """Ref-DAVIS17. `expression_parts` tells object and annotator; `read_masks.labels` gives all objects of a frame.

    Raises UserError: a file is missing or not in this layout.
    """
    folder = find_folder(root, FOLDERS, ("meta_expressions",))
    problems: list[Problem] = []
    meta = meta_file(folder, split)
    objects = read_objects(folder / split / "meta.json")
    records = index_videos(meta, read_videos(meta), problems, partial(_object, split == "valid", objects))
    labelled = (folder / split / "Annotations").is_dir()
    if not labelled:
        problems.append(Problem(str(folder / split / "Annotations"), "no such folder; the masks cannot be read"))
    make = partial(make_video, folder / split, labelled, False)
    return IndexedSource("ref_davis17", split, str(folder), records, make, tuple(problems))


def expression_parts(exp_id: str) -> tuple[int, int]:
    """The object, from 1, and the annotator, from 0, of an expression's id."""
    return int(exp_id) // NUM_ANNOTATORS + 1, int(exp_id) % NUM_ANNOTATORS


def _object(
    by_id: bool, objects: dict[str, set[str]] | None, video: str, exp_id: str, fields: dict[str, Any]
) -> int | str:
    if not exp_id.isdigit():
        return f"the id {exp_id!r} is no number"
    expected = expression_parts(exp_id)[0]
    if "obj_id" not in fields:
        return expected
    number = parse_object(fields)
    if by_id and isinstance(number, int) and number != expected:  # the official protocol goes by the id
        return f"obj_id {number} contradicts the id {exp_id}, which belongs to object {expected}"
    if objects is not None and isinstance(number, int) and str(number) not in objects.get(video, {str(number)}):
        return f"object {number} of {video} is not in meta.json"
    return number
