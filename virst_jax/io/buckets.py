"""Folders in object stores, gs:// and s3:// (fsspec): paths, whole files, local copies, and a lock.

An object appears whole, so a file that is written there needs no part and no renaming. What an object store lacks are
appending, renaming and locks of the system. So a file that grows is kept in a local folder and copied (`Mirror`), and a
run holds a folder by an object that it writes again and again (`held`).
"""

import contextlib
import errno
import hashlib
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from virst_jax.errors import UserError, WriteError
from virst_jax.io.address import ADDRESS

if TYPE_CHECKING:
    from etils import epath
    from fsspec import AbstractFileSystem

    Place: TypeAlias = Path | epath.Path  # of a file system, or in a bucket

KINDS = ("gs", "s3")
CACHE = "VIRST_CACHE"  # environment variable: where copies lie; default: .cache/virst_jax in the home folder
LOCK = ".lock"
BEAT = 5.0  # seconds between two signs of life of a run that holds a folder
SILENCE = 20.0  # seconds without one after which it counts as dead
SETTLE = 1.0  # seconds in which another run that begins at the same moment is noticed
STREAMS = 16  # files that are copied at the same time
PATIENCE = 3600.0  # seconds that a process waits for what the others send or fetch


def kind_of(path: "str | PurePath") -> str:
    """gs or s3; empty for what is no address in an object store."""
    found = ADDRESS.fullmatch(str(path))
    kind = found[1].lower() if found is not None else ""
    return kind if kind in KINDS else ""


def is_bucket(path: "str | PurePath") -> bool:
    """Whether a path is an address in an object store."""
    return bool(kind_of(path))


def takes_orbax(path: "str | PurePath") -> bool:
    """Whether Orbax writes to a path itself: 0.12 knows file systems and gs://."""
    return kind_of(path) != "s3"


def address_of(path: "str | PurePath") -> str:
    """An address as a bucket's library reads it: pathlib makes gs:/bucket of gs://bucket."""
    found = ADDRESS.fullmatch(str(path))
    assert found is not None
    return f"{found[1].lower()}://{found[2].rstrip('/')}"


def place(path: "str | PurePath") -> "Place":
    """A path of the file system, or one in a bucket with the same methods.

    Raises:
      UserError: what reads buckets is not installed.
    """
    if not is_bucket(path):
        return Path(path)
    from etils import epath

    system(path)
    return epath.Path(address_of(path))


def absolute(path: "Place") -> "Place":
    """An absolute path; that of a bucket is one."""
    return path if is_bucket(path) else path.absolute()


def system(path: "str | PurePath") -> "tuple[AbstractFileSystem, str]":
    """The store that an address is of, and the path in it.

    Raises:
      UserError: what reads it is not installed, or there is no way to it.
    """
    address = address_of(path)
    try:
        import fsspec

        # what other processes write must be seen at once
        for protocol in ("gs", "gcs", "s3"):
            fsspec.config.conf.setdefault(protocol, {})["use_listings_cache"] = False
        found: tuple[AbstractFileSystem, str] = fsspec.core.url_to_fs(address)
    except ImportError as error:
        raise UserError(f"{address}: pip install 'virst-jax[buckets]' to use buckets ({error})") from error
    except Exception as error:  # each store has errors of its own
        raise unreadable(address, error) from error
    return found


