"""Where decoding a video file may begin, if its first frames are not asked for.

Players jump to a time and land where the file's index says. Here a frame's number counts: it is the rank of its time
stamp among those of the packets, which are read without decoding them. Decoding from the start gives the same number,
since files of these codecs in which a packet gives no frame are refused as damaged (see video_file). Decoding begins
at a frame behind which nothing depends on what comes before it. The coded frame itself says so; that the container
marks it as a key frame does not suffice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import av

    Opened = contextlib.AbstractContextManager[tuple[av.container.InputContainer, av.VideoStream]]

LEAST = 100  # frames; passing over fewer of them saves nothing
TRIES = 3  # places at which decoding might begin
# Types of the units that a packet consists of. Of an H.264 frame of type 5 (IDR) and of HEVC's types 16 to 21 (IRAP)
# all that is shown later is independent of what was shown before. Parameter sets tell how other units are coded.
_CLEAN = {"h264": {5}, "hevc": set(range(16, 22))}
_PARAMETERS = {"h264": {7, 8}, "hevc": {32, 33, 34}}


@dataclass(frozen=True)
class Entry:
    """A frame at which decoding can begin.

    Attributes:
      number: of the frame.
      seek: the time stamp by which the container finds it.
      stamps: time stamps (pts) of the frames up to the one that was asked for, rising.
      before: those of all packets before this frame's, in the order of decoding.
    """

    number: int
    seek: int
    stamps: tuple[int, ...]
    before: tuple[int, ...]

    @property
    def pts(self) -> int:
        return self.stamps[self.number]


def find_entry(opened: Callable[[], Opened], number: int) -> Entry | None:
    """The last place from which a frame and those behind it are decoded as they are from the start.

    Args:
      opened: opens the file.
      number: of the first frame that is asked for.

    Returns:
      None: decode from the start. It is too near, or the file is of another codec than H.264, HEVC and VP9, damaged, or
      does not tell enough; or seeking leads elsewhere.
    """
    import av

    if number < LEAST:
        return None
    try:
        with opened() as (container, stream):
            stamps, order, clean = _read_packets(container, stream, number)
        place = {pts: i for i, pts in enumerate(order)}
        rank = {pts: i for i, pts in enumerate(stamps)}
        entries = sorted((pts for pts in clean if pts in rank), key=place.__getitem__)
        for pts in entries[::-1][:TRIES]:
            for stamp in dict.fromkeys((pts, clean[pts])):
                landed = _land(opened, stamp, stamps)
                if landed in rank and landed in clean:
                    if not rank[landed]:
                        return None  # the file's start
                    return Entry(rank[landed], stamp, stamps, tuple(order[: place[landed]]))
    except (_Unsure, av.error.FFmpegError, OSError):
        return None
    return None


class _Unsure(Exception):
    """Decoding alone tells the numbers of this file's frames."""


def _read_packets(
    container: av.container.InputContainer, stream: av.VideoStream, number: int
) -> tuple[tuple[int, ...], list[int], dict[int, int]]:
    """Packets until it is certain which frame has this number.

    Returns:
      Time stamps of the frames up to it, rising; of all packets that were read, in the order of decoding; and of the
      clean ones, with the stamps for decoding.
    """
    units = _units_of(stream)
    order: list[int] = []
    clean: dict[int, int] = {}
    parameters: set[int] = set()  # that stood in packets so far; a decoder that begins at a clean one needs them
    last: int | None = None
    for packet in container.demux(stream):
        if not packet.size:
            continue
        pts, dts = packet.pts, packet.dts
        falls = last is not None and (dts is None or dts < last)  # Matroska has none for the first packets
        if pts is None or falls or packet.is_discard or packet.is_corrupt:
            raise _Unsure
        is_clean, found = units(packet)
        if is_clean and packet.is_keyframe and found >= parameters:
            clean[pts] = pts if dts is None else dts
        if not order and pts not in clean:
            raise _Unsure  # some of the first packets may give no frame
        order.append(pts)
        parameters |= found
        last = dts
        # a frame is never shown before it is decoded: what follows comes later than the last dts
        if last is not None and len(order) > number and len(order) % 16 == 0 and sorted(order)[number] < last:
            break
    stamps = sorted(order)
    if len(stamps) <= number or len(set(stamps)) < len(stamps) or stamps[0] != order[0]:
        raise _Unsure
    return tuple(stamps[: number + 1]), order, clean


def _units_of(stream: av.VideoStream) -> Callable[[av.Packet], tuple[bool, set[int]]]:
    """Tells of a packet whether decoding can begin there, and the kinds of parameter sets in it."""
    codec = stream.codec_context
    if codec.name in ("vp9", "libvpx-vp9"):
        return lambda packet: (_is_vp9_key_frame(bytes(memoryview(packet)[:1])), set())
    if codec.name not in _CLEAN or not codec.extradata or codec.extradata[0] != 1:
        raise _Unsure  # without a header, units are not preceded by their lengths
    header, is_avc = codec.extradata, codec.name == "h264"
    if len(header) < 23:
        raise _Unsure
    width = (header[4 if is_avc else 21] & 3) + 1  # bytes of a length
    cleaning, telling = _CLEAN[codec.name], _PARAMETERS[codec.name]

    def units(packet: av.Packet) -> tuple[bool, set[int]]:
        content, at, types = memoryview(packet), 0, set[int]()
        while at + width < len(content):
            length = int.from_bytes(content[at : at + width], "big")
            first = content[at + width]
            types.add(first & 31 if is_avc else first >> 1 & 63)
            at += width + length
        if at != len(content):
            raise _Unsure
        return bool(types & cleaning), types & telling

    return units


def _is_vp9_key_frame(content: bytes) -> bool:
    """By the first bits of its header: a key frame of profile 0 to 2, which resets all that later ones refer to."""
    first = content[0]
    marker, profile = first >> 6, (first >> 5 & 1) | (first >> 4 & 1) << 1
    shows_existing, frame_type = first >> 3 & 1, first >> 2 & 1
    return marker == 2 and profile < 3 and not shows_existing and frame_type == 0


def _land(opened: Callable[[], Opened], stamp: int, stamps: tuple[int, ...]) -> int | None:
    """Where seeking a time stamp leads: pts of the packet, if the frames from there on are those that are expected."""
    with opened() as (container, stream):
        container.seek(stamp, stream=stream, backward=True)
        landed: int | None = None
        shown: list[int] = []
        for packet in container.demux(stream):
            if landed is None:
                if packet.pts is None or packet.pts > stamps[-1]:
                    return None
                landed = packet.pts
            for frame in packet.decode():
                base = frame.time_base
                if frame.pts is None or base is None or base != stream.time_base or frame.is_corrupt:
                    return None
                if frame.pts >= landed:  # those before it lack what they are made from
                    shown.append(frame.pts)
                if frame.pts >= stamps[-1]:
                    expected = [pts for pts in stamps if pts >= landed]
                    return landed if shown == expected else None
    return None
