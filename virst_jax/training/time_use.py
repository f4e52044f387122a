"""Where the time of a stage goes: how much of it trains (goodput), and what the rest was spent on."""

import time
from collections import defaultdict
from collections.abc import Callable

STEPS = "steps"  # what trains
COMPILE = "compile"  # a kind of batch's first step
DATA = "data"
CHECKPOINT, EVALUATION = "checkpoint", "evaluation"

Listener = Callable[[str, float, float], None]  # what time was spent on, and its first and last second on the clock


class TimeUse:
    """Seconds of this process by what they were spent on.

    Steps run on the devices while the process prepares the next ones. Time that it waits for data is therefore lost
    only as far as the devices had nothing left to do; the share of data is an upper bound of that.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, listener: Listener | None = None):
        self.clock, self.listener = clock, listener
        self.seconds: dict[str, float] = defaultdict(float)
        self.last = clock()

    def lap(self, kind: str) -> None:
        """Counts the time since the last call to `kind`."""
        now = self.clock()
        self.seconds[kind] += now - self.last
        if self.listener:
            self.listener(kind, self.last, now)
        self.last = now

    def share(self, kind: str) -> float:
        """The part of the time until the last call that was spent on `kind`; 0 before any."""
        together = sum(self.seconds.values())
        return self.seconds.get(kind, 0.0) / together if together else 0.0

    def summary(self) -> str:
        """One line, such as "12.5 min: steps 90% (goodput), compile 6%, data 4%"; the largest part first."""
        parts = sorted(self.seconds, key=lambda kind: -self.seconds[kind])
        named = [f"{kind} {self.share(kind):.0%}{' (goodput)' if kind == STEPS else ''}" for kind in parts]
        return f"{sum(self.seconds.values()) / 60:.1f} min: {', '.join(named)}"
