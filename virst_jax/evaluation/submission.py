"""Zip archives for the servers of benchmarks whose masks are not public: written from masks, and checked.

A server takes one grey PNG of 0 and 255 a frame, of the frame's size, for every frame of every expression:

    mevis, mevis_v2     VIDEO/EXPRESSION/FRAME.png
    ref_youtube_vos     Annotations/VIDEO/EXPRESSION/FRAME.png
"""

import io
import itertools
import lzma
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image
from tqdm import tqdm

from virst_jax.data.samples import Video
from virst_jax.errors import UserError
from virst_jax.evaluation import bitmask
from virst_jax.evaluation.benchmarks import Opened
from virst_jax.evaluation.predictions import MaskReader, frame_names
from virst_jax.evaluation.scoring import pieces
from virst_jax.io import atomic, images
from virst_jax.io.names import check_name
from virst_jax.io.regular import require_file

ROOTS = {"mevis": "", "mevis_v2": "", "ref_youtube_vos": "Annotations/"}  # within the zip, by data set
_PNG_OVERHEAD = 1 << 20  # bytes of a PNG that are not pixels
# of zipfile: damaged, encrypted, or packed in a way that Python does not know
_ZIP_ERRORS = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
_DATE = (1980, 1, 1, 0, 0, 0)  # the same masks give the same zip


def encode_png(mask: np.ndarray) -> bytes:
    """A mask bool[H, W] as a grey PNG of 0 and 255."""
    content = io.BytesIO()
    Image.fromarray(np.where(mask, np.uint8(255), np.uint8(0))).save(content, "PNG")
    return content.getvalue()


def mask_pngs(video: Video, read_pred: MaskReader) -> Iterator[tuple[str, bytes]]:
    """Names below the root of an archive, and contents, of all PNGs of a video.

    Raises:
      UserError: a mask is missing, damaged or of another size.
    """
    names = frame_names(video)
    where = f"video {video.name}"
    check_name(video.name, "the video's name", nested=True)
    for position, expression in enumerate(video.expressions):
        check_name(expression.id, f"{where}: the expression's id")
        for piece in pieces(video.num_frames):
            masks = bitmask.unpack(read_pred(video, position, piece), video.size[1])
            for index, mask in zip(piece, masks, strict=True):
                name = check_name(names[index], f"{where}: the frame")
                yield f"{video.name}/{expression.id}/{name}.png", encode_png(mask)


def write_pngs(video: Video, read_pred: MaskReader, folder: Path) -> None:
    """Writes a video's masks as PNGs, FOLDER/VIDEO/EXPRESSION/FRAME.png; what is there is left as it is."""
    for name, content in mask_pngs(video, read_pred):
        path = folder / name
        if not path.is_file() or path.read_bytes() != content:
            atomic.write_bytes(path, content, durable=False, parents=True)


def archive_root(dataset: str) -> str:
    """The folder within the zip that the data set's server wants.

    Raises:
      UserError: no server takes masks of this data set.
    """
    if dataset not in ROOTS:
        raise UserError(
            f"{dataset}: there is no server to submit to, its masks are public; use `virst metrics` "
            f"(servers: {', '.join(ROOTS)})"
        )
    return ROOTS[dataset]


def write_submission(source: Opened, read_pred: MaskReader, path: Path, *, progress: bool = True) -> int:
    """Writes the zip of a data set's server; gives the number of PNGs. The zip appears when it is whole and checked.

    Raises:
      UserError: no server takes this data set, or a mask is missing, damaged or of another size.
    """
    root = archive_root(source.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.new_path(path) as beside:
        with zipfile.ZipFile(beside, "w", zipfile.ZIP_STORED) as archive:  # PNGs are compressed
            for video in _videos(source, "writing", progress):
                for name, content in mask_pngs(video, read_pred):
                    archive.writestr(zipfile.ZipInfo(root + name, _DATE), content)
        return check_submission(source, beside, progress=progress)


def check_submission(source: Opened, path: Path, *, progress: bool = True) -> int:
    """Checks a zip for a data set's server: names, completeness, sizes, values; gives the number of PNGs.

    Raises:
      UserError: what is wrong, the first of each kind named and the others counted.
    """
    root = archive_root(source.name)
    require_file(path, "check its name")
    try:
        archive = zipfile.ZipFile(path)
    except (*_ZIP_ERRORS, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a zip ({atomic.reason(error)}); write it again with `virst submit`") from error
    with archive:
        # is_dir of ZipInfo fails for an entry whose name is empty
        files = [i.filename for i in archive.infolist() if not i.filename.endswith("/")]
        expected: set[str] = set()
        for video in _videos(source, "checking", progress):
            names = frame_names(video)
            wanted = [f"{root}{video.name}/{e.id}/{n}.png" for e, n in itertools.product(video.expressions, names)]
            expected.update(wanted)
            present = set(wanted).intersection(archive.NameToInfo)
            for name in wanted:
                if name in present:
                    _check_png(path, name, archive, video.size)
    missing = sorted(expected.difference(files))
    if missing:
        raise UserError(f"{path}: lacks {missing[0]}{_more(missing)}; every frame of every expression must be there")
    if len(files) != len(set(files)):
        twice = Counter(files).most_common(1)[0][0]
        raise UserError(f"{path}: holds {twice} twice; write it again with `virst submit`")
    extra = sorted(set(files) - expected)
    if extra:
        first = extra[0] or "an entry without a name"
        raise UserError(f"{path}: holds {first}{_more(extra)}, which the server does not expect; remove it")
    return len(files)


def _check_png(path: Path, name: str, archive: zipfile.ZipFile, size: tuple[int, int]) -> None:
    where, damaged = f"{path}: {name}", "write the zip again"
    limit = 2 * size[0] * size[1] + _PNG_OVERHEAD
    if archive.getinfo(name).file_size > limit:
        raise UserError(f"{where} unpacks to {archive.getinfo(name).file_size} bytes, a mask of this video to less")
    try:
        with archive.open(name) as entry:
            content = entry.read(limit + 1)
    except _ZIP_ERRORS as error:
        raise UserError(f"{where} is damaged ({atomic.reason(error)}); {damaged}") from error
    try:
        with images.opened(content, name=where, remedy=damaged) as image:
            if image.format != "PNG" or image.mode != "L":
                raise UserError(f"{where} is a {image.format} of mode {image.mode}; the server takes grey 8-bit PNGs")
            shape = image.height, image.width
            if shape != size:
                raise UserError(f"{where} has {shape[0]}x{shape[1]} pixels, the video {size[0]}x{size[1]}")
            values = np.unique(np.asarray(images.decoded(content, image, name=where, remedy=damaged)))
    except UserError as error:
        if error.__cause__ is None:
            raise
        raise UserError(f"{where} is damaged ({str(error).removeprefix(where + ': ')})") from error
    if not set(values.tolist()) <= {0, 255}:
        raise UserError(f"{where} holds the values {values.tolist()[:6]}; the server takes 0 and 255")


def _videos(source: Opened, what: str, progress: bool) -> Iterator[Video]:
    order = sorted((name, index) for index, name in enumerate(source.names))
    for _, index in tqdm(order, desc=what, unit="video", disable=None if progress else True):
        yield cast(Video, source[index])


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
