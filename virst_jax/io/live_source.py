"""Frames from what is read once, as it comes: cameras, pipes, network streams, generators.

Axes: H height, W width, 3 RGB.
"""

from __future__ import annotations

import contextlib
import glob
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from virst_jax.errors import UserError
from virst_jax.io import arrays, images
from virst_jax.io.atomic import reason
from virst_jax.io.reader import Reader

PIPE = "-"
OPEN_SECONDS, READ_SECONDS = 10.0, 10.0  # that a network stream may be silent for
# what FFmpeg reads ahead to find out what a stream is; of a pipe that is silent it would wait for more
_PROBE = {"probesize": "1000000", "analyzeduration": "1000000"}
_CAMERA = "/dev/video"


@dataclass(frozen=True, eq=False)
class SourceFrame:
    """A frame as it came."""

    index: int  # counted from 0
    time: float | None  # seconds from the first frame on, as the source states them; None: it states none
    image: np.ndarray  # uint8[H, W, 3]
    arrived: float  # time.monotonic() when it was decoded


class LiveSource:
    """A source that is read once.

    Args:
      source: a camera ("/dev/video0"), "-" for this program's input, an address (rtsp://, http://, udp://), a file,
        a named pipe, an open binary file, a reader of `open_video`, or an iterable of frames: arrays, PIL images or
        paths of images.
      format: FFmpeg's name of the container or device, where FFmpeg cannot find it out: "mjpeg", "rawvideo", ...
      options: for FFmpeg, such as {"video_size": "1280x720", "framerate": "30"}.

    Raises:
      UserError: it cannot be opened, or it is no such source.

    Attributes:
      name: for messages.
      is_paced: it sends frames in its own time and does not wait: a camera or a network stream.
      fps: as it states; 0: unknown.
    """

    def __init__(self, source: Any, format: str | None = None, options: Mapping[str, str] | None = None):
        self.fps, self.is_paced = 0.0, False
        self._container: Any = None
        self._given = source
        if isinstance(source, (str, os.PathLike)):
            self.name = os.fspath(source)
            self.is_paced = self.name.startswith(_CAMERA) or "://" in self.name
            self._open(self.name, format, dict(options or {}))
        elif hasattr(source, "read"):
            self.name = str(getattr(source, "name", "stream"))
            self._open(source, format, dict(options or {}))
        elif isinstance(source, Reader) or (
            isinstance(source, Iterable) and not isinstance(source, (bytes, dict, set))
        ):
            self.name = str(getattr(source, "name", "frames"))
            self.fps = float(getattr(source, "fps", 0.0) or 0.0)
        else:
            raise UserError(
                f"frames cannot be read from {type(source).__name__}; give a camera, an address, a file or frames"
            )

    def _open(self, source: Any, format: str | None, options: dict[str, str]) -> None:
        import av

        given: dict[str, Any] = {}
        if source == PIPE:
            source, self.name = "pipe:0", "the pipe"
        elif isinstance(source, str):
            if source.startswith(_CAMERA):
                format = format or "v4l2"
            if "://" in source:
                given["timeout"] = (OPEN_SECONDS, READ_SECONDS)
                if source.startswith("rtsp://"):
                    options = {"rtsp_transport": "tcp", **options}
            elif not os.path.lexists(source):
                cameras = ", ".join(sorted(glob.glob(f"{_CAMERA}*"))) or "none"
                what = f"no such camera; there is {cameras}" if source.startswith(_CAMERA) else "no such file"
                raise UserError(f"{source}: {what}; give a camera, an address, a file, or - for a pipe")
        try:
            self._container = av.open(source, format=format, options={**_PROBE, **options}, **given)
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise UserError(f"{self.name}: cannot be opened ({reason(error)}); check that it sends a video") from error
        streams = [s for s in self._container.streams.video if s.codec_context is not None]
        if not streams:
            self.close()
            raise UserError(f"{self.name}: sends no video that is known here; check its address and its format")
        self._stream = streams[0]
        self._stream.thread_type = "SLICE"  # threads that take a frame each hold as many back
        rate = self._stream.average_rate or self._stream.guessed_rate
        self.fps = float(rate) if rate and rate < Fraction(1000) else 0.0

    def __iter__(self) -> Iterator[SourceFrame]:
        """The frames, until the source ends.

        Raises:
          UserError: it breaks off, or a frame is none.
        """
        size: tuple[int, int] | None = None
        for index, (seconds, image) in enumerate(self._decoded() if self._container is not None else self._items()):
            size = size or image.shape[:2]
            if image.shape[:2] != size:  # a stream may change its size
                image = np.asarray(Image.fromarray(image).resize(size[::-1]))
            yield SourceFrame(index, seconds, image, time.monotonic())

    def _decoded(self) -> Iterator[tuple[float | None, np.ndarray]]:
        import av
        from av.video.reformatter import VideoReformatter

        converter, first, count = VideoReformatter(), None, 0
        try:
            for packet in self._container.demux(self._stream):
                try:
                    frames = packet.decode()
                except av.error.InvalidDataError:
                    continue  # of a stream that was joined in the middle, or lost a packet: the next one may be whole
                for frame in frames:
                    seconds = frame.time
                    first = seconds if first is None else first
                    count += 1
                    image = converter.reformat(frame, format="rgb24").to_ndarray()
                    yield None if seconds is None or first is None else seconds - first, image
        except (av.error.FFmpegError, OSError) as error:
            raise UserError(f"{self.name}: broke off after {count} frames ({reason(error)})") from error

    def _items(self) -> Iterator[tuple[float | None, np.ndarray]]:
        for index, item in enumerate(self._given):
            is_path = isinstance(item, (str, os.PathLike))
            image = images.read_image(Path(item)) if is_path else arrays.to_image(item)
            yield index / self.fps if self.fps > 0 else None, image

    def close(self) -> None:
        """Closes what was opened; iterating ends."""
        if self._container is not None:
            self._container.close()


