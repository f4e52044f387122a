"""A progress bar for every stage of a command, on stderr."""

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


class Progress:
    """Called with a stage, how much of it is done and of how much (0: unknown); shows a bar for each stage.

    On anything but a terminal it prints nothing.
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

    def __enter__(self) -> "Progress":
        self._bars.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
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
