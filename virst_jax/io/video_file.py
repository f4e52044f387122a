"""Video files, decoded by FFmpeg: the frames as players show them, their true times, and which of them are damaged.

Axes: H height, W width, 3 RGB.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from virst_jax.errors import UserError
from virst_jax.io.atomic import reason
from virst_jax.io.containers import what_is_missing
from virst_jax.io.reader import Reader, VideoFormat, check_indices
from virst_jax.io.video_seek import Entry, find_entry

if TYPE_CHECKING:
    import av

MAX_PIXELS = 1 << 27
MAX_FAILURES = 10_000  # packets that do not decode, before a file is given up
REORDERED = 16  # frames by which the order of decoding and that of showing differ at most
# one packet is one frame, so that a packet without a frame is a lost one
_ONE_FRAME_A_PACKET = ("h264", "hevc", "av1", "vp9")
_ATTACHED_IMAGE = 1 << 10  # FFmpeg's AV_DISPOSITION_ATTACHED_PIC: a cover, not the video


class FileReader(Reader):
    """A video file. Frames are counted as they are decoded: containers may be wrong about it.

    Args:
      path: a regular file.
      allow_damaged: read what FFmpeg makes of damaged frames, and leave out what it cannot decode at all; `damaged` and
        `is_cut` say what happened. Otherwise such a file is an error that names the frames.

    Raises:
      UserError: no video, or one without frames.
    """

    def __init__(self, path: Path, allow_damaged: bool = False):
        self.path, self.name, self.allow_damaged = path, path.stem, allow_damaged
        self._scanned = _Scan()
        self._sound = range(0)  # numbers of frames that are known to be sound
        self._entry: Entry | None = None  # where decoding begins if earlier frames are not asked for
        self._matrix: np.ndarray | None = None  # of the display, of the first frame; empty: none
        self._turned = False  # by a quarter
        with self._opened() as (container, stream):
            rate = stream.average_rate or stream.guessed_rate
            self.fps = float(rate) if rate else 0.0
            self._start = (container.start_time or 0) / 1_000_000
            self.format = _format(path, container, stream)
        first = next(self._decode(lambda index: True), None)
        if first is None:
            self._complain(_Scan())
            raise UserError(f"{path}: the video has no frames; record or export it again")
        self.size = (first.shape[0], first.shape[1])
        if self._turned and self.format.sample_aspect is not None:
            self.format = dataclasses.replace(self.format, sample_aspect=1 / self.format.sample_aspect)

    def begin_at(self, number: int) -> None:
        """Says that the frames before this one are not asked for; they are not decoded if all others stay as they are.

        Damage before it is then not told. They can still be read.
        """
        self._entry = None if self.allow_damaged else find_entry(self._opened, number)

    @property
    def num_frames(self) -> int:
        return len(self._scan(None).times)

    def count_up_to(self, limit: int) -> int:
        return min(limit, len(self._scan(limit).times))

    @property
    def damaged(self) -> Sequence[int]:  # type: ignore[override]
        return self._scanned.damaged()

    @property
    def num_lost(self) -> int:  # type: ignore[override]
        return len(self._scanned.lost())

    @property
    def is_cut(self) -> bool:  # type: ignore[override]
        return self._scanned.complete and bool(self._scanned.missing)

    def times_of(self, indices: Sequence[int]) -> Sequence[float] | None:
        times = self._scan(max(indices, default=0) + 1).seconds(self._start, self.fps)
        return [times[i] for i in indices]

    @property
    def duration(self) -> float:
        scan = self._scan(None)
        times = scan.seconds(self._start, self.fps)
        return times[-1] - times[0] + (scan.last_duration or (1 / self.fps if self.fps > 0 else 0.0))

    def __iter__(self) -> Iterator[np.ndarray]:
        for frame in self._decode(lambda index: True):
            assert frame is not None
            yield frame

    def pick(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        if not len(indices) or min(indices) < 0 or self._scanned.complete:
            check_indices(self.name, indices, len(self._scanned.times))
        wanted = set(indices)
        left = len(wanted)
        with contextlib.closing(self._decode(wanted.__contains__, first=min(wanted))) as frames:
            for frame in frames:
                if frame is not None:
                    yield frame
                    left -= 1
                    if not left:
                        return
        check_indices(self.name, indices, self.num_frames)

    def expected_frames(self) -> int:
        if self._scanned.complete:
            return len(self._scanned.times)
        with self._opened() as (container, stream):
            if stream.frames > 0:
                return int(stream.frames)
            return _count_packets(container, stream)

    def survey(self, indices: Sequence[int], limit: int | None = None) -> Iterator[np.ndarray]:
        """See Reader.survey.

        Args:
          limit: frames from this number on are not needed.

        Raises:
          UserError: a frame before the limit is damaged.
        """
        if self._knows(limit):
            there = [i for i in indices if i < len(self._scanned.times)]
            return self.pick(there) if there else iter(())
        return self._survey(frozenset(indices).__contains__, limit, min(indices, default=0))

    def _knows(self, limit: int | None) -> bool:
        return self._scanned.complete or (limit is not None and len(self._scanned.times) >= limit)

    def _scan(self, limit: int | None) -> _Scan:
        """Decodes up to `limit` frames, or all, without converting them, if that was not done before.

        Raises:
          UserError: one of them is damaged.
        """
        if not self._knows(limit):
            for _ in self._survey(lambda index: False, limit, 0 if self._entry is None else self._entry.number):
                pass
        return self._scanned

    def _survey(self, wanted: Callable[[int], bool], limit: int | None, first: int) -> Iterator[np.ndarray]:
        scan = _Scan()
        with contextlib.closing(self._decode(wanted, scan, first)) as frames:
            for frame in frames:
                if frame is not None:
                    yield frame
                # frames are decoded in another order than they are shown: a later packet may be one of theirs
                if limit is not None and len(scan.times) >= limit + REORDERED:
                    break
        self._complain(scan, limit)
        self._scanned = scan
        self._sound = range(scan.begin, len(scan.times) if limit is None or scan.complete else limit)

    def _complain(self, scan: _Scan, limit: int | None = None) -> None:
        """Raises a UserError that names what is damaged, unless the caller goes on with it."""
        if self.allow_damaged:
            return
        damaged = [i for i in scan.damaged_in_file() if limit is None or i < limit]
        if scan.missing and (limit is None or len(scan.times) < limit):
            frames = f" and frames {ranges(damaged)} are damaged" if damaged else ""
            if not scan.times:
                raise UserError(
                    f"{self.path}: cut short within its first frame: {scan.missing} missing at its end; copy it again"
                )
            raise UserError(
                f"{self.path}: cut short after frame {len(scan.times) - 1}: {scan.missing} missing at its end{frames}; "
                "copy the file again, or go on with what there is (--allow-damaged)"
            )
        if damaged:
            raise UserError(
                f"{self.path}: damaged: frames {ranges(damaged)} cannot be trusted; copy the file again, or go on with "
                "them (--allow-damaged)"
            )

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
        import av  # loads FFmpeg's libraries

        try:
            container = av.open(str(self.path), metadata_errors="replace")
        except (av.error.FFmpegError, OSError, ValueError) as error:
            missing = what_is_missing(self.path)
            why = f"cut short: {missing} missing at its end" if missing else reason(error)
            advice = "copy the file again" if missing else "give another file"
            raise UserError(f"{self.path}: cannot be read as a video ({why}); {advice}") from error
        with container:
            streams = [s for s in container.streams.video if not int(s.disposition) & _ATTACHED_IMAGE]
            if not streams:
                missing = what_is_missing(self.path)
                if missing:
                    raise UserError(f"{self.path}: cut short: {missing} missing at its end; copy the file again")
                cover = " but a cover image" if container.streams.video else ""
                raise UserError(f"{self.path}: holds no video stream{cover}; give a video file")
            streams = [s for s in streams if s.codec_context is not None]
            if not streams:
                raise UserError(f"{self.path}: its video is coded in a way that is not known here; convert it to H.264")
            best = container.streams.best("video")
            stream = best if best in streams else streams[0]
            if stream.width * stream.height > MAX_PIXELS:
                raise UserError(
                    f"{self.path}: frames of {stream.width}x{stream.height} pixels are too large; scale the video down"
                )
            # with several threads FFmpeg does not repair damage in the same way each time
            stream.thread_type = "NONE" if self.allow_damaged else "AUTO"
            yield container, stream

    def _decode(
        self, wanted: Callable[[int], bool], scan: _Scan | None = None, first: int = 0
    ) -> Generator[np.ndarray | None, None, None]:
        """Every frame in order of display; None for those that are not wanted, which saves converting them.

        With `scan`, what is damaged is noted there and decoding goes on. Without, it ends where damage begins.

        Args:
          first: none is wanted before this one; where that is known to be possible, those before are passed over.

        Raises:
          UserError: the file is damaged, and no `scan` is given.
        """
        from av.video.reformatter import VideoReformatter

        noted, entry = scan or _Scan(), self._entry
        strict = scan is None and not self.allow_damaged
        converter = VideoReformatter()  # one for all frames: it has threads of its own
        with self._opened() as (container, stream):
            noted.one_a_packet = stream.codec_context.name in _ONE_FRAME_A_PACKET
            if entry is not None and first >= entry.number:
                assert stream.time_base is not None  # entries are found by it
                container.seek(entry.seek, stream=stream, backward=True)
                noted.pass_over(entry, stream.time_base)
            count = noted.begin
            for frame in _frames(container, stream, noted, self.path):
                if strict and noted.suspect and count not in self._sound:
                    break
                yield self._image(frame, converter) if wanted(count) else None
                count += 1
            else:
                noted.missing = noted.missing or what_is_missing(self.path)
                noted.complete = True
        if strict and count not in self._sound and (noted.suspect or noted.missing or noted.damaged()):
            self._scan(None)  # tells the whole of it
            raise UserError(f"{self.path}: damaged after frame {count}; copy the file again")

    def _image(self, frame: av.VideoFrame, converter: Any) -> np.ndarray:
        image = converter.reformat(frame, format="rgb24").to_ndarray()
        # asked for once: a frame that has shown its side data lives until cycles are collected
        if self._matrix is None:
            self._matrix = _display_matrix(frame)
        image, self._turned = _as_shown(image, self._matrix, self.path)
        shape = getattr(self, "size", None)
        if shape is not None and image.shape[:2] != shape:
            # a stream may change its size
            image = np.asarray(Image.fromarray(image).resize(shape[::-1]))
        return np.ascontiguousarray(image)


class _Scan:
    """What decoding a file has told so far."""

    def __init__(self) -> None:
        self.times: list[float | None] = []  # of the frames, in the order of display
        self.last_duration = 0.0
        self.complete = False  # the end was reached
        self.missing = ""  # at the file's end
        self.suspect = False  # something is damaged
        self.one_a_packet = False
        self.begin = 0  # number of the first frame that is decoded
        self._first: int | None = None  # its time stamp
        self._order: dict[int, int] = {}  # place of a packet in the order of decoding, by its time stamp
        self._flags: list[tuple[int | None, bool, bool]] = []  # of a frame: time stamp, key frame, damaged
        self._broken: list[int] = []  # places in the order of decoding

    def pass_over(self, entry: Entry, time_base: Fraction) -> None:
        """Notes the frames before an entry, at which decoding begins, as if they had been decoded."""
        passed = entry.stamps[: entry.number]
        self.begin, self._first = entry.number, entry.pts
        self.times = [float(pts * time_base) for pts in passed]
        self._flags = [(pts, False, False) for pts in passed]
        self._order = {pts: place for place, pts in enumerate(entry.before)}

    def frames(self, frames: Iterable[av.VideoFrame]) -> Iterator[av.VideoFrame]:
        """Notes frames; those that are shown before an entry, and lack what they build upon, are left out."""
        for frame in frames:
            if self._first is None or frame.pts is None or frame.pts >= self._first:
                self.frame(frame)
                yield frame

    def packet(self, packet: av.Packet) -> None:
        place = len(self._order)
        if packet.pts is not None and packet.size and not packet.is_discard:
            self._order.setdefault(packet.pts, place)
        if packet.is_corrupt:
            self._broken.append(place)
            self.suspect = True

    def broken(self, packet: av.Packet) -> None:
        """A packet could not be decoded."""
        here = len(self._order)
        self._broken.append(here if packet.pts is None else self._order.get(packet.pts, here))
        self.suspect = True

    def frame(self, frame: av.VideoFrame) -> None:
        base = frame.time_base
        self.times.append(None if frame.pts is None or base is None else float(frame.pts * base))
        self.last_duration = float(frame.duration * base) if frame.duration and base else 0.0
        self._flags.append((frame.pts, bool(frame.key_frame), bool(frame.is_corrupt)))
        self.suspect |= bool(frame.is_corrupt)

    def damaged(self) -> list[int]:
        """Numbers of frames that are damaged, or that build upon damaged ones."""
        if not self.suspect and not self.lost():
            return []
        known = self._order and all(pts in self._order for pts, _, _ in self._flags)
        place = {i: self._order[pts] if known else i for i, (pts, _, _) in enumerate(self._flags)}  # type: ignore[index]
        broken = sorted({*self._broken, *self.lost()})
        damaged: list[int] = []
        bad, before, key_time, seen = False, False, None, 0
        for i in sorted(place, key=place.__getitem__):
            pts, key, flag = self._flags[i]
            hit = flag or any(seen <= b <= place[i] for b in broken)
            seen = place[i] + 1
            if key:
                before, bad, key_time = bad, hit, pts
            bad |= hit
            # frames behind a key frame that are shown before it build upon those before
            leads = key_time is not None and pts is not None and pts < key_time
            if bad or (leads and before):
                damaged.append(i)
        if not damaged and self._flags and broken:
            damaged = [len(self._flags) - 1]  # what was lost came last
        return sorted(damaged)

    def damaged_in_file(self) -> list[int]:
        """As `damaged`, but counted with the frames that are lost, which are among them."""
        places = set(self.lost())
        lost = {pts for pts, place in self._order.items() if place in places}
        if not lost:
            return self.damaged()
        rank = {pts: i for i, pts in enumerate(sorted({*lost, *(pts for pts, _, _ in self._flags if pts is not None)}))}
        shown = {self._flags[i][0] for i in self.damaged()}
        return sorted(rank[pts] for pts in {*shown, *lost} if pts is not None)

    def lost(self) -> list[int]:
        """Places of packets from which no frame came, in the order of decoding."""
        if not (self.complete and self.one_a_packet and self._flags):
            return []
        shown = {pts for pts, _, _ in self._flags}
        if None in shown:
            return []
        first = min(pts for pts in shown if pts is not None)
        return [place for pts, place in self._order.items() if pts > first and pts not in shown]

    def seconds(self, start: float, fps: float) -> list[float]:
        """Times of the frames from the start of the file, each later than the one before."""
        known = [t for t in self.times if t is not None]
        origin = start if known and 0 <= known[0] - start < 60 else (known[0] if known else 0.0)
        step = 1 / fps if fps > 0 else 0.0
        out: list[float] = []
        for time in self.times:
            following = out[-1] + step if out else 0.0
            at = following if time is None else time - origin
            out.append(at if not out or at > out[-1] else following)
        return out


def ranges(numbers: Sequence[int], limit: int = 8) -> str:
    """Rising numbers as people write them: "3, 5-9"; a long list is cut short."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in parts[:limit]]
    return ", ".join(shown) + (f" and {len(parts) - limit} more stretches" if len(parts) > limit else "")


