"""Whether a video file is whole, by the sizes that its container states; FFmpeg reads a cut file without an error."""

import os
from pathlib import Path
from typing import BinaryIO

_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp", b"moof", b"sidx", b"pnot", b"uuid", b"mfra")
_MATROSKA, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_FILE = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")  # its File Properties Object
_TS_PACKET = 188


def what_is_missing(path: Path) -> str:
    """What is missing at the end of a file; empty: nothing, or it cannot be told.

    It can be told of MP4, Matroska, AVI, MPEG-TS, FLV, ASF and GIF, and of what is built like them.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            start = file.read(12)
            if start[4:8] in _BOXES:
                return _missing_boxes(file, size)
            if start[:4] == _MATROSKA:
                return _missing_segment(file, size)
            if start[:3] == b"FLV":
                return _missing_tags(file, size)
            if start[:6] in (b"GIF87a", b"GIF89a"):
                return _missing_blocks(file)
            if start == _ASF[:12]:
                return _missing_asf(file, size)
            if start[:1] == b"G" and size % _TS_PACKET and _is_ts(file):
                return _bytes(_TS_PACKET - size % _TS_PACKET)
            if start[:4] == b"RIFF" and start[8:12] == b"AVI ":
                stated = int.from_bytes(start[4:8], "little")
                return _bytes(stated + 8 - size) if 0 < stated < 0xFFFFFFFF and stated + 8 > size + 1 else ""
    except OSError:
        pass
    return ""


def _missing_boxes(file: BinaryIO, size: int) -> str:
    at, kinds = 0, set()
    while at + 8 <= size:
        file.seek(at)
        head = file.read(16)
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        elif length == 0:  # up to the end of the file
            length = size - at
        if length < 8 or not kind.isascii():
            return ""  # no box: what follows is not this format's
        kinds.add(kind)
        if at + length > size:
            return _bytes(at + length - size)
        at += length
    if b"mdat" in kinds and not kinds & {b"moov", b"moof"}:
        return "the index (moov)"
    return ""


def _missing_segment(file: BinaryIO, size: int) -> str:
    at = 0
    while at + 4 <= size:
        file.seek(at)
        head = file.read(16)
        id_length = 9 - head[0].bit_length() if head[0] else 9
        if id_length > 4:
            return ""
        first = head[id_length] if len(head) > id_length else 0
        length = 9 - first.bit_length() if first else 9
        if length > 8 or id_length + length > len(head):
            return ""
        stated = int.from_bytes(head[id_length : id_length + length], "big") & ((1 << (7 * length)) - 1)
        end = at + id_length + length + stated
        if stated == (1 << (7 * length)) - 1:
            return ""  # a live recording, of unknown size
        if end > size:
            return _bytes(end - size)
        if head[:4] == _SEGMENT:
            return ""
        at = end
    return ""


def _is_ts(file: BinaryIO) -> bool:
    """Whether packets of MPEG-TS begin where they must."""
    places = range(0, 5 * _TS_PACKET, _TS_PACKET)
    file.seek(0)
    start = file.read(places[-1] + 1)
    return len(start) > places[-1] and all(start[at] == 0x47 for at in places)


def _missing_tags(file: BinaryIO, size: int) -> str:
    """Of FLV: a header, and tags that state their lengths, each with its length behind it."""
    file.seek(5)
    at = int.from_bytes(file.read(4), "big") + 4
    while at + 11 <= size:
        file.seek(at)
        head = file.read(4)
        if head[0] & 0x1F not in (8, 9, 18):
            return ""
        at += 11 + int.from_bytes(head[1:4], "big") + 4
    return _bytes(at - size) if at > size else "the rest of a tag" if at < size else ""


def _missing_asf(file: BinaryIO, size: int) -> str:
    file.seek(0)
    start = file.read(1 << 14)
    at = start.find(_ASF_FILE)
    stated = int.from_bytes(start[at + 40 : at + 48], "little") if at >= 0 else 0
    live = at >= 0 and len(start) > at + 88 and bool(start[at + 88] & 1)  # written as it was broadcast: no sizes
    return _bytes(stated - size) if stated > size and not live else ""


def _missing_blocks(file: BinaryIO) -> str:
    """Of GIF: blocks up to a trailer."""
    file.seek(10)
    flags = file.read(1)
    file.seek(13 + (3 << (flags[0] & 7) + 1 if flags and flags[0] & 0x80 else 0))
    while True:
        kind = file.read(1)
        if kind == b";":
            return ""
        if kind == b",":
            head = file.read(9)
            if len(head) == 9 and head[8] & 0x80:
                file.seek(3 << (head[8] & 7) + 1, os.SEEK_CUR)
            file.read(1)
        elif kind == b"!":
            file.read(1)
        elif kind:
            return ""  # no GIF any more
        while (length := file.read(1)) not in (b"", b"\0"):
            file.seek(length[0], os.SEEK_CUR)
        if not length:
            return "its trailer, and perhaps frames before it,"


def _bytes(count: int) -> str:
    return f"{count:,} bytes"
