"""Ref-DAVIS17, laid out as Ref-YouTube-VOS.

FOLDER/
  meta_expressions/{train,valid}/meta_expressions.json
  {train,valid}/{JPEGImages/VIDEO/FRAME.jpg, Annotations/VIDEO/FRAME.png}

Every object has four expressions, one from each annotator: id = 4 * (object - 1) + annotator, objects counting from 1
as in the label images and annotators from 0. Follows data/d2_datasets/refytvos_utils.py of the release, which scores
against a mask_dict.pkl made of the same images.
"""

from functools import partial
from pathlib import Path

from virst_jax.data.datasets.files import find_folder
from virst_jax.data.datasets.layout import Entry, index_videos, read_videos
from virst_jax.data.datasets.source import IndexedSource, Problem
from virst_jax.data.datasets.ytvos import layout_of, make_video, meta_file, parse_object, read_objects
from virst_jax.errors import UserError

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
    records = index_videos(read_videos(meta), layout_of(partial(_object, split == "valid", objects)), problems)
    labelled = (folder / split / "Annotations").is_dir()
    if not labelled:
        problems.append(Problem(str(folder / split / "Annotations"), "no such folder; the masks cannot be read"))
    make = partial(make_video, folder / split, labelled, False)
    return IndexedSource("ref_davis17", split, str(folder), records, make, tuple(problems))


def expression_parts(exp_id: str) -> tuple[int, int]:
    """The object, from 1, and the annotator, from 0, of an expression's id."""
    return int(exp_id) // NUM_ANNOTATORS + 1, int(exp_id) % NUM_ANNOTATORS


def _object(by_id: bool, objects: dict[str, set[str]] | None, entry: Entry) -> int:
    if not (entry.id.isascii() and entry.id.isdigit() and len(entry.id) < 10):
        raise UserError(f"the id {entry.id[:20]!r} is no number")
    expected = expression_parts(entry.id)[0]
    if "obj_id" not in entry.fields:
        return expected
    number = parse_object(entry.fields)
    if by_id and number != expected:  # the official protocol goes by the id
        raise UserError(f"obj_id {number} contradicts the id {entry.id}, which belongs to object {expected}")
    if objects is not None and str(number) not in objects.get(entry.video, {str(number)}):
        raise UserError(f"object {number} of {entry.video} is not in meta.json")
    return number
