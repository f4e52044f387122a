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
from typing import Any

import numpy as np

from virst_jax.data.datasets.files import find_folder, image_size, read_json
from virst_jax.data.datasets.mevis import parse_text
from virst_jax.data.datasets.readers import ImageFile, Size, decode_mask
from virst_jax.data.datasets.source import IndexedSource, Problem, unknown_keys
from virst_jax.data.samples import Expression, Video
from virst_jax.errors import UserError

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
        for shape in read_annotation(self.path)["shapes"]:
            label = str(shape.get("label", "")).lower()
            if label != "flag":  # deprecated by the data set
                points = np.asarray(shape["points"], np.float64).reshape(-1).tolist()
                drawn.append((label, decode_mask([points], self.size, self.path)))
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
    for image in sorted(folder.glob("*.jpg")):
        annotation = image.with_suffix(".json")
        try:
            fields = read_annotation(str(annotation))
        except UserError as error:
            problems.append(Problem(str(annotation), str(error).removeprefix(f"{annotation}: "), f"image {image.stem}"))
            continue
        problems += unknown_keys(fields, _KEYS, str(annotation))
        explanation = explanations.get(image.stem, "")
        category = "sentence" if fields.get("is_sentence") else "phrase"
        expressions = []
        for i, text in enumerate(fields["text"]):
            words = parse_text(str(annotation), text, f"text {i} of {image.stem}", problems)
            if words is not None:
                expressions.append(Expression(words, str(i), category, explanation=explanation))
        if expressions:
            records.append(_Record(image.stem, str(image), str(annotation), tuple(expressions)))
        else:
            problems.append(Problem(str(annotation), "no text is left", f"image {image.stem}"))
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
    items = read_json(path)
    if not isinstance(items, list) or not all({"image", "outputs"} <= item.keys() for item in items):
        raise UserError(f'{path}: expected a list of "image" and "outputs"; get the file again')
    return {Path(item["image"]).stem: item["outputs"] for item in items}


def read_annotation(path: str) -> Any:
    """A ReasonSeg file, in UTF-8 or, as some are, in Windows' Latin letters.

    Raises UserError: it is missing or not in its form.
    """
    try:
        fields = read_json(Path(path))
    except UserError as error:
        if not isinstance(error.__cause__, UnicodeDecodeError):
            raise
        fields = read_json(Path(path), "cp1252")
    if not isinstance(fields, dict) or not {"text", "shapes"} <= fields.keys() or not isinstance(fields["text"], list):
        raise UserError(f'{path}: expected "text" (a list) and "shapes"; get the file again')
    return fields


def _image(record: _Record) -> Video:
    size = image_size(record.image)
    masks = ShapeMasks(record.annotation, size)
    return Video(record.name, 1, size, record.expressions, ImageFile(record.image), masks, is_image=True)