def unreadable(address: object, error: Exception) -> UserError:
    """The error of an address that cannot be read, with what helps."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(f"{address}: cannot be read ({reason}); check the address, the network and your permissions")


def unwritable(address: object, error: Exception) -> WriteError:
    """The error of an address that cannot be written, with what helps."""
    reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200] or type(error).__name__
    return WriteError(f"{address}: cannot be written ({reason}); check the address, the network and your permissions")


def folders(address: "str | PurePath") -> list[str]:
    """Names of the folders in a folder; none if there is no such folder. Raises UserError: it cannot be read."""
    store, root = system(address)
    try:
        entries = store.ls(root, detail=True)
    except FileNotFoundError:
        return []
    except Exception as error:  # each store has errors of its own
        raise unreadable(address, error) from error
    return [PurePath(entry["name"]).name for entry in entries if entry["type"] == "directory"]


def cache_folder() -> Path:
    """Where copies of what lies in buckets are kept."""
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "virst_jax")


@contextlib.contextmanager
def new_file(path: "str | PurePath") -> Iterator[IO[bytes]]:
    """A file to write to, which is put in its place whole when the block ends.

    Raises:
      OSError: the store refuses it.
    """
    with tempfile.NamedTemporaryFile(prefix="virst_") as file:
        yield file
        file.flush()
        put(Path(file.name), path)


def put(source: Path, path: "str | PurePath") -> None:
    """Copies a file to an address. Raises OSError: the store refuses it."""
    store, target = system(path)
    _tried(lambda: store.put_file(str(source), target), path)


def send(folder: Path, address: "str | PurePath", files: Iterable[Path]) -> None:
    """Copies files of a local folder to the same places below an address. Nothing is on its way when this ends.

    Raises:
      WriteError: the bucket cannot be written.
    """
    root = address_of(address)
    try:
        with ThreadPoolExecutor(STREAMS, thread_name_prefix="send") as pool:
            for _ in pool.map(lambda file: put(file, f"{root}/{file.relative_to(folder).as_posix()}"), files):
                pass
    except OSError as error:
        raise unwritable(root, error) from error


def files_below(folder: "Place") -> "list[Place]":
    """All files in a folder and in those below it, of a file system or in a bucket."""
    if not is_bucket(folder):
        return [file for file in Path(folder).rglob("*") if file.is_file()]
    store, root = system(folder)
    names = _tried(partial(store.find, root), folder)
    return [folder / name.removeprefix(root).lstrip("/") for name in names]


def size_below(folder: "str | PurePath") -> int:
    """Bytes of all objects in a bucket's folder. Raises OSError: the store refuses it."""
    store, root = system(folder)
    return sum(int(entry["size"]) for entry in _tried(partial(store.find, root, detail=True), folder).values())


def size_of(path: "str | PurePath") -> int | None:
    """The size of an object in bytes; None: there is none. Raises UserError: the store cannot be read."""
    store, target = system(path)
    try:
        entry = store.info(target)
    except FileNotFoundError:
        return None
    except Exception as error:  # each store has errors of its own
        raise unreadable(address_of(path), error) from error
    return int(entry["size"]) if entry["type"] == "file" else None


def remove(path: "str | PurePath") -> None:
    """Removes a bucket's folder with all that is in it, if it is there. Raises OSError: the store refuses it."""
    store, target = system(path)
    with contextlib.suppress(FileNotFoundError):
        _tried(partial(store.rm, target, recursive=True), path)


def _tried(call: Callable[[], Any], path: object) -> Any:
    try:
        return call()
    except FileNotFoundError:
        raise
    except Exception as error:  # each store has errors of its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise OSError(getattr(error, "errno", None) or errno.EIO, reason, str(path)) from error


class Mirror:
    """A local folder, and its copy in a bucket.

    `pull` brings what is new there, `push` what is new here, and both take over what was removed. Several processes may
    share the bucket's folder if no two of them write the same file.

    Args:
      address: of the bucket's folder.
      parts: names of files and folders in it that are copied; none: all.
    """

    def __init__(self, address: "str | PurePath", parts: Sequence[str] = ()):
        self.address, self.parts = address_of(address), tuple(parts)
        self._place = tempfile.TemporaryDirectory(prefix="virst_")
        self.folder = Path(self._place.name)
        self._here: dict[str, tuple[int, int]] = {}  # time and size of what is the same in both
        self._there: dict[str, str] = {}

    def pull(self) -> None:
        """Copies what is new or changed in the bucket to the local folder.

        Raises:
          UserError: the bucket cannot be read.
        """
        store, root = system(self.address)
        try:
            found = {
                name: _version(entry)
                for path, entry in store.find(root, detail=True).items()
                if entry["type"] == "file" and self._taken(name := path.removeprefix(root).lstrip("/"))
            }
            for name in [name for name in self._there if name not in found]:
                (self.folder / name).unlink(missing_ok=True)
                self._forget(name)
            for name, version in found.items():
                if self._there.get(name) != version:
                    file = self.folder / name
                    file.parent.mkdir(parents=True, exist_ok=True)
                    store.get_file(f"{root}/{name}", str(file))
                    self._here[name], self._there[name] = _stamp(file), version
        except FileNotFoundError as error:
            raise UserError(f"{self.address}: files vanish while they are read; is another run at work?") from error
        except OSError as error:
            raise unreadable(self.address, error) from error

    def push(self) -> None:
        """Copies what is new or changed in the local folder to the bucket.

        Raises:
          WriteError: the bucket cannot be written.
        """
        try:
            self._push()
        except OSError as error:
            raise unwritable(self.address, error) from error

    def exchange(self) -> None:
        """`push`, then `pull`: of processes that do so at their end, the last one has everything."""
        self.push()
        self.pull()

    def _push(self) -> None:
        store, root = system(self.address)
        present = {}
        for file in sorted(self.folder.rglob("*")):
            name = file.relative_to(self.folder).as_posix()
            if file.is_file() and self._taken(name):
                present[name] = _stamp(file)
        for name in [name for name in self._here if name not in present]:
            with contextlib.suppress(FileNotFoundError):
                _tried(partial(store.rm_file, f"{root}/{name}"), self.address)
            self._forget(name)
        for name, stamp in present.items():
            if self._here.get(name) != stamp:
                put(self.folder / name, f"{self.address}/{name}")
                self._here[name] = stamp
                self._there[name] = _version(_tried(partial(store.info, f"{root}/{name}"), self.address))

    def close(self) -> None:
        """Removes the local folder."""
        self._place.cleanup()

    def _forget(self, name: str) -> None:
        self._here.pop(name, None)
        self._there.pop(name, None)

    def _taken(self, name: str) -> bool:
        hidden = name.rsplit("/", 1)[-1].startswith(".")  # parts of files that are being written
        return bool(name) and not hidden and (not self.parts or name.split("/", 1)[0] in self.parts)


