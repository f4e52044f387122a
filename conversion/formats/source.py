"""What the converter asks of a checkpoint, whatever its format, and what the formats share."""

import math
import mmap
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

import numpy as np

from virst_jax.errors import UserError

# A tensor that is yet to be written: name, shape, dtype, and how to get its values.
TensorSpec = tuple[str, tuple[int, ...], np.dtype, Callable[[], np.ndarray]]

MAX_DIMS = 64  # numpy's limit
MAX_ELEMENTS = 1 << 48  # far above any tensor, far below an overflow of its size in bytes


class TensorSource(Protocol):
    """Named tensors, read one at a time."""

    @property
    def where(self) -> str:
        """What error messages call the source."""
        ...

    def names(self) -> list[str]:
        """Names of all tensors, in the order of the file."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. UserError: no such name."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """Dtype of a tensor; bfloat16 and float8 are those of ml_dtypes. UserError: no such name."""
        ...

    def read(self, name: str) -> np.ndarray:
        """dtype[shape], read-only. UserError: no such name, or damaged."""
        ...


class Entry(Protocol):
    """What a format keeps of a tensor before its values are read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...


E = TypeVar("E", bound=Entry)


class TensorFile(ABC, Generic[E]):
    """What the readers of all formats share: tensors looked up by name, and a context that closes the files.

    where: what error messages call the source. entries: what the format keeps of every tensor, in order.
    """

    where: str
    entries: dict[str, E]

    def entry(self, name: str) -> E:
        """What the format keeps of a tensor. UserError: no such name."""
        if name not in self.entries:
            raise no_such_name(self.where, name)
        return self.entries[name]

    def names(self) -> list[str]:
        """Names of all tensors, in the order of the files."""
        return list(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. UserError: no such name."""
        return self.entry(name).shape

    def dtype(self, name: str) -> np.dtype:
        """Dtype of a tensor, in native byte order. UserError: no such name."""
        return self.entry(name).dtype

    @abstractmethod
    def close(self) -> None:
        """Lets go of the files; what was read stays valid."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def element_count(shape: Sequence[object]) -> int:
    """Elements of a tensor of this shape.

    Raises:
      ValueError: no array can have this shape.
    """
    if len(shape) > MAX_DIMS:
        raise ValueError(f"{len(shape)} dimensions")
    count, extent = 1, 1
    for n in shape:
        if type(n) is not int or not 0 <= n <= MAX_ELEMENTS:
            raise ValueError("a dimension that is negative, absurdly large or not a number")
        count, extent = count * n, extent * max(n, 1)
    if extent > MAX_ELEMENTS:
        raise ValueError("an absurdly large shape")
    return count


def no_such_name(where: str, name: str) -> UserError:
    return UserError(f"{where}: holds no tensor named {name!r}; is it the checkpoint of another model?")


def some(names: Sequence[str], limit: int = 8) -> str:
    """The first names, for an error message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(n)[:80] for n in names[:limit]) + more


def map_file(path: Path) -> mmap.mmap:
    """A file's bytes, mapped read-only.

    Drop it rather than close it: arrays that view it would then read unmapped memory, since numpy keeps the object
    alive but not its lock on the buffer.

    Raises:
      UserError: missing, a folder, a pipe or device, unreadable, empty, a Git LFS pointer, or a web page.
    """
    try:
        # without waiting, should it be a pipe that nobody writes to
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "rb"):
            status = os.fstat(descriptor)
            if stat.S_ISDIR(status.st_mode):
                raise UserError(f"{path}: is a folder; give the path of a checkpoint file")
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{path}: is a pipe or a device; copy it into a file first")
            if status.st_size == 0:
                raise UserError(f"{path}: the file is empty; download it again")
            mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; check the path") from error
    except IsADirectoryError as error:
        raise UserError(f"{path}: is a folder; give the path of a checkpoint file") from error
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); check the path and its permissions") from error
    start = mapped[:64].lstrip().lower()
    if start.startswith(b"version https://git-lfs."):
        raise UserError(f"{path}: a Git LFS pointer, not the file itself; fetch it with git lfs pull")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{path}: a web page saved in place of the file; follow the page's download link")
    return mapped


def ends_early(where: str | Path, have: int, wanted: int, *, least: bool = False) -> UserError:
    """The error of a file that lacks its end.

    Args:
      have, wanted: bytes.
      least: the file must have had `wanted` bytes or more.
    """
    more = "at least " if least else ""
    return UserError(f"{where}: the file ends early: {have} of {more}{wanted} bytes; download it again")


def tensor_bytes(spec: TensorSpec) -> memoryview:
    """Values of a tensor as contiguous bytes.

    Raises:
      UserError: reading them fails.
      ValueError: they are not of the announced shape and dtype.
    """
    name, shape, dtype, read = spec
    try:
        array = np.asarray(read())
    except OSError as error:
        raise UserError(f"{name}: its values cannot be read ({error.strerror or error})") from error
    if array.shape != tuple(shape) or array.dtype != dtype:
        raise ValueError(f"{name}: announced as {np.dtype(dtype)}{list(shape)}, is {array.dtype}{list(array.shape)}")
    flat = np.ascontiguousarray(array).reshape(math.prod(shape))
    return flat.view(np.uint8).data