def _frames(
    container: av.container.InputContainer, stream: av.VideoStream, noted: _Scan, path: Path
) -> Iterator[av.VideoFrame]:
    """The frames of a stream; errors are noted, and what was decoded before them comes all the same."""
    import av

    packets = container.demux(stream)
    failures = 0
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except (av.error.FFmpegError, OSError) as error:
            noted.missing = what_is_missing(path) or f"what follows cannot be read ({reason(error)}), so it is"
            with contextlib.suppress(av.error.FFmpegError):
                yield from noted.frames(stream.decode(None))
            return
        noted.packet(packet)
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            noted.broken(packet)
            failures += 1
            if failures > MAX_FAILURES:
                return
            continue
        yield from noted.frames(frames)


def _count_packets(container: av.container.InputContainer, stream: av.VideoStream) -> int:
    """Packets with content, which are as many as frames in most files; up to where the file cannot be read."""
    import av

    count = 0
    with contextlib.suppress(av.error.FFmpegError, OSError):
        for packet in container.demux(stream):
            count += bool(packet.size and not packet.is_discard)
    return count


def _format(path: Path, container: av.container.InputContainer, stream: av.VideoStream) -> VideoFormat:
    codec, aspect = stream.codec_context, stream.sample_aspect_ratio
    return VideoFormat(
        Fraction(aspect) if aspect and aspect > 0 and aspect != 1 else None,
        int(codec.colorspace),
        int(codec.color_range),
        int(codec.color_primaries),
        int(codec.color_trc),
        stream.time_base,
        path if container.streams.audio else None,
    )


