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

from virst_jax.data.datasets.files import find_folder
from virst_jax.data.datasets.json_index import Span, index_members, iterate_elements
from virst_jax.data.datasets.layout import parse_text
from virst_jax.data.datasets.pickles import read_plain_pickle
from virst_jax.data.datasets.readers import CocoMasks, ImageFile
from virst_jax.data.datasets.source import IndexedSource, Problem, unknown_keys
from virst_jax.data.samples import Expression, Video
from virst_jax.errors import UserError
from virst_jax.io.json_files import Json
from virst_jax.io.masks import MAX_PIXELS, check_size
from virst_jax.io.names import check_name

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
    refs = Json(read_plain_pickle(refs_file), str(refs_file))
    problems: list[Problem] = []
    chosen: dict[str, list[_Ref]] = {}
    for number, fields in enumerate(refs.elements()):
        try:
            ref = _ref(fields, split)
        except UserError as error:
            problems.append(Problem.of(error, f"reference {number}", str(refs_file)))
            continue
        if ref is not None:
            problems += unknown_keys(fields, _REF_KEYS, f"{refs_file}: ref {ref.label}")
            chosen.setdefault(ref.image_id, []).append(ref)
    instances = folder / name / "instances.json"
    members = index_members(instances)
    for key in ("images", "annotations"):
        if key not in members:
            raise UserError(f'{instances}: has no "{key}"; get the file again')
    wanted = {i for refs in chosen.values() for ref in refs for i in ref.annotations}
    infos = iterate_elements(instances, members.spans["images"], "images")
    images = {i: info for i, info in ((id_of(info), info) for _, info in infos) if i is not None and i in chosen}
    annotations = iterate_elements(instances, members.spans["annotations"], "annotations")
    spans = {
        i: span for i, span in ((id_of(value), span) for span, value in annotations) if i is not None and i in wanted
    }
    records = []
    for image_id, of_image in chosen.items():
        record = _record(refs_file, name, folder, image_id, images.get(image_id), of_image, spans, problems)
        if record is not None:
            records.append(record)
    make = partial(_image, str(instances))
    return IndexedSource(name, split, str(folder), tuple(records), make, tuple(problems))


@dataclass(frozen=True)
class _Ref:
    """A reference to an object of an image, as the pickle has it."""

    label: str
    image_id: str
    annotations: tuple[str, ...]
    sentences: tuple[Json, ...]


def _ref(fields: Json, split: str) -> _Ref | None:
    """A reference, if it belongs to the split. Raises UserError: it is not in the layout."""
    if not in_split(fields["split"].text(), split):
        return None
    label = fields["ref_id"].identifier() if "ref_id" in fields else "?"
    annotations = tuple(i for i in fields["ann_id"].identifiers() if i != "-1")  # -1 stands for none
    return _Ref(label, fields["image_id"].identifier(), annotations, tuple(fields["sentences"].elements()))


def id_of(entry: Json) -> str | None:
    """The id of an image or annotation of an instances.json; None: it has none that could be meant."""
    value = entry.value.get("id") if isinstance(entry.value, dict) else None
    return str(value) if type(value) in (int, str) else None


def in_split(stated: str, split: str) -> bool:
    """Whether a reference marked `stated` (as "train", "testA", "testAB") belongs to a split."""
    if split.startswith("test"):
        return stated.startswith("test") and split[4:] in stated[4:]
    return stated == split


def size_of(info: Json) -> tuple[int, int]:
    """Height and width of an image of an instances.json. Raises UserError: they are not there, or no frame's."""
    size = info["height"].integer(1, MAX_PIXELS), info["width"].integer(1, MAX_PIXELS)
    check_size(size, info.where)
    return size


def file_of(info: Json) -> str:
    """The file of an image of an instances.json. Raises UserError: it is not there, or leads elsewhere."""
    place = info["file_name"]
    return check_name(place.text(), place.where, nested=True)


def _record(
    refs_file: Path,
    name: str,
    folder: Path,
    image_id: str,
    image: Json | None,
    refs: list[_Ref],
    spans: dict[str, Span],
    problems: list[Problem],
) -> _Record | None:
    where = f"{refs_file}: image {image_id}"
    if image is None:
        problems.append(Problem(where, "is not in instances.json", f"image {image_id}"))
        return None
    try:
        file_name, size = file_of(image), size_of(image)
        check_name(image_id, f"{where}: the id")
    except UserError as error:
        problems.append(Problem.of(error, f"image {image_id}", image.file))
        return None
    expressions: dict[str, Expression] = {}
    places: list[tuple[Span, ...]] = []
    for ref in refs:
        strange = [i for i in ref.annotations if i not in spans]
        if strange:
            label = f"ref {ref.label} of image {image_id}"
            problems.append(Problem(where, f"annotation {strange[0][:40]} is not in instances.json", label))
            continue
        for sentence in ref.sentences:
            try:
                sent_id = sentence["sent_id"].identifier() if "sent_id" in sentence else str(len(expressions))
                label = f"sentence {sent_id} of image {image_id}"
                check_name(sent_id, f"{where}: the id of a sentence")
                if sent_id in expressions:
                    raise UserError(f"{where}: the sentence {sent_id} is there twice")
                text = parse_text(where, sentence["sent"], label, problems)
            except UserError as error:
                problems.append(Problem.of(error, f"a sentence of image {image_id}", where))
                continue
            if text is not None:
                expressions[sent_id] = Expression(text.strip(), sent_id)
                places.append(tuple(spans[i] for i in ref.annotations))
    if not expressions:
        problems.append(Problem(where, "no sentence is left", f"image {image_id}"))
        return None
    if name == "refclef":
        path = folder / "images/saiapr_tc-12" / file_name
    else:
        path = folder / "images/mscoco/images" / ("val2014" if "val2014" in file_name else "train2014") / file_name
    return _Record(image_id, str(path), size, tuple(expressions.values()), tuple(places))


def _image(instances: str, record: _Record) -> Video:
    masks = CocoMasks(instances, record.spans, record.size)
    return Video(record.name, 1, record.size, record.expressions, ImageFile(record.file), masks, is_image=True)
