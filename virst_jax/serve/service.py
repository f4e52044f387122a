"""A model, the threads that use it, and the sessions of all users."""

import contextlib
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from virst_jax.api import Model
from virst_jax.inference.texts import check_expressions
from virst_jax.serve.jobs import Job, Next, Work, Worker
from virst_jax.serve.limits import Limits, Refusal
from virst_jax.serve.registry import Registry
from virst_jax.serve.served_session import NO_TEXT, ServedSession
from virst_jax.tracking import TrackerModel

FAULT = "the server failed; its log says why"
STOP_SECONDS = 10.0

AnyModel = Model | TrackerModel
OneLine = Callable[[BaseException], str | None]


class Service:
    """Everything that the requests of a server share.

    Args:
      one_line: gives the line for users of an exception that is no fault of this program, such as a full disk.
      notes: that users should read, such as what the model cannot do.
      home: where the folder for uploads is made; None: the system's folder for temporary files.
    """

    def __init__(
        self,
        model: AnyModel,
        limits: Limits | None = None,
        *,
        one_line: OneLine = lambda error: None,
        notes: Sequence[str] = (),
        home: Path | None = None,
    ):
        self.model, self.limits, self.notes = model, limits or Limits(), tuple(notes)
        self._one_line, self._closed = one_line, False
        self.is_stuck = False  # closed, while a thread is still within a step that nothing can interrupt
        each = {"waiting": self.limits.waiting, "waiting_each": self.limits.waiting_each}
        self.decoding = Worker("decode", self._explain, **each)
        self.device = Worker("device", self._explain, **each)
        self.registry = Registry(self.limits, (self.decoding, self.device), home)

    @property
    def reads_text(self) -> bool:
        return isinstance(self.model, Model)

    @property
    def answers(self) -> bool:
        return isinstance(self.model, Model) and self.model.answers

    def check_sentences(self, sentences: Sequence[str]) -> list[str]:
        """Sentences that can be read, as they were given.

        Raises:
          UserError: none, too many, or one that is empty, too long or holds a control token.
        """
        if not isinstance(self.model, Model):
            raise Refusal(NO_TEXT, 409)
        limits = self.limits
        if len(sentences) > limits.sentences:
            raise Refusal(f"{len(sentences)} sentences; {limits.sentences} can be read at a time", 400)
        for text in sentences:
            if len(text) > limits.sentence_length:
                raise Refusal(f"the sentence {text[:40]!r}... has more than {limits.sentence_length} characters", 400)
        check_expressions(self.model.tokenizer, sentences)
        return list(sentences)

    def read(self, session: ServedSession, sentences: Sequence[str] = ()) -> Job:
        """Decodes a session's video; then objects are sought by sentences, if there are any."""
        job = Job(session.id, "segment" if sentences else "read")

        def work(job: Job) -> dict[str, Any] | Next:
            session.read(job)
            if not sentences:
                return {}
            return Next(self.device, self._on_device(session, lambda j: session.add_text(self.model, sentences, j)))

        return self._submit(self.decoding, job, work)

    def submit(self, session: ServedSession, kind: str, work: Callable[[Job], dict[str, Any]]) -> Job:
        """Puts work on the device at the end of the queue. Raises Refusal: it is full, or there is no video yet."""
        _ = session.ready
        return self._submit(self.device, Job(session.id, kind), self._on_device(session, work))

    def position(self, job: Job) -> int:
        """How many jobs are before one; 0: it is at work, or finished."""
        found = (worker.position(job) for worker in (self.decoding, self.device))
        return next((place for place in found if place is not None), 0)

    def cancel(self, job: Job) -> None:
        for worker in (self.decoding, self.device):
            worker.cancel(job)

    def close(self) -> None:
        """Ends all work and deletes all files."""
        if self._closed:
            return
        self._closed = True
        stopped = [worker.stop(STOP_SECONDS) for worker in (self.decoding, self.device)]
        self.is_stuck = not all(stopped)
        self.registry.close()

    def _submit(self, worker: Worker, job: Job, work: Work) -> Job:
        worker.submit(job, work)
        return self.registry.jobs.add(job)

    def _on_device(self, session: ServedSession, work: Callable[[Job], dict[str, Any]]) -> Work:
        def run(job: Job) -> dict[str, Any]:
            self.registry.share_memory(session)
            try:
                return work(job)
            finally:
                session.touch()

        return run

    def line_of(self, error: BaseException) -> str:
        """What users are told of an exception that is no bad input."""
        with contextlib.suppress(Exception):
            return self._one_line(error) or FAULT
        return FAULT

    def _explain(self, error: BaseException) -> str:
        line = self.line_of(error)
        if line == FAULT:
            traceback.print_exception(error)
        return line