def _display_matrix(frame: av.VideoFrame) -> np.ndarray:
    """The first five numbers of a frame's display matrix, or none."""
    sides: Any = frame.side_data  # typed as a mapping, iterated as a sequence
    data = next((side for side in sides if side.type.name == "DISPLAYMATRIX"), None)
    return np.zeros(0) if data is None else np.frombuffer(bytes(data), np.int32)[:5].astype(float)


def _as_shown(image: np.ndarray, matrix: np.ndarray, path: Path) -> tuple[np.ndarray, bool]:
    """An image turned and mirrored as players do by the file's display matrix, and whether by a quarter turn.

    Raises:
      UserError: the matrix turns by another angle.
    """
    if not len(matrix):
        return image, False
    a, b, _, c, d = matrix
    # a point (x, y) is shown at (a x + c y, b x + d y), up to scale and a shift that brings it into view
    turned = abs(b) + abs(c) > abs(a) + abs(d)
    along, across = (abs(b), abs(c)), (abs(a), abs(d))
    if not turned:
        along, across = across, along
    if max(across) > 0.02 * min(along):
        if not (a or b or c or d):
            return image, False  # an empty matrix says nothing
        raise UserError(f"{path}: is to be shown turned by an angle other than 90 degrees; export it upright")
    if turned:
        image = np.swapaxes(image, 0, 1)
    return image[:: -1 if (b if turned else d) < 0 else 1, :: -1 if (c if turned else a) < 0 else 1], bool(turned)
