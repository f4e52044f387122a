"""Work that takes long, done by one thread for all users, in the order in which it was asked for."""

import itertools
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from virst_jax.errors import UserError
from virst_jax.serve.limits import Refusal, status_of

State = Literal["queued", "running", "done", "failed", "cancelled"]
Explain = Callable[[BaseException], str]


class Cancelled(Exception):
    """Raised within a job's work when somebody has cancelled it. Its message says how much was kept, if anything."""


@dataclass(eq=False)
class Job:
    """Something that was asked for.

    Attributes:
      session_id: of the session that it belongs to.
      kind: what is done.
      stage, done, total: how far it is; total 0: unknown.
      error: one line, once it has failed or was cancelled.
      status: of HTTP, once it has failed.
      result: of the work.
    """

    session_id: str
    kind: str
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    state: State = "queued"
    stage: str = ""
    done: int = 0
    total: int = 0
    error: str = ""
    status: int = 200
    result: dict[str, Any] = field(default_factory=dict)
    cancelling: bool = False

    @property
    def finished(self) -> bool:
        return self.state in ("done", "failed", "cancelled")

    def note(self, stage: str, done: int, total: int) -> None:
        """Notes how far the work is."""
        self.stage, self.done, self.total = stage, done, total

    def progress(self, stage: str, done: int, total: int) -> None:
        """As `note`. Raises Cancelled: somebody wants the work to end."""
        self.note(stage, done, total)
        self.check()

    def check(self) -> None:
        """Raises Cancelled if somebody wants the work to end."""
        if self.cancelling:
            raise Cancelled


# A job's work gives its result, or the thread that goes on with it and what is left to do.
Work = Callable[[Job], "dict[str, Any] | Next"]


@dataclass(frozen=True)
class Next:
    """The rest of a job, for another thread."""

    worker: "Worker"
    work: Work


class Worker:
    """A thread that does one job after the other.

    Args:
      name: of the thread.
      explain: gives the line that users see of an exception that is no bad input; it may log the exception.
      waiting, waiting_each: jobs that may wait, of all sessions and of one.
    """

    def __init__(self, name: str, explain: Explain, *, waiting: int = 32, waiting_each: int = 8):
        self._explain, self._waiting, self._waiting_each = explain, waiting, waiting_each
        self._queue: list[tuple[Job, Work]] = []
        self._running: Job | None = None
        self._ready = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Job, work: Work) -> None:
        """Puts a job at the end of the queue.

        Raises:
          Refusal: the queue is full, or the server is stopping.
        """
        with self._ready:
            if self._stopped:
                raise Refusal("the server is stopping", 503)
            if sum(other.session_id == job.session_id for other, _ in self._queue) >= self._waiting_each:
                raise Refusal(f"{self._waiting_each} requests of this session wait already; wait for one of them", 429)
            if len(self._queue) >= self._waiting:
                raise Refusal("too many requests are waiting; try again in a minute", 503)
            self._enqueue(job, work)

    def position(self, job: Job) -> int | None:
        """How many jobs are before a job, the one at work too; None: it is not in this queue."""
        with self._ready:
            before = next((i for i, (other, _) in enumerate(self._queue) if other is job), None)
            return None if before is None else before + (self._running is not None)

    def cancel(self, job: Job) -> None:
        """Ends a job: at once if it waits, else as soon as its work looks."""
        with self._ready:
            job.cancelling = True
            left = [(other, work) for other, work in self._queue if other is not job]
            if len(left) < len(self._queue):
                self._queue = left
                job.error, job.state = "cancelled before it began", "cancelled"

    def is_busy(self, session_id: str) -> bool:
        """Whether a session's job is at work or waits."""
        with self._ready:
            running = self._running is not None and self._running.session_id == session_id
            return running or any(job.session_id == session_id for job, _ in self._queue)

    def cancel_session(self, session_id: str) -> None:
        """Ends all jobs of a session."""
        with self._ready:
            jobs = [*(job for job, _ in self._queue), *filter(None, [self._running])]
        for job in jobs:
            if job.session_id == session_id:
                self.cancel(job)

    def stop(self, seconds: float) -> bool:
        """Cancels everything and ends the thread. Gives whether it has ended within so many seconds."""
        with self._ready:
            self._stopped = True
            jobs = [*(job for job, _ in self._queue), *filter(None, [self._running])]
            self._ready.notify_all()
        for job in jobs:
            self.cancel(job)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _enqueue(self, job: Job, work: Work) -> None:
        with self._ready:
            if job.cancelling or self._stopped:
                job.error, job.state = "cancelled", "cancelled"
                return
            job.state, job.stage, job.done, job.total = "queued", "", 0, 0
            self._queue.append((job, work))
            self._ready.notify()

    def _loop(self) -> None:
        while True:
            with self._ready:
                self._ready.wait_for(lambda: self._queue or self._stopped)
                if self._stopped:
                    return
                job, work = self._queue.pop(0)
                self._running, job.state = job, "running"
            try:
                _do(job, work, self._explain)
            finally:
                with self._ready:
                    self._running = None


def _do(job: Job, work: Work, explain: Explain) -> None:
    """Whatever happens, the job is finished behind it, or waits for another thread."""
    state: State = "failed"
    try:
        job.check()
        result = work(job)
        if isinstance(result, Next):
            result.worker._enqueue(job, result.work)
            return
        job.result, state = result, "done"
    except Cancelled as stop:
        job.error, state = str(stop) or "cancelled", "cancelled"
    except UserError as error:
        job.error, job.status = str(error), status_of(error)
    except BaseException as error:  # a fault, or the device's; the thread goes on for the others
        job.error, job.status = explain(error), 500
    job.state = state


class JobTable:
    """Jobs by their ids, the last ones of every session."""

    KEPT = 64  # of a session

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()

    def add(self, job: Job) -> Job:
        with self._lock:
            self._jobs[job.id] = job
            over = [x for x in self._jobs.values() if x.session_id == job.session_id and x.finished]
            for old in itertools.islice(over, max(0, len(over) - self.KEPT)):
                del self._jobs[old.id]
        return job

    def get(self, job_id: str) -> Job:
        """Raises Refusal: there is no such job."""
        with self._lock:
            if job_id not in self._jobs:
                raise Refusal("there is no such job; it may have been deleted with its session", 404)
            return self._jobs[job_id]

    def unfinished(self, session_id: str) -> list[str]:
        """Ids of a session's jobs that wait or are at work, the first one first."""
        with self._lock:
            return [x.id for x in self._jobs.values() if x.session_id == session_id and not x.finished]

    def forget_session(self, session_id: str) -> None:
        with self._lock:
            self._jobs = {k: job for k, job in self._jobs.items() if job.session_id != session_id}