class FrameQueue:
    """The frames of a source, read by a thread, with room for a few that are not computed yet.

    Args:
      source: it is closed at the end.
      room: how many frames may wait.
      drop: a frame for which there is no room takes the place of the oldest; otherwise the source waits.
    """

    def __init__(self, source: LiveSource, room: int, drop: bool):
        self._source, self._room, self._drop = source, room, drop
        self._waiting: deque[SourceFrame] = deque()
        self._changed = threading.Condition()
        self._ended, self._stop = False, False
        self._error: BaseException | None = None
        self.num_dropped = 0
        self._thread = threading.Thread(target=self._work, daemon=True, name="source")
        self._thread.start()

    def _work(self) -> None:
        try:
            for frame in self._source:
                with self._changed:
                    while len(self._waiting) >= self._room and not self._drop and not self._stop:
                        self._changed.wait(0.2)
                    if self._stop:
                        return
                    if len(self._waiting) >= self._room:
                        self._waiting.popleft()
                        self.num_dropped += 1
                    self._waiting.append(frame)
                    self._changed.notify_all()
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
            with contextlib.suppress(Exception):
                self._source.close()

    def get(self) -> SourceFrame | None:
        """The next frame; None: there is none any more, or `stop` was called.

        Raises:
          UserError: the source broke off; the frames before that have come.
        """
        with self._changed:
            while not self._waiting and not self._ended and not self._stop:
                self._changed.wait(0.1)  # `stop` may be called by a signal's handler, which must not wait for the lock
            if self._stop:
                return None
            if self._waiting:
                frame = self._waiting.popleft()
                self._changed.notify_all()
                return frame
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return None

    def stop(self) -> None:
        """No frame comes any more. May be called at any time, also by a signal's handler."""
        self._stop = True

    def close(self) -> None:
        """Stops, and waits a moment for the thread; one that waits for a silent source ends with the process."""
        self.stop()
        self._thread.join(1.0)
