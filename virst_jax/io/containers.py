"""Whether a video file is whole, by the sizes that its container states; FFmpeg reads a cut file without an error."""

import os
from pathlib import Path
from typing import BinaryIO

_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp", b"moof", b"sidx", b"pnot", b"uuid", b"mfra")
_MATROSKA, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


def what_is_missing(path: Path) -> str:
    """What is missing at the end of a file of MP4's, Matroska's or AVI's kind; empty: nothing, or it cannot be told."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            start = file.read(12)
            if start[4:8] in _BOXES:
                return _missing_boxes(file, size)
            if start[:4] == _MATROSKA:
                return _missing_segment(file, size)
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


def _bytes(count: int) -> str:
    return f"{count:,} bytes"
