"""What a program did when, in a file that Perfetto (ui.perfetto.dev) and chrome://tracing show.

`span` costs next to nothing while no timeline is recorded. The file is JSON in Chrome's trace event format: a row for
every thread, and one for what the device was given by a thread and has not handed back yet.
"""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from virst_jax.io import atomic

DEVICE = "given to the device"  # the row of `flight`


class Timeline:
    """Spans of time, by any thread."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._events: list[dict[str, Any]] = []
        self._rows: dict[tuple[str, int], int] = {}  # threads of several videos bear the same names
        self._lock = threading.Lock()

    def add(self, name: str, start: float, end: float, row: str) -> None:
        """A span of this thread; start and end as of time.perf_counter, in seconds."""
        with self._lock:
            number = self._rows.setdefault((row, threading.get_ident()), len(self._rows))
            ends = {"ts": round(1e6 * (start - self._began), 1), "dur": round(1e6 * (end - start), 1)}
            self._events.append({"name": name, "ph": "X", "pid": 0, "tid": number, **ends})

    def content(self) -> dict[str, Any]:
        """The file's content."""
        with self._lock:
            rows: list[dict[str, Any]] = [
                {"name": "thread_name", "ph": "M", "pid": 0, "tid": number, "args": {"name": row}}
                for (row, _), number in self._rows.items()
            ]
            return {"traceEvents": rows + self._events, "displayTimeUnit": "ms"}


_current: Timeline | None = None


@contextlib.contextmanager
def recorded(path: Path | None) -> Iterator[None]:
    """Records what all threads do inside the block, and writes it to a file behind it; None: does neither.

    Raises:
      WriteError: the file cannot be written, which is told before the block begins where it can be.
    """
    global _current
    if path is None:
        yield
        return
    atomic.check_place(path)
    _current = timeline = Timeline()
    try:
        yield
    finally:
        _current = None
        atomic.write_text(path, json.dumps(timeline.content()) + "\n")


@contextlib.contextmanager
def span(name: str) -> Iterator[None]:
    """The block's time, in the row of this thread."""
    if _current is None:
        yield
        return
    start = time.perf_counter()
    try:
        yield
    finally:
        if (timeline := _current) is not None:
            timeline.add(name, start, time.perf_counter(), threading.current_thread().name)


def flight(name: str, start: float) -> None:
    """Something that was given to the device at `start` (of time.perf_counter) and has come back now."""
    if (timeline := _current) is not None:
        timeline.add(name, start, time.perf_counter(), DEVICE)
