"""One run at a time in a folder: a lock that ends with the process that holds it, however it ends."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path, PurePath

from virst_jax.errors import UserError
from virst_jax.io import atomic, buckets
from virst_jax.io.buckets import LOCK


@contextlib.contextmanager
def exclusive(folder: str | PurePath, name: str = LOCK, shown: str | Path | None = None) -> Iterator[None]:
    """Holds a folder for this run until the block ends; the folder is made if it is not there.

    The lock is one of the system's on the file FOLDER/NAME, so nothing is left to clear by hand after a crash. File
    systems without locks give none: there nothing is checked. For a bucket's folder see buckets.held.

    Args:
      shown: what messages call the folder.

    Raises:
      UserError: another run holds it, or the folder cannot be written.
    """
    if buckets.is_bucket(folder):
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(buckets.held(folder, name))
            except OSError as error:
                raise atomic.cannot_write(folder, error) from error
            yield
        return
    folder = Path(folder)
    path, shown = folder / name, shown or folder
    with contextlib.ExitStack() as stack:
        atomic.check_writable(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = stack.enter_context(atomic.locked(path, os.O_RDWR | os.O_CREAT))
            if descriptor is None:
                raise UserError(
                    f"{shown}: another run is at work here{_holder(path)}; wait for it, or choose another folder"
                )
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {_now()}\n".encode())
        except OSError as error:
            raise atomic.cannot_write(shown, error) from error
        _held.add(descriptor)
        try:
            yield
        finally:
            _held.discard(descriptor)
            with contextlib.suppress(OSError):
                path.unlink()  # before the lock ends: `locked` looks whether the file that it got still has its name


_held: set[int] = set()


def _after_fork() -> None:
    """A worker process must not keep the lock of a run that was killed."""
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _holder(path: Path) -> str:
    try:
        text = " ".join(path.read_text(errors="replace").split())[:100]
    except OSError:
        return ""
    return f" ({text})" if text else ""


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
