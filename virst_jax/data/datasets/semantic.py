"""Semantic segmentation of still images: the expressions of an image are the names of the classes that it shows.

sem_seg/
  ade20k/{images,annotations}/{training,validation}/NAME.{jpg,png}    label 0 is unlabelled, class c has label c + 1
  cocostuff/{train2017,val2017}/NAME.png, coco/{...}/NAME.jpg         label 255 is unlabelled
  mapillary/config_v2.0.json, mapillary/{training,validation}/{images/NAME.jpg, v2.0/labels/NAME.png}
  vlpart/paco/annotations/paco_lvis_v1_{train,val}.json, coco/{train2017,val2017}/NAME.jpg             parts, COCO
  vlpart/pascal_part/{train,val}.json, vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages/NAME.jpg       parts, COCO

A part's expression is "OBJECT PART" or "the PART of the OBJECT", one or the other by image and class (the release
draws). COCO-Stuff classes with "-" in their names are left out. An image without any class is left out where that is
seen in an index (parts), else it is a sample without expressions. Follows data/sem_seg_dataset.py of the release.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from virst_jax.data.datasets.classes import ADE20K, COCO_STUFF
from virst_jax.data.datasets.files import find_folder, find_image, image_files, image_size, read_labels
from virst_jax.data.datasets.json_index import Span, index_members, iterate_elements
from virst_jax.data.datasets.readers import CocoMasks, ImageFile, LabelMasks
from virst_jax.data.datasets.refer import file_of, id_of, size_of
from virst_jax.data.datasets.source import IndexedSource, Problem
from virst_jax.data.samples import Expression, Video
from virst_jax.errors import UserError
from virst_jax.io.json_files import read_json
from virst_jax.io.names import check_name

SPLITS = ("train", "val")
_IGNORE = 255
_FOLDERS = ("sem_seg", "LISA/sem_seg")


@dataclass(frozen=True)
class _LabelRecord:
    name: str
    image: str
    labels: str


class _Info(NamedTuple):
    """An image of an annotations' file."""

    file: str
    size: tuple[int, int]


@dataclass(frozen=True)
class _PartRecord:
    name: str
    image: str
    size: tuple[int, int]
    expressions: tuple[Expression, ...]
    spans: tuple[tuple[Span, ...], ...]  # of annotations, per expression


def open_ade20k(root: Path, split: str) -> IndexedSource:
    """ADE20K. Raises UserError: a folder is missing or empty."""
    folder = find_folder(root, _FOLDERS, ("ade20k",)) / "ade20k"
    part = {"train": "training", "val": "validation"}[split]
    names = dict(enumerate(ADE20K, start=1))
    return _open_labels("ade20k", split, folder / "images" / part, folder / "annotations" / part, names)


def open_cocostuff(root: Path, split: str) -> IndexedSource:
    """COCO-Stuff. Raises UserError: a folder is missing or empty."""
    folder = find_folder(root, _FOLDERS, ("cocostuff",))
    names = {i: name for i, name in enumerate(COCO_STUFF) if "-" not in name}
    part = f"{split}2017"
    return _open_labels("cocostuff", split, folder / "coco" / part, folder / "cocostuff" / part, names)


def open_mapillary(root: Path, split: str) -> IndexedSource:
    """Mapillary Vistas 2.0. Raises UserError: a file or folder is missing or not in this layout."""
    folder = find_folder(root, _FOLDERS, ("mapillary",)) / "mapillary"
    config = folder / "config_v2.0.json"
    labels = [label["readable"].text() for label in read_json(config)["labels"].elements()]
    names = {i: label.lower() for i, label in enumerate(labels) if i != _IGNORE}
    part = folder / {"train": "training", "val": "validation"}[split]
    return _open_labels("mapillary", split, part / "images", part / "v2.0" / "labels", names)


def open_paco_lvis(root: Path, split: str) -> IndexedSource:
    """PACO-LVIS: objects and their parts. Raises UserError: a file is missing or not in this layout."""
    folder = find_folder(root, _FOLDERS, ("vlpart/paco",))
    annotations = folder / "vlpart/paco/annotations" / f"paco_lvis_v1_{split}.json"
    return _open_parts("paco_lvis", split, annotations, folder / "coco", _paco_name)


def open_pascal_part(root: Path, split: str) -> IndexedSource:
    """Pascal-Part. Raises UserError: a file is missing or not in this layout."""
    folder = find_folder(root, _FOLDERS, ("vlpart/pascal_part",)) / "vlpart/pascal_part"
    images = folder / "VOCdevkit/VOC2010/JPEGImages"
    return _open_parts("pascal_part", split, folder / f"{split}.json", images, _pascal_name)


