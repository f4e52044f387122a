"""LV-VIS, train, in MeViS layout; an expression is the name of a category, whose underscores become spaces.

lvvis/train/{JPEGImages, meta_expressions.json, mask_dict.json}. Follows data/rvos_dataset.py of the release.
"""

from pathlib import Path

from virst_jax.data.datasets.files import find_folder
from virst_jax.data.datasets.mevis import META, open_layout
from virst_jax.data.datasets.source import IndexedSource

SPLITS = ("train",)


def open_lvvis(root: Path, split: str) -> IndexedSource:
    """LV-VIS. Raises UserError: a file is missing or not in this layout."""
    folder = find_folder(root, ("lvvis", "LVVIS", "LV-VIS"), SPLITS) / split
    return open_layout("lvvis", folder, split, META, rewrite=_words)


def _words(text: str) -> str:
    return text.replace("_", " ")
