"""Files of data sets: folders, images, label maps. Whatever is wrong with one is said in one line with its path.

Axes: H height, W width.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from virst_jax.errors import UserError
from virst_jax.io import images, mask_images
from virst_jax.io.names import find_entry, listed, same_name

AGAIN = "copy it from the data set again"


def find_folder(root: Path, names: Sequence[str], markers: Sequence[str]) -> Path:
    """The data set's folder: `root` itself or one of its subfolders `names`, whichever holds one of `markers`.

    Raises:
      UserError: none does.
    """
    for folder in (root, *(root / name for name in names)):
        if any((folder / marker).exists() for marker in markers):
            return folder
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the data set's folder")
    wanted = " or ".join(markers[:3])
    under = f" (nor in {', '.join(names)} under it)" if names else ""
    raise UserError(f"{root}: holds no {wanted}{under}; give the data set's folder, or the one above it")


def first_file(folder: Path, names: Sequence[str]) -> Path:
    """The first of `names` that is a file in `folder`.

    Raises:
      UserError: there is none.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: holds no {' or '.join(names)}; check the data set's folder")


def image_files(folder: str | Path) -> dict[str, list[str]]:
    """Names of the image files in a folder, by name without suffix. Accents are the same however they are stored."""
    found: dict[str, list[str]] = {}
    for file in sorted(listed(folder)):
        stem, suffix = os.path.splitext(file)
        if suffix.lower() in images.SUFFIXES and not file.startswith("._"):  # macOS leaves such files on other disks
            found.setdefault(same_name(stem), []).append(file)
    return found


def find_image(folder: str | Path, files: dict[str, list[str]], name: str, default: str) -> tuple[str, str]:
    """The file of an image by its name as a list has it, without suffix or with it.

    Args:
      files: of the folder, see `image_files`.
      default: suffix of the file where there is none.

    Returns:
      The file's name, and the image's name without suffix.

    Raises:
      UserError: there are several.
    """
    found = files.get(same_name(name), [])
    if not found:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in images.SUFFIXES:
            found = [file for file in files.get(same_name(stem), []) if same_name(file) == same_name(name)]
            if found:
                name = stem
    if len(found) > 1:
        raise UserError(f"{folder}: holds {found[0]} and {found[1]}, two images of one name; remove one of them")
    return (found[0] if found else name + default), name


def find_mask(folder: str, name: str) -> str:
    """The path of the mask of a frame: FOLDER/NAME.png, or the same with another suffix or other accents.

    Raises:
      UserError: there are several.
    """
    plain = os.path.join(folder, f"{name}.png")
    if name.isascii() and os.path.isfile(plain):
        return plain
    folder = find_entry(*os.path.split(folder))
    return os.path.join(folder, find_image(folder, image_files(folder), name, ".png")[0])


def read_image(path: str | Path) -> np.ndarray:
    """An image as it is stored, uint8[H, W, 3] (RGB).

    Raises:
      UserError: it is missing, truncated, too large or no image.
    """
    return images.read_image(path, upright=False, remedy=AGAIN)


def image_size(path: str | Path) -> tuple[int, int]:
    """Height and width of an image as it is stored, from its header.

    Raises:
      UserError: it is missing, too large or no image.
    """
    return images.read_size(path, upright=False, remedy=AGAIN)


def read_labels(path: str | Path) -> np.ndarray:
    """A label map (palette or grey image): int32[H, W], a palette's indices and not its colours.

    Raises:
      UserError: it is missing, truncated, or in colour.
    """
    return mask_images.read_labels(path, remedy=AGAIN)


def read_binary(path: str | Path) -> np.ndarray:
    """A mask stored as an image: bool[H, W].

    Raises:
      UserError: it is missing or truncated, or its values are not those of a mask.
    """
    return mask_images.read_binary(path, remedy=AGAIN)
