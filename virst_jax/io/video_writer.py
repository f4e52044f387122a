"""Writes videos as H.264 mp4 files that players show as they show the source: its times, pixel shape, colours, sound.

Axes: H height, W width, 3 RGB.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from virst_jax.io import atomic
from virst_jax.io.reader import VideoFormat

if TYPE_CHECKING:
    import av

DEFAULT_FPS = 10.0  # of frames without times
MP4_AUDIO = {"aac", "mp3", "ac3", "eac3", "opus", "flac", "alac", "mp2"}  # copied; others become AAC
_NEED_HEADERS = {"aac", "opus", "flac", "alac"}  # MP4 keeps what MPEG-TS repeats in the stream: without it, as others
_SWSCALE = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}  # matrices of swscale by FFmpeg's number of a colour space
_LIMITED, _FULL = 1, 2  # ranges
_PRIMARIES, _TRANSFERS = {*range(1, 13), 22}, set(range(1, 19))  # that FFmpeg's encoders know
_LONGEST_UNITS, _LONGEST_SECONDS = 1 << 28, 10_000  # of a frame: MP4 counts in 32 bits, and adds several up


class VideoWriter:
    """Writes frames to an mp4, which appears under its name once `close` has ended it.

    Follows what players can show: yuv420p, an even number of rows and columns (the last ones are repeated).

    Args:
      size: height, width of the frames.
      fps: frames a second; 0: unknown.
      format: of the source.

    Attributes:
      sound_fault: what became of the source's sound, if it is not all there.
    """

    def __init__(self, path: Path, size: tuple[int, int], fps: float, format: VideoFormat | None = None):
        import av

        self.path, self.format, self.sound_fault = path, _known_colours(format or VideoFormat()), ""
        rate = Fraction(fps if fps > 0 else DEFAULT_FPS).limit_denominator(1001)
        self._rate = min(max(rate, Fraction(1, 1000)), Fraction(10_000))
        self._base = self.format.time_base or 1 / self._rate
        if self._base.denominator > 1 << 24 or self._base.numerator > self._base.denominator:
            self._base = Fraction(1, 90_000)
        self._longest = max(1, min(_LONGEST_UNITS, int(_LONGEST_SECONDS / self._base)))
        self._av = av
        with contextlib.ExitStack() as stack:
            part = stack.enter_context(atomic.new_path(path))
            # the file's own clock, else of milliseconds: frames that are shorter would be cut off at start and end
            clock = max(1000, min(self._base.denominator, 1 << 24))
            options = {"movflags": "+faststart", "movie_timescale": str(clock)}
            self._container = stack.enter_context(
                contextlib.closing(av.open(str(part), "w", format="mp4", options=options))
            )
            self._stream = self._add_video(size)
            self._audio = self._add_audio(self.format.audio) if self.format.audio else None
            self._stack = stack.pop_all()
        self._pad = ((0, size[0] % 2), (0, size[1] % 2), (0, 0))
        self._count, self._last = 0, -1

    def _add_audio(self, source: Path) -> _Audio | None:
        try:
            return _Audio(self._container, source)
        except _errors() as error:
            self.sound_fault = f"the sound of {source.name} is left out of {self.path.name} ({atomic.reason(error)})"
            return None

    def _add_video(self, size: tuple[int, int]) -> Any:
        stream: Any = self._container.add_stream(
            "libx264", rate=self._rate, options={"crf": "20", "preset": "veryfast"}
        )
        stream.height, stream.width = size[0] + size[0] % 2, size[1] + size[1] % 2
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = self._base
        if self.format.sample_aspect is not None:
            stream.codec_context.sample_aspect_ratio = self.format.sample_aspect
        codec, given = stream.codec_context, self.format
        self._matrix = _SWSCALE.get(given.colorspace)
        self._range = given.color_range or _LIMITED
        codec.color_primaries, codec.color_trc = given.color_primaries, given.color_trc
        # RGB has no matrix in YUV; what is not stated stays so, and is converted as it was when it was read
        codec.colorspace = given.colorspace if self._matrix else 2
        codec.color_range = given.color_range
        return stream

    def write(self, frame: np.ndarray, time: float | None = None, duration: float | None = None) -> None:
        """Adds a frame uint8[H, W, 3].

        Args:
          time: when it is shown, in seconds from the start; None: as many frames a second as were announced.
          duration: seconds that it is shown; needed of the last frame only.
        """
        image = np.pad(frame, self._pad, mode="edge")
        av_frame = self._av.VideoFrame.from_ndarray(image, format="rgb24")
        av_frame = av_frame.reformat(format="yuv420p", dst_colorspace=self._matrix, dst_color_range=self._range)
        av_frame.colorspace, av_frame.color_range = self._stream.codec_context.colorspace, self.format.color_range
        av_frame.color_primaries, av_frame.color_trc = self.format.color_primaries, self.format.color_trc
        at = Fraction(self._count) / self._rate if time is None else Fraction(time)
        number = min(max(round(at / self._base), self._last + 1), self._last + self._longest)
        av_frame.pts, av_frame.time_base = number, self._base
        span = 1 / self._rate if duration is None else Fraction(duration)
        av_frame.duration = min(max(1, round(span / self._base)), self._longest)
        self._end = float(number * self._base + span)
        self._count, self._last = self._count + 1, number
        self._container.mux(self._stream.encode(av_frame))
        if self._audio is not None:
            self._audio.copy_until(self._end)

    def close(self) -> None:
        """Ends the file, which then is in its place."""
        self._container.mux(self._stream.encode())
        if self._audio is not None:
            self._audio.end(self._end if self._count else 0.0)
            if self._audio.fault:
                self.sound_fault = (
                    f"the sound of {self._audio.name} is not whole in {self.path.name}: {self._audio.fault}"
                )
        self._stack.close()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            try:
                self.close()
            except BaseException as own:
                self._leave(type(own), own, own.__traceback__)
                raise
            return
        self._leave(kind, error, trace)

    def _leave(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._audio is not None:
            self._audio.close()
        with contextlib.suppress(Exception):
            self._stack.__exit__(kind, error, trace)


def _known_colours(given: VideoFormat) -> VideoFormat:
    """The format without numbers of colours that no encoder takes: a damaged file states any."""
    return dataclasses.replace(
        given,
        color_primaries=given.color_primaries if given.color_primaries in _PRIMARIES else 2,
        color_trc=given.color_trc if given.color_trc in _TRANSFERS else 2,
        color_range=given.color_range if given.color_range in (_LIMITED, _FULL) else 0,
    )


def _errors() -> tuple[type[BaseException], ...]:
    """What FFmpeg and its binding raise of a stream that they cannot handle."""
    import av

    return (av.error.FFmpegError, OSError, ValueError, TypeError, AttributeError, NotImplementedError)


class _Audio:
    """The sound of a file, copied beside the frames; where it is damaged it ends.

    Attributes:
      fault: why it ended early, or how much of it was left out.
    """

    def __init__(self, container: av.container.OutputContainer, path: Path):
        import av

        self.name, self.fault = path.name, ""
        self._out, self._errors, self._left_out = container, _errors(), 0
        self._next: tuple[float, av.Packet] | None = None
        with contextlib.ExitStack() as stack:
            self._source = stack.enter_context(av.open(str(path), metadata_errors="replace"))
            stream: Any = self._source.streams.best("audio")
            if stream is None or stream.codec_context is None:
                raise ValueError("coded in a way that is not known here")
            self._start = (self._source.start_time or 0) / 1_000_000
            codec = stream.codec_context
            if codec.name in MP4_AUDIO and (codec.extradata or codec.name not in _NEED_HEADERS):
                self._stream = container.add_stream_from_template(stream)
                self._packets: Generator[tuple[float, av.Packet], None, None] = self._copied(stream)
            else:
                self._stream = container.add_stream("aac", rate=stream.rate)
                self._packets = self._encoded(stream)
            stack.pop_all()

    def copy_until(self, end: float) -> None:
        """Writes what is heard before this time."""
        while True:
            if self._next is None:
                self._next = next(self._packets, None)
                if self._next is None:
                    return
            time, packet = self._next
            if time >= end:
                return
            self._next = None
            try:
                self._out.mux(packet)
            except self._errors as error:
                self._left_out += 1
                self.fault = f"{self._left_out} packets are left out ({atomic.reason(error)})"

    def end(self, end: float) -> None:
        self.copy_until(end)
        self.close()

    def _ends(self, error: BaseException) -> None:
        """Notes that the source could not be read or coded any further."""
        self.fault = self.fault or f"it ends where it cannot be read ({atomic.reason(error)})"

    def close(self) -> None:
        self._packets.close()
        self._source.close()

    def _copied(self, stream: av.AudioStream) -> Generator[tuple[float, av.Packet], None, None]:
        try:
            for packet in self._source.demux(stream):
                if packet.dts is None or packet.pts is None:
                    continue
                shift = round(Fraction(self._start) / packet.time_base)
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                packet.stream = self._stream
                yield float(packet.pts * packet.time_base), packet
        except self._errors as error:
            self._ends(error)

    def _encoded(self, stream: av.AudioStream) -> Generator[tuple[float, av.Packet], None, None]:
        try:
            for frame in self._source.decode(stream):
                if frame.pts is None or frame.time_base is None:
                    continue
                frame.pts -= round(Fraction(self._start) / frame.time_base)
                time = float(frame.pts * frame.time_base)
                for packet in self._stream.encode(frame):
                    yield time, packet
        except self._errors as error:
            self._ends(error)
        try:
            for packet in self._stream.encode(None):
                yield 0.0, packet
        except self._errors as error:
            self._ends(error)
