"""The turn of a target: cases for some seconds, in a process of its own."""

import faulthandler
import multiprocessing
import sys
import time
import traceback

from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded

from fuzz.target import find_targets, run_case

BATCH = 40  # cases before the clock is looked at


def turn(name: str, seconds: float, seed: int, counts: "multiprocessing.Queue[tuple[int, int]]") -> None:
    """Runs cases of a target for some time; ends with status 1 at a fault."""
    faulthandler.enable()
    target = next(t for t in find_targets() if t.name == name)
    until = time.monotonic() + seconds
    done = good = status = 0
    while not status and (not done or time.monotonic() < until):

        @settings(max_examples=BATCH, database=None, deadline=None, suppress_health_check=list(HealthCheck))
        @seeded(seed + (done << 32))
        @given(target.cases)
        def check(case: object) -> None:
            nonlocal done, good
            done += 1
            good += run_case(target, case)

        try:
            check()
        except Exception:
            traceback.print_exc()
            status = 1
    counts.put((done, good))
    counts.close()
    counts.join_thread()
    sys.exit(status)
