"""Processes that score videos beside the one that evaluates, and what becomes of their failures.

A video that cannot be scored fails by itself, also one whose process is killed (for want of memory, say). The processes
end with the one that started them, however that ends.
"""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Protocol

from virst_jax.errors import UserError, printable
from virst_jax.evaluation.benchmarks import Opened, VideoScores

Result = Callable[[], VideoScores]  # raises what scoring raised


class Score(Protocol):
    """Scores a video of a data set by its number. Picklable."""

    def __call__(self, source: Opened, index: int) -> VideoScores: ...


class Workers:
    """Scores videos, in processes of their own or, with a count of 0, in this one when the result is asked for."""

    def __init__(self, source: Opened, score: Score, count: int):
        self._source, self._score, self._count = source, score, count
        self._pool: ProcessPoolExecutor | None = None
        self._pending: dict[str, tuple[int, Future[VideoScores]]] = {}

    def submit(self, name: str, index: int) -> Result | None:
        """Has a video scored; the result, if no process will have it."""
        if self._count < 1:
            return partial(self._score, self._source, index)
        if self._pool is None:
            self._pool = self._start(self._count)
        try:
            self._pending[name] = index, self._pool.submit(_score, index)
        except BrokenProcessPool as error:
            broken: Future[VideoScores] = Future()
            broken.set_exception(error)
            self._pending[name] = index, broken
        return None

    def results(self, wait: bool) -> Iterator[tuple[str, Result]]:
        """Names and results of videos that are scored; with `wait` of all."""
        if wait:
            for _ in as_completed([future for _, future in self._pending.values()]):
                yield from self._finished()
        yield from self._finished()

    def close(self) -> None:
        """Ends the processes; what has not begun is not scored."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _finished(self) -> Iterator[tuple[str, Result]]:
        done = [(name, *entry) for name, entry in self._pending.items() if entry[1].done()]
        for name, index, future in done:
            del self._pending[name]
            if isinstance(future.exception(), BrokenProcessPool):
                # all that was under way fails when one process is killed: which it was is found one by one
                self.close()
                self._pool = None
                yield name, partial(self._score_alone, name, index)
            else:
                yield name, future.result

    def _score_alone(self, name: str, index: int) -> VideoScores:
        pool = self._start(1)
        try:
            return pool.submit(_score, index).result()
        except BrokenProcessPool as error:
            raise UserError(
                f"video {name}: the process that scored it was killed, perhaps for want of memory"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _start(self, count: int) -> ProcessPoolExecutor:
        # "spawn": a fork would copy the threads' locks of the accelerator's runtime
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(count, context, _begin, (self._source, self._score))


def reason(error: BaseException) -> str:
    """Why a video failed, on one line. What nobody foresaw is told with its place in the program."""
    text = " ".join(printable(str(error)).split())[:500]
    if isinstance(error, (UserError, OSError)):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"unexpected {type(error).__name__}{place}: {text}"


_STATE: tuple[Opened, Score] | None = None  # of a worker


def _begin(source: Opened, score: Score) -> None:
    global _STATE
    _STATE = source, score
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _score(index: int) -> VideoScores:
    assert _STATE is not None
    source, score = _STATE
    return score(source, index)
