"""ReVOS.

ReVOS/
  JPEGImages/VIDEO/FRAME.jpg            VIDEO holds slashes, as in UVO/all/-CiPki3XuVI
  meta_expressions_{train,valid}_.json  as MeViS, with "height", "width" and, per expression, "type_id"
  mask_dict.json                        as MeViS, for both splits
  mask_dict_foreground.json             {VIDEO: {"masks_rle": [code], "foreground_ratio": [float]}}

type_id 0 is referring, 1 reasoning; 2 takes no part in J&F. Follows data/d2_datasets/mevis_utils.py and
utils/evaluation/eval_revos.py of the release.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from virst_jax.data.datasets.files import find_folder
from virst_jax.data.datasets.json_index import JsonMembers, index_members
from virst_jax.data.datasets.layout import Entry
from virst_jax.data.datasets.mevis import open_layout
from virst_jax.data.datasets.readers import SpanMasks
from virst_jax.data.datasets.source import IndexedSource
from virst_jax.data.samples import Video
from virst_jax.errors import UserError

SPLITS = ("train", "valid")
CATEGORIES = {0: "referring", 1: "reasoning", 2: "other"}  # by type_id
FOREGROUND = "mask_dict_foreground.json"


def open_revos(root: Path, split: str) -> IndexedSource:
    """ReVOS; the category of an expression is one of CATEGORIES.

    Raises UserError: a file is missing or not in this layout.
    """
    return open_layout("revos", _folder(root), split, (f"meta_expressions_{split}_.json",), category=_category)


def foreground_reader(root: Path | None, video: Video) -> Callable[[Sequence[int]], np.ndarray]:
    """All annotated objects of a video, for the robustness R: frame numbers -> bool[n, H, W].

    From mask_dict_foreground.json under `root` where it is there, else the union over the video's expressions, which
    is how the file is made.

    Raises:
      UserError: the file does not know the video, or there are no masks at all.
    """
    path = _folder(root) / FOREGROUND if root is not None else None
    if path is not None and path.is_file():
        known = _foreground_index(path, path.stat().st_mtime_ns)
        if video.name not in known:
            raise UserError(f"{path}: does not know the video {video.name}; get the file again, or remove it")
        reader = SpanMasks(str(path), known.spans[video.name], "masks_rle", video.num_frames, video.size)
        return lambda indices: reader(0, indices)
    read_masks = video.read_masks
    if read_masks is None:
        raise UserError(f"{path or video.name}: neither foreground masks nor the masks of {video.name} are there")

    def union(indices: Sequence[int]) -> np.ndarray:
        out = np.zeros((len(indices), *video.size), bool)
        for position in range(len(video.expressions)):
            out |= read_masks(position, indices)
        return out

    return union


def _folder(root: Path) -> Path:
    return find_folder(root, ("ReVOS", "revos"), [f"meta_expressions_{s}_.json" for s in SPLITS])


@lru_cache(maxsize=2)
def _foreground_index(path: Path, changed: int) -> JsonMembers:
    return index_members(path)


def _category(entry: Entry) -> str:
    kind = entry.fields["type_id"]
    return "" if kind.value is None else CATEGORIES.get(kind.integer(), "")
