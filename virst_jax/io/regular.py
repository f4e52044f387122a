"""Opening what must be a file on disk. A pipe or a device in its place would be waited for, or read, without end."""

import os
import stat
from pathlib import Path

from virst_jax.errors import UserError

ADVICE = "get the file again"


def require_file(path: str | Path, advice: str = "check the data set's folder") -> int:
    """The size of a file in bytes.

    Args:
      advice: what to do if there is none.

    Raises:
      UserError: there is none, or it is a folder, a pipe or a device.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {advice}") from None
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise UserError(f"{path}: not readable ({getattr(error, 'strerror', None) or error}); {advice}") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
        raise UserError(f"{path}: {kind}, not a file; {advice}")
    return found.st_size


def read_file(path: str | Path, limit: int, advice: str = "check the data set's folder") -> bytes:
    """The contents of a file of at most `limit` bytes.

    Raises:
      UserError: as `require_file`, or it is larger or cannot be read.
    """
    size = require_file(path, advice)
    if size > limit:
        raise UserError(f"{path}: {size} bytes, more than the {limit} that such a file may have; {ADVICE}")
    try:
        with open(path, "rb") as file:
            return file.read(limit + 1)
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror or error}); {ADVICE}") from error
