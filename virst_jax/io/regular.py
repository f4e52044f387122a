"""Opening what must be a file on disk. A pipe or a device in its place would be waited for, or read, without end."""

import os
import stat
from pathlib import Path, PurePath

from virst_jax.errors import UserError
from virst_jax.io import buckets
from virst_jax.io.names import other_spelling

ADVICE = "get the file again"
MAX_TEXT = 1 << 26  # bytes of a config or a table of settings


def require_file(path: str | PurePath, advice: str = "check the data set's folder") -> int:
    """The size of a file in bytes.

    Args:
      advice: what to do if there is none.

    Raises:
      UserError: there is none, or it is a folder, a pipe, a socket or a device.
    """
    if buckets.is_bucket(path):
        size = buckets.size_of(path)
        if size is None:
            raise UserError(f"{buckets.address_of(path)}: no such file; {advice}")
        return size
    try:
        found = os.stat(path)
    except FileNotFoundError:
        other = other_spelling(path)
        if other:
            # as text both may look alike: accents are stored in two ways
            shown = f"{other!r} ({other!a})" if not other.isascii() else repr(other)
            raise UserError(f"{path}: no such file, but its folder has {shown}; spell it so, or rename it") from None
        raise UserError(f"{path}: no such file; {advice}") from None
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise UserError(f"{path}: not readable ({getattr(error, 'strerror', None) or error}); {advice}") from error
    if stat.S_ISDIR(found.st_mode):
        raise UserError(f"{path}: is a folder, not a file; {advice}")
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path}: is a pipe, a socket or a device, not a file; {advice}")
    return found.st_size


def read_file(path: str | PurePath, limit: int, advice: str = "check the data set's folder") -> bytes:
    """The contents of a file of at most `limit` bytes.

    Raises:
      UserError: as `require_file`, or it is larger or cannot be read.
    """
    size = require_file(path, advice)
    if size > limit:
        raise UserError(f"{path}: {size} bytes, more than the {limit} that such a file may have; {ADVICE}")
    try:
        with buckets.place(path).open("rb") as file:
            return bytes(file.read(limit + 1))
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror or error}); {ADVICE}") from error


def read_text(path: str | PurePath, advice: str = ADVICE, limit: int = MAX_TEXT) -> str:
    """The text of a file of at most `limit` bytes in UTF-8; a byte order mark is passed over.

    Raises:
      UserError: as `read_file`, or it is no text.
    """
    try:
        return read_file(path, limit, advice).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no text in UTF-8 ({error.reason} at byte {error.start}); {advice}") from error


def require_plain(folder: str | Path, advice: str = ADVICE) -> None:
    """Refuses a folder in which a library that is to read it would meet a pipe, a socket or a device.

    Raises:
      UserError: there is one, or something in the folder cannot be looked at.
    """
    for entry in sorted(Path(folder).rglob("*")):
        if not entry.is_dir():
            require_file(entry, advice)
