"""Arrays from .npz files, whatever is wrong with the file said in one line; nothing in it is executed."""

import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np

from virst_jax.errors import UserError
from virst_jax.io.atomic import reason
from virst_jax.io.regular import require_file

MAX_BYTES = 1 << 32  # of all arrays of a file, unpacked
_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    EOFError,
    SyntaxError,
    RecursionError,
    MemoryError,
    OverflowError,
    NotImplementedError,
    RuntimeError,
    AttributeError,
    struct.error,
    zlib.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
)  # what zipfile and NumPy raise for damaged files


def read_npz(path: str | Path, advice: str, limit: int = MAX_BYTES) -> dict[str, np.ndarray]:
    """The arrays of a file that np.savez wrote, by name.

    Args:
      advice: what to do about a damaged file.

    Raises:
      UserError: missing, no regular file, damaged, arrays of Python objects, or more than `limit` bytes unpacked.
    """
    require_file(path, advice)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > limit:
                raise ValueError(f"more than {limit} bytes when unpacked")
            return {entry.filename.removesuffix(".npy"): _array(archive, entry) for entry in entries}
    except _ERRORS as error:
        raise UserError(f"{path}: damaged, or no file of arrays ({reason(error)}); {advice}") from error


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, _, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            raise ValueError(f"{entry.filename} is of format {version}")
        # before anything is allocated by what the header says
        if min(shape, default=0) < 0 or file.tell() + math.prod(shape) * dtype.itemsize != entry.file_size:
            raise ValueError(f"{entry.filename} does not hold {dtype}{list(shape)}")
    with archive.open(entry) as file:
        return np.lib.format.read_array(file, allow_pickle=False)
