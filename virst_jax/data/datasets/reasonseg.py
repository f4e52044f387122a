"""ReasonSeg: questions and phrases about a still image.

reason_seg/{train,val,test}/NAME.jpg and NAME.json   (or reason_seg/ReasonSeg/..., as it is unpacked)
  {"text": [str], "is_sentence": bool, "shapes": [{"label": "target" | "ignore" | "flag", "points": [[x, y]]}]}
reason_seg/explanatory/train.json                    [{"image": NAME.jpg, "query": str, "outputs": str}]

All texts of a file mean the same mask, the union of its targets. Shapes are drawn from the largest to the smallest, a
later one over an earlier; `ignore` pixels count as background for the release, which lets a target keep what an ignore
shape covers, and are left out by LISA's scoring (`read_masks.ignored`). Follows data/reason_seg_dataset.py and
data/data_processing.py of the release.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from virst_jax.data.datasets.files import find_folder, image_files, image_size
from virst_jax.data.datasets.layout import parse_text
from virst_jax.data.datasets.readers import ImageFile
from virst_jax.data.datasets.source import IndexedSource, Problem, unknown_keys
from virst_jax.data.samples import Expression, Video
from virst_jax.errors import UserError
from virst_jax.io.json_files import Json, read_json
from virst_jax.io.masks import Size, draw_polygons
from virst_jax.io.names import check_name

SPLITS = ("train", "val", "test")
_KEYS = frozenset(
    {"text", "is_sentence", "shapes", "version", "flags", "imagePath", "imageData", "imageHeight", "imageWidth"}
)


@dataclass(frozen=True)
class _Record:
    name: str
    image: str
    annotation: str
    expressions: tuple[Expression, ...]


@dataclass(frozen=True)
class ShapeMasks:
    """Masks of a ReasonSeg file."""

    path: str
    size: Size

    def __call__(self, position: int, indices: Sequence[int]) -> np.ndarray:
        return np.repeat(self._draw("target")[None], len(indices), axis=0)

    def ignored(self) -> np.ndarray:
        """Pixels that LISA's scoring leaves out: bool[H, W], those whose last shape is an `ignore` one."""
        last = np.zeros(self.size, bool)
        for label, mask in self._shapes():
            last[mask] = "ignore" in label
        return last

    def _draw(self, wanted: str) -> np.ndarray:
        mask = np.zeros(self.size, bool)
        for label, shape in self._shapes():
            if "ignore" not in label:
                mask |= shape
        return mask

    def _shapes(self) -> list[tuple[str, np.ndarray]]:
        drawn = []
        for shape in read_annotation(self.path)["shapes"].elements():
            label = shape["label"].text().lower() if "label" in shape else ""
            if label != "flag":  # deprecated by the data set
                points = [value for point in shape["points"].elements() for value in _point(point)]
                drawn.append((label, draw_polygons([points], self.size, shape.where)))
        return sorted(drawn, key=lambda item: -int(item[1].sum()))


def open_reasonseg(root: Path, split: str) -> IndexedSource:
    """ReasonSeg; an expression's category is "sentence" or "phrase", its id the number of the text.

    Those of `train` have the explanation of their image.

    Raises UserError: a file is missing or not in this layout.
    """
    folder = find_folder(root, ("reason_seg", "ReasonSeg", "reason_seg/ReasonSeg", "LISA/reason_seg"), SPLITS) / split
    problems: list[Problem] = []
    records = []
    explanations = read_explanations(root) if split == "train" else {}
    for stem, files in sorted(image_files(folder).items()):
        annotation = folder / f"{stem}.json"
        label = f"image {stem}"
        try:
            check_name(stem, f"{annotation}: the name")
            if len(files) > 1:
                raise UserError(f"{annotation}: belongs to both {files[0]} and {files[1]}; remove one of them")
            fields = read_annotation(str(annotation))
            is_sentence = fields["is_sentence"].value is not None and fields["is_sentence"].boolean()
            texts = list(fields["text"].elements())
        except UserError as error:
            problems.append(Problem.of(error, label, str(annotation)))
            continue
        problems += unknown_keys(fields, _KEYS, str(annotation))
        explanation = explanations.get(stem, "")
        category = "sentence" if is_sentence else "phrase"
        expressions = []
        for i, text in enumerate(texts):
            words = parse_text(str(annotation), text, f"text {i} of {stem}", problems)
            if words is not None:
                expressions.append(Expression(words, str(i), category, explanation=explanation))
        if expressions:
            records.append(_Record(stem, str(folder / files[0]), str(annotation), tuple(expressions)))
        else:
            problems.append(Problem(str(annotation), "no text is left", label))
    if not records:
        raise UserError(f"{folder}: no pairs of NAME.jpg and NAME.json; check the data set's folder")
    return IndexedSource("reasonseg", split, str(folder), tuple(records), _image, tuple(problems))


def read_explanations(root: Path) -> dict[str, str]:
    """Explanations in text by image name, which the release trains on; empty if the file is not there.

    Raises UserError: it is not in its form.
    """
    folder = find_folder(root, ("reason_seg", "ReasonSeg", "reason_seg/ReasonSeg", "LISA/reason_seg"), SPLITS)
    path = next((p for p in (folder / "explanatory/train.json", folder / "train.json") if p.is_file()), None)
    if path is None:
        return {}
    return {Path(item["image"].text()).stem: item["outputs"].text() for item in read_json(path).elements()}


def read_annotation(path: str) -> Json:
    """A ReasonSeg file, in UTF-8 or, as some are, in Windows' Latin letters.

    Raises UserError: it is missing or not in its form.
    """
    try:
        fields = read_json(Path(path))
    except UserError as error:
        if not isinstance(error.__cause__, UnicodeDecodeError):
            raise
        fields = read_json(Path(path), "cp1252")
    if not isinstance(fields.value, dict) or not {"text", "shapes"} <= fields.value.keys():
        raise UserError(f'{path}: expected "text" (a list) and "shapes"; get the file again')
    return fields


def _point(place: Json) -> tuple[float, float]:
    if len(place) != 2:
        raise place.error("expected a point of two numbers")
    return place[0].number(), place[1].number()


def _image(record: _Record) -> Video:
    size = image_size(record.image)
    masks = ShapeMasks(record.annotation, size)
    return Video(record.name, 1, size, record.expressions, ImageFile(record.image), masks, is_image=True)
