"""Files and folders that appear whole, or not at all: the one place that writes anything a reader may open.

A file NAME is written as .NAME.part beside its place, flushed to the disk, and renamed. After an error nothing of it is
left. A process that is killed leaves its .NAME.part: the next writer of NAME takes it over, and `remove_leftovers`
clears a folder of them. A lock on the part tells a leftover from a file that another process is writing at the moment.
A file in a bucket (gs://, s3://) is written to a temporary file of this machine and sent when it is complete.
"""

import contextlib
import errno
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import IO, Any

import numpy as np

from virst_jax.errors import UserError, WriteError
from virst_jax.io import buckets
from virst_jax.io.address import local

try:
    import fcntl
except ImportError:  # no POSIX system: writers are not told apart, leftovers are taken over all the same
    fcntl = None  # type: ignore[assignment]

PART = ".part"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NAME_BYTES = 200  # of NAME within the part's name: file systems end at 255
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # file systems without locks
_WRITERS = 64  # of one file at the same time, before something is wrong


@contextlib.contextmanager
def new_file(path: str | PurePath, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """A binary file to write to, which takes its place at `path` when the block ends; it replaces what was there.

    Args:
      durable: wait until the disk holds it, so that a power failure leaves the old file or the new one. Leave it off
        only for files that are many and that can be made again.

    Raises:
      WriteError: the system refuses to write.
    """
    if buckets.is_bucket(path):
        with _told(path), buckets.new_file(path) as sent:
            yield sent
        return
    path = local(path, "output")
    with _told(path):
        special = _special(path)
        if special is not None:
            with os.fdopen(_open_special(special), "wb") as file:
                yield file
            return
        with _part_file(path) as (part, descriptor):
            with os.fdopen(os.dup(descriptor), "wb") as file:
                yield file
            _publish(part, path, durable)


@contextlib.contextmanager
def new_path(path: str | Path) -> Iterator[Path]:
    """As `new_file`, for libraries that write by name: the path of an empty file to overwrite in place.

    Raises:
      WriteError: the system refuses to write.
    """
    path = local(path, "output")
    with _told(path), _part_file(path) as (part, _):
        yield part
        _publish(part, path, durable=True)


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill, which takes its place at `path` when the block ends; folders above it are made.

    Raises:
      UserError: `path` exists, or (WriteError) the system refuses to write.
    """
    path = local(path, "output")
    check_new(path)
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _part_folder(path) as part:
            yield part
            for file in part.rglob("*"):
                if not file.is_symlink():
                    _sync(file)
            _sync(part)
            os.rename(part, path)  # refuses a folder that has appeared meanwhile and holds something
            _sync(path.parent)


@contextlib.contextmanager
def scratch_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder beside `path`, which is removed when the block ends; so is what a killed process has left of it.

    Raises:
      WriteError: the system refuses to write.
    """
    path = local(path, "output")
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _part_folder(path) as part:
            yield part


def write_bytes(path: str | PurePath, content: bytes, *, durable: bool = True, parents: bool = False) -> None:
    """Writes a file whole; with `parents` its folder is made, too. Raises WriteError: the system refuses."""
    if parents and not buckets.is_bucket(path):
        path = local(path, "output")
        with _told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path, durable=durable) as file:
        file.write(content)


def write_text(path: str | PurePath, text: str) -> None:
    """Writes a text file whole, in UTF-8. Raises WriteError: the system refuses."""
    # a lone surrogate in a name or sentence must not lose the rest
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: str | PurePath, data: Any, indent: int | None = 1) -> None:
    """Writes a JSON file whole. Raises WriteError: the system refuses."""
    write_text(path, json.dumps(data, indent=indent) + "\n")


def write_npy(path: str | PurePath, array: np.ndarray) -> None:
    """Writes an array with np.save, whole. Raises WriteError: the system refuses."""
    with new_file(path) as file:
        np.save(file, array, allow_pickle=False)


def write_npz(path: str | PurePath, arrays: Mapping[str, np.ndarray], *, compressed: bool = False) -> None:
    """Writes arrays with np.savez, whole. Raises WriteError: the system refuses."""
    save: Any = np.savez_compressed if compressed else np.savez
    with new_file(path) as file:
        save(file, **arrays)


def remove_leftovers(folder: str | Path, *, deep: bool = False) -> list[Path]:
    """Removes what killed writers have left in a folder, hidden files and folders; what is being written stays.

    Args:
      deep: in all folders below, too.

    Returns:
      What was removed.
    """
    removed: list[Path] = []
    with contextlib.suppress(OSError):
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            path = Path(entry.path)
            is_folder = entry.is_dir(follow_symlinks=False)
            if is_part(path) and (is_folder or entry.is_file(follow_symlinks=False)):
                with contextlib.suppress(OSError), locked(path) as descriptor:
                    if descriptor is not None:
                        _remove(path)
                        removed.append(path)
            elif deep and is_folder:
                removed += remove_leftovers(path, deep=True)
    return removed


def is_part(path: Path) -> bool:
    """Whether a path is named as an unfinished file or folder."""
    start, found, end = path.name.rpartition(PART)
    return bool(found) and start.startswith(".") and len(start) > 1 and (not end or end.lstrip(".").isdigit())


