"""An uploaded video: checked against the limits, decoded once, and kept as images for the browser.

Axes: H height, W width.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image

from virst_jax.errors import UserError
from virst_jax.io import images
from virst_jax.io.names import name_fault
from virst_jax.io.video import FRAME_SUFFIXES, Reader, StridedReader, open_video
from virst_jax.serve.limits import Limits, Refusal

SHOWN_SIDE = 1600  # of the images for the browser, the longer one; masks are not affected
JPEG_QUALITY = 88
NAME_LENGTH = 100

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Upload:
    """A file as it has arrived.

    Attributes:
      folder: of the session; the file and its frames are in it.
      path: of the file, whose name is ours.
      name: as the user calls it, for messages only.
      every: take every k-th frame.
      allow_damaged: go on with a damaged video.
    """

    folder: Path
    path: Path
    name: str
    every: int = 1
    allow_damaged: bool = False

    @property
    def stem(self) -> str:
        """A name for files that are downloaded."""
        stem = Path(self.name).stem
        return "video" if name_fault(stem) else stem

    def open(self, limits: Limits) -> StridedReader:
        """The frames that are taken. No more than the limit and one are looked at.

        Raises:
          UserError: no video.
        """
        reader = open_video(self.path, allow_damaged=self.allow_damaged)
        return StridedReader(reader, self.every, limits.frames + 1)

    def frame_path(self, frame: int) -> Path:
        return self.folder / "frames" / f"{frame:05d}.jpg"


def file_name(given: str | None) -> tuple[str, str]:
    """How messages call a file, and the name under which it is stored, from what a client says it is called."""
    last = re.split(r"[/\\]", given or "")[-1]
    shown = "".join(c for c in last if c.isprintable())[:NAME_LENGTH].strip() or "video"
    suffix = Path(shown).suffix.lower()
    return shown, "video" + (suffix if re.fullmatch(r"\.[a-z0-9]{1,5}", suffix) else "")


def read_upload(upload: Upload, limits: Limits, progress: Progress) -> StridedReader:
    """Decodes a video whole, and writes its frames as images.

    Args:
      progress: called with "decode", how many frames are done, and 0; what it raises ends the work.

    Raises:
      UserError: no video, a damaged one, or one over the limits.
    """
    _check_size(upload, limits)
    whole = open_video(upload.path, allow_damaged=upload.allow_damaged)
    _check_pixels(whole.size, limits)
    (upload.folder / "frames").mkdir()
    count = 0
    for number, frame in enumerate(whole):
        if number % upload.every:
            continue
        if count == limits.frames:
            raise Refusal(
                f"{upload.name}: has more than {limits.frames} frames, the limit of this server; cut it, or take every "
                f"second frame or fewer (now: every {upload.every})",
                413,
            )
        _write(frame, upload.frame_path(count))
        count += 1
        progress("decode", count, 0)
    reader = upload.open(limits)
    if reader.num_frames != count:
        raise UserError(f"{upload.name}: {reader.num_frames} frames, {count} when it was read before; upload it again")
    return reader


def _check_size(upload: Upload, limits: Limits) -> None:
    """What a file's header says, before anything is decoded."""
    if not upload.path.stat().st_size:
        raise UserError(f"{upload.name}: the file is empty; choose another one")
    if upload.path.suffix.lower() in FRAME_SUFFIXES:
        _check_pixels(images.read_size(upload.path), limits)
        if images.num_frames(upload.path) > limits.frames * upload.every:
            raise Refusal(f"{upload.name}: has more than {limits.frames} frames, the limit of this server; cut it", 413)
        return
    try:
        with av.open(str(upload.path), metadata_errors="replace") as container:
            for stream in container.streams.video:
                if stream.codec_context is not None:
                    _check_pixels((stream.height, stream.width), limits)
    except (av.error.FFmpegError, OSError, ValueError):
        return  # the reader says what is wrong with it


def _check_pixels(size: tuple[int, int], limits: Limits) -> None:
    if size[0] * size[1] > limits.pixels:
        raise Refusal(
            f"frames of {size[1]}x{size[0]} pixels are too large for this server, which takes {limits.pixels:,}; "
            "scale the video down",
            413,
        )


def _write(frame: np.ndarray, path: Path) -> None:
    image = Image.fromarray(frame)
    image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    image.save(path, quality=JPEG_QUALITY)


def times_of(reader: Reader) -> list[float] | None:
    """When the frames are shown, in seconds from the video's start; None: unknown."""
    times = reader.times_of(range(reader.num_frames))
    return None if times is None else [round(float(time), 6) for time in times]