@contextlib.contextmanager
def mirrored(address: "str | PurePath") -> Iterator[Mirror]:
    """A mirror of a bucket's folder; what is new in it at the end is sent, whatever ends the block.

    Raises:
      UserError: the bucket cannot be read, or (WriteError) written.
    """
    mirror = Mirror(address)
    try:
        mirror.pull()
        try:
            yield mirror
        finally:
            mirror.push()
    finally:
        mirror.close()


def _stamp(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_mtime_ns, found.st_size


def _version(entry: dict[str, Any]) -> str:
    """What changes when an object is written again."""
    return f"{entry.get('etag') or entry.get('ETag') or entry.get('md5Hash') or ''} {entry['size']}"


def version_of(files: dict[str, dict[str, Any]]) -> str:
    """A hash of names and versions of objects."""
    listing = [(name, _version(entry)) for name, entry in sorted(files.items())]
    return hashlib.sha256(repr(listing).encode()).hexdigest()[:20]


@dataclass
class _Holder:
    """The object by which a run holds a folder."""

    path: str

    def __post_init__(self) -> None:
        self.store, self.key = system(self.path)
        self.me = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        self.token = uuid.uuid4().hex
        self.beats = 0

    def read(self) -> str | None:
        try:
            return bytes(_tried(lambda: self.store.cat_file(self.key), self.path)).decode(errors="replace")
        except FileNotFoundError:
            return None

    def write(self) -> None:
        self.beats += 1
        text = f"{self.me}\n{self.token} {self.beats}\n".encode()
        _tried(lambda: self.store.pipe_file(self.key, text), self.path)


@contextlib.contextmanager
def held(folder: "str | PurePath", name: str = LOCK) -> Iterator[None]:
    """Holds a bucket's folder for this run until the block ends.

    A run writes the object FOLDER/NAME anew every few seconds. One that was killed leaves it behind; the next waits
    until it is sure that nobody writes it, `SILENCE` seconds.

    Raises:
      UserError: another run holds it.
      OSError: the bucket cannot be written.
    """
    holder = _Holder(f"{address_of(folder)}/{name}")

    def refuse(text: str) -> UserError:
        who = text.splitlines()[0][:100] if text else "unknown"
        return UserError(
            f"{address_of(folder)}: another run is at work here ({who}); wait for it, or choose another folder"
        )

    seen, since = holder.read(), time.monotonic()
    while seen is not None and time.monotonic() - since < SILENCE:
        time.sleep(min(1.0, SILENCE / 4))
        now = holder.read()
        if now is not None and now != seen:
            raise refuse(now)
        seen = now
    holder.write()
    time.sleep(SETTLE)
    if holder.token not in (found := holder.read() or ""):
        raise refuse(found)
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT):
            with contextlib.suppress(OSError):  # the network may be back for the next one
                holder.write()

    thread = threading.Thread(target=beat, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(OSError):
            _tried(lambda: holder.store.rm_file(holder.key), folder)
