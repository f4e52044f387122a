"""Predicted masks on disk: one JSON file an expression with COCO run-length codes, or folders of PNGs.

Axes: T frames of a video, n frames asked for, H height, W width, D words of packed bits (see bitmask.py).

A stored file is FOLDER/VIDEO/EXPRESSION.json, `{"video", "expression", "text", "fingerprint", "size": [H, W], "scores":
[T floats], "counts": [T strings], "crc32"}`, with the characters of a name that a file system may dislike as %XX. It
appears whole, and says itself whether it is: the checksum covers all codes.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote

import numpy as np

from virst_jax.data.samples import Video
from virst_jax.errors import UserError
from virst_jax.evaluation import bitmask
from virst_jax.evaluation.rle import pack_codes
from virst_jax.io import atomic, images, mask_images
from virst_jax.io.json_files import is_whole, read_json
from virst_jax.io.names import check_name, name_fault, shown
from virst_jax.io.regular import ADVICE, require_file

_MAX_QUOTED = 200  # characters of a file's name

# an expression's position and frame numbers of a video -> packed masks uint64[n, H, D]
MaskReader = Callable[[Video, int, Sequence[int]], np.ndarray]


def mask_file(folder: Path, video: str, expression: str) -> Path:
    """Where an expression's masks are stored.

    Raises:
      UserError: as `folder_of`, or the expression's id cannot be written in UTF-8.
    """
    if not is_whole(expression):
        raise UserError(f"video {video}: an expression cannot have the id{shown(expression)}, half of a character")
    return folder_of(folder, video) / (_file_name(expression) + ".json")


def folder_of(folder: Path, video: str) -> Path:
    """The folder of a video; slashes in its name become folders, and no name leads out of `folder`.

    Raises:
      UserError: no folder can have the name, see io/names.py.
    """
    fault = name_fault(video, nested=True)
    if fault:
        raise UserError(f"a video cannot be named{shown(video)}: it {fault}")
    return folder.joinpath(*map(_file_name, video.split("/")))


def _file_name(name: str) -> str:
    quoted = quote(name, safe=" +=,@()'!")
    if len(quoted) <= _MAX_QUOTED:
        return quoted
    # letters of most scripts take nine characters each
    return f"{quoted[: _MAX_QUOTED - 17]}~{hashlib.sha256(name.encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class StoredMasks:
    """The masks of an expression as read from, or to be written to, its file."""

    video: str
    expression: str
    text: str
    fingerprint: str  # of the settings that made them
    size: tuple[int, int]  # height, width
    counts: tuple[str, ...]  # per frame
    scores: tuple[float, ...]  # per frame, of the object's presence

    @property
    def checksum(self) -> int:
        return zlib.crc32("\n".join(self.counts).encode("ascii"))


def write_masks(folder: Path, masks: StoredMasks) -> Path:
    """Writes the file of an expression, whole."""
    path = mask_file(folder, masks.video, masks.expression)
    content = {
        "video": masks.video,
        "expression": masks.expression,
        "text": masks.text,
        "fingerprint": masks.fingerprint,
        "size": list(masks.size),
        "scores": [round(float(s), 6) for s in masks.scores],
        "counts": list(masks.counts),
        "crc32": masks.checksum,
    }
    atomic.write_bytes(path, json.dumps(content, ensure_ascii=False).encode(), parents=True)
    return path


def read_masks(path: Path) -> StoredMasks:
    """The masks in a file.

    Raises:
      UserError: the file is missing, truncated, changed or of another form.
    """
    advice = "delete it and run the evaluation again"
    require_file(path, "run the evaluation again")
    try:
        content = read_json(path)
        masks = StoredMasks(
            video=content["video"].text(),
            expression=content["expression"].text(),
            text=content["text"].text(),
            fingerprint=content["fingerprint"].text(),
            size=(content["size"][0].integer(1), content["size"][1].integer(1)),
            counts=tuple(code.text() for code in content["counts"].elements()),
            scores=tuple(score.number() for score in content["scores"].elements()),
        )
        stated = content["crc32"].integer()
    except UserError as error:
        reason = str(error).removeprefix(f"{path}: ").removesuffix(f"; {ADVICE}")
        raise UserError(f"{path}: not a file of masks ({reason}); {advice}") from error
    if not all(code.isascii() for code in masks.counts) or masks.checksum != stated:
        raise UserError(f"{path}: damaged (its checksum differs); {advice}")
    return masks


def check_masks(masks: StoredMasks, video: Video, position: int, fingerprint: str | None = None) -> str:
    """What is wrong with stored masks as those of an expression of `video`; empty if nothing is."""
    expression = video.expressions[position]
    if (masks.video, masks.expression) != (video.name, expression.id):
        return f"holds expression {masks.expression} of {masks.video}"
    if fingerprint is not None and masks.fingerprint != fingerprint:
        return "was made with other settings"
    if masks.text != expression.text:
        return f"was made for the text {masks.text!r}, not {expression.text!r}"
    if masks.size != video.size:
        return f"holds masks of {_by(masks.size)} pixels, the video has {_by(video.size)}"
    if len(masks.counts) != video.num_frames:
        return f"holds {len(masks.counts)} frames, the video has {video.num_frames}"
    return ""


@dataclass(frozen=True)
class StoredReader:
    """A `MaskReader` of the JSON files under `folder`."""

    folder: str

    def __call__(self, video: Video, position: int, indices: Sequence[int]) -> np.ndarray:
        path = mask_file(Path(self.folder), video.name, video.expressions[position].id)
        masks = _read_cached(path, _stamp(path))
        wrong = check_masks(masks, video, position)
        if wrong:
            raise UserError(f"{path}: {wrong}; delete it and run the evaluation again")
        return pack_codes([masks.counts[i] for i in indices], masks.size)


@dataclass(frozen=True)
class PngReader:
    """A `MaskReader` of other systems' results: FOLDER/VIDEO/EXPRESSION/FRAME.png of 0 and 255, or of 0 and 1.

    The folder may hold them under `Annotations`; of a video's name with slashes the last part alone is found too, as
    the release's utils/evaluation/eval_rvos.py has it.
    """

    folder: str

    def __call__(self, video: Video, position: int, indices: Sequence[int]) -> np.ndarray:
        folder = self.find(video, position)
        names = frame_names(video)
        return np.stack([bitmask.pack(read_png(folder / f"{names[i]}.png", video.size)) for i in indices])

    def find(self, video: Video, position: int) -> Path:
        """The folder of an expression.

        Raises:
          UserError: there is none.
        """
        expression = check_name(video.expressions[position].id, f"video {video.name}: the expression's id")
        check_name(video.name, "the video's name", nested=True)
        root = png_root(Path(self.folder))
        for name in (video.name, video.name.rsplit("/", 1)[-1]):
            if (root / name / expression).is_dir():
                return root / name / expression
        raise UserError(
            f"{root / video.name / expression}: no such folder; the masks of expression {expression} of video "
            f"{video.name} are missing"
        )


def png_root(folder: Path) -> Path:
    """`folder`, or the folder `Annotations` that is all it holds of folders."""
    inner = folder / "Annotations"
    return inner if inner.is_dir() and not any(f.is_dir() and f != inner for f in folder.iterdir()) else folder


def frame_names(video: Video) -> tuple[str, ...]:
    """Names of the frames' files, without suffix."""
    return video.frame_names or tuple(f"{i:05d}" for i in range(video.num_frames))


