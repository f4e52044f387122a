"""New cases for the targets in turn, until the time is over: python -m tests.fuzz --minutes 30 [--only NAME ...]

Each turn of a target is a process of its own, so that one that crashes is named and the others go on. A fault is
printed with the smallest case that shows it. Exit status 1 if there was one.
"""

import argparse
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

TURN = 20.0  # seconds of a target, then the next has its turn


def main() -> int:
    """Runs all targets, or those that are named."""
    from fuzz.target import find_targets
    from fuzz.turn import turn

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="targets, or the start of their names")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    args = parser.parse_args()
    names = [t.name for t in find_targets() if not args.only or t.name.startswith(tuple(args.only))]
    if not names:
        parser.error("no such target")
    until = time.monotonic() + 60 * args.minutes
    seconds = min(TURN, 60 * args.minutes / len(names))
    print(f"{len(names)} targets, seed {args.seed}")
    context = multiprocessing.get_context("spawn")
    totals = {name: [0, 0, 0] for name in names}  # cases, read, faults
    number = 0
    while time.monotonic() < until:
        name = names[number % len(names)]
        counts: multiprocessing.Queue[tuple[int, int]] = context.Queue()
        process = context.Process(target=turn, args=(name, seconds, args.seed + number, counts))
        process.start()
        process.join(seconds + 600)
        if process.is_alive():
            process.kill()
            process.join()
        done, good = counts.get(timeout=5) if process.exitcode in (0, 1) else (0, 0)
        for i, count in enumerate((done, good, int(process.exitcode != 0))):
            totals[name][i] += count
        if process.exitcode not in (0, 1):
            print(f"{name}: the process ended with {process.exitcode}, seed {args.seed + number}")
        number += 1
    for name, (done, good, faults) in totals.items():
        print(f"{name:32} {done:7} cases, {good:7} read" + (f", {faults} turns with a fault" if faults else ""))
    return int(any(faults for *_, faults in totals.values()))


if __name__ == "__main__":
    sys.exit(main())
