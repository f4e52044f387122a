"""Copies of what lies at addresses: gs:// and s3:// (see buckets.py), hf://OWNER/NAME[@REVISION] (huggingface_hub).

Models and data sets are copied to this machine before they are read: their readers map files into memory, seek in them
and look for them by name, none of which a bucket can do quickly.
"""

import contextlib
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from virst_jax.errors import UserError
from virst_jax.io import atomic, buckets
from virst_jax.io.address import ADDRESS, is_address

CACHE = buckets.CACHE
LARGE = 1 << 30  # bytes of a copy that is announced


def local_copy(path: str | PurePath) -> Path:
    """A path as it is, or the folder that holds a copy of what lies at an address; see `fetch`."""
    return fetch(path) if is_address(path) else Path(path)


def fetch(address: str | PurePath) -> Path:
    """A folder of this machine that holds what lies at an address. Copied once; again if it has changed.

    Raises:
      UserError: an unknown kind of address, nothing there, no way to it, or no room for it.
    """
    found = ADDRESS.fullmatch(str(address))
    assert found is not None
    if found[1].lower() == "hf":
        return _from_hub(found[2])
    if not buckets.is_bucket(address):
        raise UserError(f"{address}: unknown kind of address; known are gs://, s3:// and hf://")
    return _from_bucket(buckets.address_of(address))


def drop(copy: Path) -> None:
    """Removes a copy from a bucket that `fetch` has made."""
    shutil.rmtree(copy.parent, ignore_errors=True)


@contextlib.contextmanager
def outbox(address: str | PurePath, index: int = 0) -> Iterator[Path]:
    """An empty folder of this machine for what is to be sent to an address; removed when the block ends.

    What a killed run has left in it is removed as well.

    Args:
      index: of the process, where several send to the same address.

    Raises:
      WriteError: the system refuses to write.
    """
    name = hashlib.sha256(f"{buckets.address_of(address)} {index}".encode()).hexdigest()[:20]
    with atomic.scratch_folder(buckets.cache_folder() / name) as folder:
        yield folder


def _from_hub(rest: str) -> Path:
    import huggingface_hub

    name, _, revision = rest.partition("@")
    if name.count("/") != 1:
        raise UserError(f"hf://{rest}: give hf://OWNER/NAME, or hf://OWNER/NAME@REVISION")
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision or None))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise buckets.unreadable(f"hf://{rest}", error) from error


def _from_bucket(address: str) -> Path:
    system, root = buckets.system(address)
    try:
        system.invalidate_cache()
        files: dict[str, Any] = system.find(root, detail=True)
    except Exception as error:  # each store has errors of its own
        raise buckets.unreadable(address, error) from error
    files = {name: entry for name, entry in files.items() if entry["type"] == "file" and not name.endswith("/")}
    if not files:
        raise UserError(f"{address}: nothing there; check the bucket and the path")
    place = hashlib.sha256(f"{address} {buckets.version_of(files)}".encode()).hexdigest()[:20]
    target = buckets.cache_folder() / place / Path(root).name
    if target.is_dir():
        return target
    atomic.check_writable(target.parent)
    with _one_at_a_time(buckets.cache_folder() / f".{place}.lock"):
        return target if target.is_dir() else _copy(address, system, root, files, target)


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Waits while another process of this machine makes the same copy."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with atomic.locked(path, os.O_RDWR | os.O_CREAT) as descriptor:
            if descriptor is not None:
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
        time.sleep(0.2)


def _copy(address: str, system: Any, root: str, files: dict[str, Any], target: Path) -> Path:
    _make_room(address, target, sum(entry["size"] for entry in files.values()))
    try:
        with atomic.new_folder(target) as part:
            copies = [(name, part / _relative(name, root, address)) for name in files]
            for _, file in copies:
                file.parent.mkdir(parents=True, exist_ok=True)
            system.get([name for name, _ in copies], [str(file) for _, file in copies], batch_size=buckets.STREAMS)
    except UserError:
        if target.is_dir():  # another process was faster
            return target
        raise
    except Exception as error:
        raise buckets.unreadable(address, error) from error
    return target


def _make_room(address: str, target: Path, size: int) -> None:
    """Says what is copied if it takes a while; an error before anything is copied if the disk cannot hold it."""
    above = target
    while not above.exists():
        above = above.parent
    free = shutil.disk_usage(above).free
    if size > free:
        raise UserError(
            f"{address}: {size / 1e9:.1f} GB, and {above} has room for {free / 1e9:.1f} GB; name a larger disk by "
            f"{CACHE}, or mount the bucket (gcsfuse, mount-s3) and name the folder below it"
        )
    if size > LARGE:
        print(f"{address}: copying {size / 1e9:.1f} GB to {target}", file=sys.stderr)


def _relative(name: str, root: str, address: str) -> str:
    inner = name.removeprefix(root).lstrip("/")
    if not inner or ".." in inner.split("/"):
        raise UserError(f"{address}: is not a folder")
    return inner