def _open_labels(name: str, split: str, images: Path, labels: Path, classes: dict[int, str]) -> IndexedSource:
    if not labels.is_dir():
        raise UserError(f"{labels}: no such folder; check the data set's folder")
    problems: list[Problem] = []
    records = []
    shown, maps = image_files(images), image_files(labels)
    for stem in sorted(maps):
        label = f"image {stem}"
        place = str(labels / maps[stem][0])
        if stem not in shown:
            problems.append(Problem(place, f"has no image {images / stem}.jpg", label))
            continue
        try:
            check_name(stem, f"{place}: the name")
            image = images / find_image(images, shown, stem, ".jpg")[0]
            map_file = labels / find_image(labels, maps, stem, ".png")[0]
        except UserError as error:
            problems.append(Problem.of(error, label))
            continue
        records.append(_LabelRecord(stem, str(image), str(map_file)))
    for stem in sorted(shown.keys() - maps.keys()):
        place = str(images / shown[stem][0])
        problems.append(Problem(place, f"has no labels in {labels}", f"image {stem}"))
    if not records:
        raise UserError(f"{labels}: no label maps with images in {images}; check the data set's folder")
    return IndexedSource(name, split, str(labels), tuple(records), partial(_labelled, classes), tuple(problems))


def _labelled(classes: dict[int, str], record: _LabelRecord) -> Video:
    labels = read_labels(record.labels)
    shown = [int(value) for value in np.unique(labels) if int(value) in classes]
    expressions = tuple(Expression(classes[value], str(value)) for value in shown)
    size = image_size(record.image)
    path = Path(record.labels)
    masks = LabelMasks(str(path.parent), (path.stem,), tuple((value,) for value in shown), size)
    return Video(record.name, 1, size, expressions, ImageFile(record.image), masks, is_image=True)


def _open_parts(
    name: str, split: str, annotations: Path, images: Path, name_of: Callable[[str], str | tuple[str, str]]
) -> IndexedSource:
    members = index_members(annotations)
    for key in ("images", "annotations", "categories"):
        if key not in members:
            raise UserError(f'{annotations}: has no "{key}"; check that it is the right file')
    problems: list[Problem] = []
    names: dict[str | None, str | tuple[str, str]] = {}
    for category in members["categories"].elements():
        names[id_of(category)] = name_of(category["name"].text())
    infos: dict[str, _Info] = {}
    for _, info in iterate_elements(annotations, members.spans["images"], "images"):
        try:
            image_id = check_name(info["id"].identifier(), f"{info.where}: the id")
            infos[image_id] = _Info(str(images / file_of(info)), size_of(info))
        except UserError as error:
            problems.append(Problem.of(error, info.where.rpartition(": ")[2], str(annotations)))
    # class -> places of its annotations, by image
    shown: dict[str, dict[str | tuple[str, str], list[Span]]] = {}
    for span, annotation in iterate_elements(annotations, members.spans["annotations"], "annotations"):
        label = f"annotation {id_of(annotation)}"
        try:
            category_id, image_id = annotation["category_id"].identifier(), annotation["image_id"].identifier()
        except UserError as error:
            problems.append(Problem.of(error, label, str(annotations)))
            continue
        if category_id not in names or image_id not in infos:
            what = f"category {category_id}" if category_id not in names else f"image {image_id}"
            problems.append(Problem(str(annotations), f"{label} refers to an unknown {what}", label))
        else:
            shown.setdefault(image_id, {}).setdefault(names[category_id], []).append(span)
    records = []
    for image_id, found in infos.items():
        classes = shown.get(image_id)
        if not classes:
            continue  # as the release, which draws again
        expressions = tuple(Expression(_phrase(thing, image_id), str(number)) for number, thing in enumerate(classes))
        places = tuple(map(tuple, classes.values()))
        records.append(_PartRecord(image_id, found.file, found.size, expressions, places))
    make = partial(_parts, str(annotations))
    return IndexedSource(name, split, str(annotations), tuple(records), make, tuple(problems))


def _parts(annotations: str, record: _PartRecord) -> Video:
    masks = CocoMasks(annotations, record.spans, record.size)
    return Video(record.name, 1, record.size, record.expressions, ImageFile(record.image), masks, is_image=True)


def _phrase(category: str | tuple[str, str], image_id: str) -> str:
    if isinstance(category, str):
        return category
    thing, part = category
    even = zlib.crc32(f"{image_id}:{thing}:{part}".encode()) % 2 == 0
    return f"{thing} {part}" if even else f"the {part} of the {thing}"


def _paco_name(name: str) -> str | tuple[str, str]:
    words = [word.split("_(")[0] for word in name.strip().split(":")]
    return words[0] if len(words) == 1 else (words[0], words[1])


def _pascal_name(name: str) -> str | tuple[str, str]:
    thing, _, part = name.strip().partition(":")
    return (thing, part) if part else thing
