"""All sessions of a server: how many there may be, and when they are deleted."""

import contextlib
import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from virst_jax.errors import UserError
from virst_jax.io import lock
from virst_jax.serve.jobs import JobTable, Worker
from virst_jax.serve.limits import Limits, Refusal
from virst_jax.serve.served_session import ServedSession

PREFIX = "virst-serve-"
LOCK = "lock"


class Registry:
    """Sessions by their ids, their folders below one that is deleted when the server ends.

    Args:
      workers: whose jobs belong to sessions.
      home: where the server's folder is made; None: the system's folder for temporary files.
    """

    def __init__(self, limits: Limits, workers: tuple[Worker, ...], home: Path | None = None):
        self.limits, self.workers, self.jobs = limits, workers, JobTable()
        self._sessions: dict[str, ServedSession] = {}
        self._closing: list[ServedSession] = []
        self._arriving = 0
        self._lock = threading.Lock()
        parent = Path(home or tempfile.gettempdir())
        remove_abandoned(parent)
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self._held = contextlib.ExitStack()
        self._held.enter_context(lock.exclusive(self.folder, LOCK))

    @contextlib.contextmanager
    def room(self) -> Iterator[Path]:
        """Keeps a place for an upload that is arriving, and gives a folder for it.

        The folder is deleted if the block raises; otherwise it belongs to a session.

        Raises:
          Refusal: there are too many uploads or sessions.
        """
        self._make_room()
        with self._lock:
            if self._arriving >= self.limits.uploads:
                raise Refusal("too many videos are being uploaded; try again in a minute", 503)
            if len(self._sessions) + self._arriving >= self.limits.sessions:
                raise Refusal(
                    f"{self.limits.sessions} videos are open on this server, its limit; try again in some minutes", 503
                )
            self._arriving += 1
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            with self._lock:
                self._arriving -= 1

    def add(self, session: ServedSession) -> ServedSession:
        with self._lock:
            self._sessions[session.id] = session
        return session

    def get(self, session_id: str) -> ServedSession:
        """Raises Refusal: there is no such session."""
        with self._lock:
            session = self._sessions.get(session_id)
        if session is None:
            minutes = self.limits.idle_seconds / 60
            raise Refusal(
                f"there is no such session; its files are deleted after {minutes:g} minutes without use: upload again",
                404,
            )
        session.touch()
        return session

    def delete(self, session_id: str) -> None:
        """Ends a session's jobs and deletes its files, as soon as no thread works on them."""
        with self._lock:
            session = self._sessions.pop(session_id, None)
            if session is None:
                return
            self._closing.append(session)
        for worker in self.workers:
            worker.cancel_session(session_id)
        self.sweep()

    def sweep(self) -> None:
        """Deletes sessions that nobody has used for long."""
        now = time.monotonic()
        with self._lock:
            idle = [x.id for x in self._sessions.values() if now - x.used > self.limits.idle_seconds]
        for session_id in idle:
            if not self.is_busy(session_id):
                self.delete(session_id)
        with self._lock:
            ready = [x for x in self._closing if not self.is_busy(x.id)]
            self._closing = [x for x in self._closing if x not in ready]
        for session in ready:
            session.close()
            self.jobs.forget_session(session.id)

    def is_busy(self, session_id: str) -> bool:
        return any(worker.is_busy(session_id) for worker in self.workers)

    def share_memory(self, active: ServedSession) -> None:
        """Frees the device's memory of other sessions' frames, those first that were not used for longest.

        To be called by the thread that uses the device.
        """
        with self._lock:
            others = sorted((x for x in self._sessions.values() if x is not active), key=lambda x: x.used)
            closing = list(self._closing)
        sizes = {x.id: 0 if (n := x.network) is None else n.features.num_bytes for x in others}
        total = sum(sizes.values())
        for session in [*closing, *others]:
            network = session.network
            if network is not None and (session in closing or total > self.limits.feature_bytes):
                network.features.clear()
                total -= sizes.get(session.id, 0)

    def close(self) -> None:
        """Deletes everything."""
        self._held.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _make_room(self) -> None:
        """Deletes a session if there is no room: one without video, or that was left alone for longest."""
        self.sweep()
        with self._lock:
            if len(self._sessions) + self._arriving < self.limits.sessions:
                return
            rest = sorted(self._sessions.values(), key=lambda x: (x.reader is not None, x.used))
        for session in rest:
            idle = time.monotonic() - session.used
            if (idle > self.limits.spare_seconds or session.reader is None) and not self.is_busy(session.id):
                self.delete(session.id)
                return


def remove_abandoned(parent: Path) -> None:
    """Deletes folders of servers that were killed before they could."""
    for folder in parent.glob(f"{PREFIX}*"):
        # one without lock has just been made; what others have put here could lead anywhere
        if not _is_mine(folder, stat.S_ISDIR) or not _is_mine(folder / LOCK, stat.S_ISREG):
            continue
        try:
            with lock.exclusive(folder, LOCK):
                shutil.rmtree(folder, ignore_errors=True)
        except (UserError, OSError):
            continue  # a server is at work there


def _is_mine(path: Path, kind: Callable[[int], bool]) -> bool:
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return kind(found.st_mode) and (not hasattr(os, "geteuid") or found.st_uid == os.geteuid())