def check_new(path: str | Path, *, parents: bool = True) -> None:
    """Finds out, before long work, whether a file or folder can be made that is not there yet.

    Args:
      parents: folders above it will be made, too.

    Raises:
      UserError: it is there, or it cannot be made.
    """
    path = local(path, "output")
    if os.path.lexists(path):
        raise UserError(f"{path}: exists already; choose another name or remove it first")
    if not parents and not path.parent.is_dir():
        raise UserError(f"{path}: cannot be written, {path.parent} is no folder; make it first")
    check_writable(path.parent)


def check_place(path: str | Path) -> None:
    """Finds out, before long work, whether a file can be written, over one that is there or not.

    Raises:
      WriteError: it cannot.
    """
    path = local(path, "output")
    with _told(path):
        if _special(path) is not None:
            return
        if not path.parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "its folder is not there", str(path))
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def check_writable(folder: str | Path) -> None:
    """Finds out, before long work, whether a folder can be made or written to.

    Raises:
      UserError: it cannot.
    """
    above = local(folder, "output").absolute()
    while not os.path.lexists(above):
        above = above.parent
    if not above.is_dir():
        raise UserError(f"{folder}: cannot be written, {above} is no folder; choose another folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: cannot be written, {above} is read-only; choose another folder")


def reason(error: BaseException) -> str:
    """What the system says of an error, on one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:200]


def cannot_write(path: str | PurePath, error: OSError) -> WriteError:
    """The error of a file that could not be written, with what helps."""
    full = error.errno in NO_SPACE
    remedy = "free disk space or choose another folder" if full else "check the folder and its permissions"
    where = buckets.address_of(path) if buckets.is_bucket(path) else path
    return WriteError(f"{where}: cannot be written ({reason(error)}); {remedy}")


@contextlib.contextmanager
def _told(path: str | PurePath) -> Iterator[None]:
    """Turns errors of writing into one line; those of other files, which the block may read, pass."""
    try:
        yield
    except OSError as error:
        if not buckets.is_bucket(path) and not _concerns(error, Path(path)):
            raise
        raise cannot_write(path, error) from error


def _concerns(error: OSError, path: Path) -> bool:
    """Whether an error is about a file, its part or a folder above it; errors of plain writes name no file."""
    if not isinstance(error.filename, (str, bytes)):
        return True
    named, target = Path(os.fsdecode(error.filename)).absolute(), _target(path).absolute()
    for place in (path.absolute(), target):
        if named == place or named in place.parents:
            return True
        if place.parent in named.parents and is_part(Path(named.relative_to(place.parent).parts[0])):
            return True
    return False


def _special(path: Path) -> Path | None:
    """`path` itself if it is a device or a pipe (/dev/stdout), which cannot be replaced by renaming."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return None if stat.S_ISREG(mode) else path


def _open_special(path: Path) -> int:
    """A descriptor of a device or a pipe; a pipe that nobody reads is an error, rather than waited for."""
    descriptor = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))
    os.set_blocking(descriptor, True)
    return descriptor


def _part_names(path: Path) -> Iterator[Path]:
    name = os.fsdecode(os.fsencode(path.name)[:_NAME_BYTES])
    for number in range(_WRITERS):
        yield path.with_name(f".{name}{PART}{f'.{number}' if number else ''}")
    raise OSError(errno.EBUSY, f"{_WRITERS} unfinished files of this name", str(path))


@contextlib.contextmanager
def _part_file(path: Path) -> Iterator[tuple[Path, int]]:
    """An empty part of a file, locked."""
    for part in _part_names(_target(path)):
        with locked(part, os.O_RDWR | os.O_CREAT) as descriptor:
            if descriptor is None:
                continue  # another process is writing it
            os.ftruncate(descriptor, 0)
            try:
                yield part, descriptor
            finally:
                with contextlib.suppress(OSError):
                    if _same(part, descriptor):  # renamed, the name may be another writer's by now
                        part.unlink()
            return


@contextlib.contextmanager
def _part_folder(path: Path) -> Iterator[Path]:
    for part in _part_names(path):
        with contextlib.suppress(FileExistsError):
            os.mkdir(part)
        with locked(part) as descriptor:
            if descriptor is None:
                continue
            for entry in os.scandir(part):  # of a killed process
                _remove(Path(entry.path))
            try:
                yield part
            finally:
                if _same(part, descriptor):
                    shutil.rmtree(part, ignore_errors=True)
            return


@contextlib.contextmanager
def locked(path: Path, flags: int = os.O_RDONLY) -> Iterator[int | None]:
    """A descriptor of a file or folder, locked until the block ends; None if another holds its lock."""
    while True:
        descriptor = os.open(path, flags | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            free = _try_lock(descriptor)
            # the one who held it may have renamed or removed it since it was opened
            same = not free or _same(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        if same:
            break
        os.close(descriptor)
    try:
        yield descriptor if free else None
    finally:
        os.close(descriptor)  # ends the lock


def _try_lock(descriptor: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _same(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _publish(part: Path, path: Path, durable: bool) -> None:
    target = _target(path)
    if durable:
        _sync(part)
    os.replace(part, target)
    if durable:
        _sync(target.parent)


def _target(path: Path) -> Path:
    """Where the file lies: a link stays a link, and what it points to is replaced."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _sync(path: Path) -> None:
    """Waits until the disk holds a file or the entries of a folder; file systems that cannot say so are left alone."""
    with contextlib.suppress(PermissionError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP):
                raise
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
