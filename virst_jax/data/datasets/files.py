"""Files of data sets: JSON, pictures, label maps. Whatever is wrong with one is said in one line with its path.

Axes: H height, W width.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from virst_jax.errors import UserError


def read_json(path: Path, encoding: str = "utf-8") -> Any:
    """The contents of a JSON file.

    Raises:
      UserError: it is missing, unreadable or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the data set's folder") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable ({error}); get the file again") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); get the file again") from error


def read_videos(path: Path) -> dict[str, Any]:
    """The object under "videos" of a meta_expressions.json.

    Raises:
      UserError: the file is missing, or has no such object.
    """
    top = read_json(path)
    videos = top.get("videos") if isinstance(top, dict) else None
    if not isinstance(videos, dict):
        raise UserError(f'{path}: expected an object with "videos" at its top; check that it is the right file')
    return videos


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


def read_image(path: str | Path) -> np.ndarray:
    """A picture, uint8[H, W, 3] (RGB).

    Raises:
      UserError: it is missing, truncated or no picture.
    """
    with _opened(path) as image:
        return np.asarray(_decoded(path, image, "RGB"))


def image_size(path: str | Path) -> tuple[int, int]:
    """Height and width of a picture, from its header.

    Raises:
      UserError: it is missing or no picture.
    """
    with _opened(path) as image:
        return image.height, image.width


def read_labels(path: str | Path) -> np.ndarray:
    """A picture of labels (palette or grey PNG): int32[H, W], the palette's numbers and not its colours.

    Raises:
      UserError: it is missing, truncated, or in colour.
    """
    with _opened(path) as image:
        if image.mode not in ("P", "L", "I", "I;16", "1"):
            raise UserError(f"{path}: a picture of mode {image.mode}; labels need a palette or grey picture")
        return np.asarray(_decoded(path, image, None)).astype(np.int32)


def read_binary(path: str | Path) -> np.ndarray:
    """A mask stored as a picture, of 0 and 255 or of 0 and 1: bool[H, W].

    Raises:
      UserError: it is missing or truncated.
    """
    with _opened(path) as image:
        if image.mode == "P":
            return np.asarray(_decoded(path, image, None)) != 0
        values = np.asarray(_decoded(path, image, "L"))
    return values > 127 if values.max(initial=0) > 1 else values > 0  # JPEG masks are not exactly 0 and 255


def _opened(path: str | Path) -> Image.Image:
    try:
        return Image.open(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; copy it from the data set again") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable picture; copy it from the data set again") from error


def _decoded(path: str | Path, image: Image.Image, mode: str | None) -> Image.Image:
    try:
        image.load()
        return image.convert(mode) if mode and image.mode != mode else image
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path}: truncated or damaged; copy it from the data set again") from error
