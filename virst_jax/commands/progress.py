"""How far a command has come, on stderr: a bar for every stage, or lines where nobody looks at a terminal."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

QUICK_SECONDS = 10.0  # work that is done by then says nothing off a terminal
LINE_SECONDS = 60.0  # between two lines of one stage
_WHOLE = "videos"

Tell = Callable[[str, int, int], None]  # a stage, how much of it is done, and of how much


class Progress:
    """Called with a stage, how much of it is done and of how much (0: unknown).

    On a terminal it shows a bar for each stage. Elsewhere, such as in a log file, it prints a line for each stage and
    each minute, once the work has taken `QUICK_SECONDS`.
    """

    def __init__(self, quiet: bool = False):
        console = Console(stderr=True)
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description:20}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self._tasks: dict[str, Any] = {}
        self._compiled = 0
        self._lines = None if quiet or console.is_terminal else _Lines()
        self._at_work: dict[str, str] = {}  # of several videos, where each stands
        self._lock = threading.Lock()

    def __enter__(self) -> "Progress":
        self._bars.start()
        if self._lines is not None:
            self._lines.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()
        if self._lines is not None:
            self._lines.stop()

    def begin(self, name: str, number: int, total: int) -> None:
        """One of several videos comes next: its stages take the place of those of the video before."""
        for stage, task in list(self._tasks.items()):
            if stage != _WHOLE:
                self._bars.remove_task(task)
                del self._tasks[stage]
        self._bars.update(self._task(_WHOLE, total), completed=number - 1, description=f"video {number}: {name}"[:40])
        if self._lines is not None:
            self._lines.title = f"video {number} of {total} ({name}), "

    def finished(self, number: int, total: int) -> None:
        """So many of several videos are through, of those that are worked on at the same time."""
        self._bars.update(self._task(_WHOLE, total), completed=number)
        if self._lines is not None:
            self._lines.title = f"{number} of {total} videos done, "

    @contextlib.contextmanager
    def beside(self, name: str) -> Iterator[Tell]:
        """What to call for one of several videos that are worked on at the same time; each has a bar of its own."""
        bar = self._bars.add_task(name[:20], total=0)

        def tell(stage: str, done: int, total: int) -> None:
            self._bars.update(bar, description=f"{name[:20]}: {stage}", completed=done, total=total)
            self._show_beside(name, f"{name}: {stage}" + (f" {done} of {total}" if total else ""))

        try:
            yield tell
        finally:
            self._bars.remove_task(bar)
            self._show_beside(name, None)

    def _show_beside(self, name: str, where: str | None) -> None:
        with self._lock:
            self._at_work.pop(name, None)
            if where is not None:
                self._at_work[name] = where
            if self._lines is not None and self._at_work:
                self._lines.set(", ".join(sorted(self._at_work.values())), 0, 0)

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._lines is not None:
            self._lines.set(stage, done, total)
        if stage.startswith("compile "):
            # one line for all that is compiled; it shows what is at work
            self._compiled += 1
            task = self._task("compile", None)
            self._bars.update(task, description=f"{stage} ...", completed=self._compiled)
            return
        if "compile" in self._tasks:
            self._bars.update(self._tasks["compile"], description="compile")
        self._bars.update(self._task(stage, total or None), completed=done, total=total or None)

    def _task(self, stage: str, total: int | None) -> Any:
        if stage not in self._tasks:
            for task in self._bars.tasks:
                if task.total is None:  # what has no end is through when the next stage begins
                    self._bars.stop_task(task.id)
            self._tasks[stage] = self._bars.add_task(stage, total=total)
        return self._tasks[stage]


class _Lines:
    """Prints where the work stands, from a thread of its own: a stage may be silent for minutes."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self.title = ""  # of the video that is at work, if there are several
        self._now: tuple[str, int, int] | None = None
        self._told: tuple[str, float] = ("", 0.0)  # stage and time of the last line
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="progress")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def set(self, stage: str, done: int, total: int) -> None:
        self._now = (stage, done, total)

    def _work(self) -> None:
        while not self._stop.wait(0.25):
            self.tick(time.monotonic())

    def tick(self, now: float) -> None:
        """Prints a line if one is due."""
        if self._now is None or now - self._begin < QUICK_SECONDS:
            return
        (stage, done, total), (told, when) = self._now, self._told
        same = self.title or stage  # of several videos, not every stage takes a line
        if same == told and now - when < LINE_SECONDS:
            return
        self._told = (same, now)
        seconds = int(now - self._begin)
        far = f": {done} of {total}" if total else ""
        print(f"[{seconds // 60:02d}:{seconds % 60:02d}] {self.title}{stage}{far}", file=sys.stderr, flush=True)