def read_png(path: Path, size: tuple[int, int] | None) -> np.ndarray:
    """A mask of 0 and 255, of 0 and 1, or of palette entries: bool[H, W].

    Raises:
      UserError: it is missing, damaged, of other values, or not of `size`.
    """
    values = read_index(path, size)
    others = [int(v) for v in np.unique(values) if v]
    full = 65535 if values.dtype.itemsize > 1 else 255
    if len(others) > 1 or (others and others[0] not in (1, 255, full)):
        present = np.unique(values)[:6].tolist()
        raise UserError(f"{path}: holds the values {present}; a mask has 0 and 255, or 0 and 1")
    return values != 0


def read_index(path: Path, size: tuple[int, int] | None) -> np.ndarray:
    """A PNG's values, of a palette its indices: integers [H, W].

    Raises:
      UserError: it is missing, damaged, or not of `size`.
    """
    remedy = "write it again"
    require_file(path, "the mask of this frame is missing")
    found = images.read_size(path, upright=False, remedy=remedy)
    if size is not None and found != size:  # before it is decoded, for it may be huge
        raise UserError(
            f"{path}: a mask of {_by(found)} pixels, the video has {_by(size)}; write masks of the video's size"
        )
    return mask_images.read_index(path, remedy=remedy)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_mtime_ns, stat.st_size


@lru_cache(maxsize=4)
def _read_cached(path: Path, stamp: tuple[int, int]) -> StoredMasks:
    return read_masks(path)


def _by(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"
