"""RefCOCO, RefCOCO+, RefCOCOg and RefCLEF: sentences about an object of a still image.

refer_seg/
  {refcoco,refcoco+,refcocog,refclef}/
    refs(unc).p          (umd for refcocog) a pickle: [{"ref_id", "ann_id", "image_id", "category_id", "split",
                         "sentences": [{"sent_id", "sent", "raw", "tokens"}]}]
    instances.json       COCO: images, annotations, categories
  images/mscoco/images/{train2014,val2014}   images/saiapr_tc-12 for refclef

A sample is an image with all sentences of the split, an expression's id is sent_id. Follows data/refer.py,
data/refer_seg_dataset.py (training) and data/val_refer_seg_dataset.py of the release.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from virst_jax.data.datasets.files import find_folder
from virst_jax.data.datasets.json_index import Span, index_members, iterate_elements
from virst_jax.data.datasets.mevis import parse_text
from virst_jax.data.datasets.pickles import read_plain_pickle
from virst_jax.data.datasets.readers import CocoMasks, ImageFile
from virst_jax.data.datasets.source import IndexedSource, Problem, unknown_keys
from virst_jax.data.samples import Expression, Video
from virst_jax.errors import UserError

SPLIT_BY = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd", "refclef": "unc"}
SPLITS = {
    "refcoco": ("train", "val", "testA", "testB"),
    "refcoco+": ("train", "val", "testA", "testB"),
    "refcocog": ("train", "val", "test"),
    "refclef": ("train", "val", "testA", "testB", "testC"),
}
_REF_KEYS = frozenset({"ref_id", "ann_id", "image_id", "category_id", "split", "sentences", "sent_ids", "file_name"})


@dataclass(frozen=True)
class _Record:
    name: str
    file: str
    size: tuple[int, int]
    expressions: tuple[Expression, ...]
    spans: tuple[tuple[Span, ...], ...]  # of annotations, per expression


def open_refer(name: str, root: Path, split: str) -> IndexedSource:
    """One of the four sets; `root` is refer_seg, the folder above it, or the one above that.

    Raises UserError: a file is missing or not in this layout.
    """
    folder = find_folder(root, ("refer_seg", "LISA/refer_seg"), [name])
    refs_file = folder / name / f"refs({SPLIT_BY[name]}).p"
    refs = read_plain_pickle(refs_file)
    if not isinstance(refs, list) or not all(isinstance(ref, dict) for ref in refs):
        raise UserError(f"{refs_file}: expected a list of references; get the file again")
    problems: list[Problem] = []
    chosen: dict[Any, list[dict[str, Any]]] = {}
    for ref in refs:
        if in_split(str(ref.get("split")), split):
            problems += unknown_keys(ref, _REF_KEYS, f"{refs_file}: ref {ref.get('ref_id')}")
            chosen.setdefault(ref.get("image_id"), []).append(ref)
    instances = folder / name / "instances.json"
    members = index_members(instances)
    for key in ("images", "annotations"):
        if key not in members:
            raise UserError(f'{instances}: has no "{key}"; get the file again')
    wanted = {i for refs in chosen.values() for ref in refs for i in annotation_ids(ref)}
    images = {v["id"]: v for _, v in iterate_elements(instances, members.spans["images"]) if v["id"] in chosen}
    spans = {v["id"]: s for s, v in iterate_elements(instances, members.spans["annotations"]) if v["id"] in wanted}
    records = []
    for image_id in chosen:
        record = _record(refs_file, name, folder, image_id, images.get(image_id), chosen[image_id], spans, problems)
        if record is not None:
            records.append(record)
    make = partial(_image, str(instances))
    return IndexedSource(name, split, str(folder), tuple(records), make, tuple(problems))


def in_split(stated: str, split: str) -> bool:
    """Whether a reference marked `stated` (as "train", "testA", "testAB") belongs to a split."""
    if split.startswith("test"):
        return stated.startswith("test") and split[4:] in stated[4:]
    return stated == split


def annotation_ids(ref: dict[str, Any]) -> list[Any]:
    """Annotations of a reference; -1 stands for none."""
    ids = ref.get("ann_id")
    return [i for i in (ids if isinstance(ids, list) else [ids]) if i != -1]


def _record(
    refs_file: Path,
    name: str,
    folder: Path,
    image_id: Any,
    image: dict[str, Any] | None,
    refs: list[dict[str, Any]],
    spans: dict[Any, Span],
    problems: list[Problem],
) -> _Record | None:
    where = f"{refs_file}: image {image_id}"
    if image is None:
        problems.append(Problem(where, "is not in instances.json", f"image {image_id}"))
        return None
    expressions: list[Expression] = []
    places: list[tuple[Span, ...]] = []
    for ref in refs:
        strange = [i for i in annotation_ids(ref) if i not in spans]
        if strange:
            label = f"ref {ref.get('ref_id')} of image {image_id}"
            problems.append(Problem(where, f"annotation {strange[0]} is not in instances.json", label))
            continue
        for sentence in ref.get("sentences", ()):
            label = f"sentence {sentence.get('sent_id')} of image {image_id}"
            text = parse_text(where, sentence.get("sent"), label, problems)
            if text is not None:
                expressions.append(Expression(text.strip(), str(sentence.get("sent_id", len(expressions)))))
                places.append(tuple(spans[i] for i in annotation_ids(ref)))
    if not expressions:
        problems.append(Problem(where, "no sentence is left", f"image {image_id}"))
        return None
    file_name = image["file_name"]
    if name == "refclef":
        path = folder / "images/saiapr_tc-12" / file_name
    else:
        path = folder / "images/mscoco/images" / ("val2014" if "val2014" in file_name else "train2014") / file_name
    size = (int(image["height"]), int(image["width"]))
    return _Record(str(image_id), str(path), size, tuple(expressions), tuple(places))


def _image(instances: str, record: _Record) -> Video:
    masks = CocoMasks(instances, record.spans, record.size)
    return Video(record.name, 1, record.size, record.expressions, ImageFile(record.file), masks, is_image=True)
