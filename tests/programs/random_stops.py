"""Stops train.py by SIGTERM at random moments, and has it go on with another number of processes each time.

    python tests/programs/random_stops.py FOLDER [--stops 20] [--processes 1,2,2,4] [--minutes M] [--seed 0]

One run of many steps goes through all stops, and is held against the curve of an undisturbed run of one process. A
signal goes to one process or to all, at a moment of the first seconds of steps or, each fifth time, of the start.
Prints a table, also as FOLDER/stops.json; exit status 1 if a group of processes did not end, ended without a checkpoint
of the step that it had reached, or if a loss differs.
"""

import argparse
import json
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from helpers import train_processes as runs
from helpers.process_cases import Group
from helpers.train_cases import losses

# losses are the same for any number of steps; sums over devices are rounded in another order by other processes
FLAGS = (
    "--config.checkpoint.every=25",
    "--config.stage.optim.schedule=constant",
    "--config.stage.optim.learning_rate=0.0003",
)
ENDLESS = 10**6
TOLERANCE = 1e-3  # relative
LIMIT = 900.0  # seconds that anything may take on a busy machine
AFTER = 4.0  # seconds of steps in which a signal comes


@dataclass
class Ending:
    """How a group of processes ended."""

    processes: int
    signalled: list[int]
    moment: str
    statuses: list[int]
    seconds: float  # from the first signal to the last end
    begin: int  # step that the group went on from
    reached: int  # last step in the log
    saved: int  # step of the latest checkpoint
    ok: bool


def stop(group: Group, workdir: Path, rng: random.Random, at_start: bool) -> Ending:
    """Waits for a random moment, sends the signals, and waits for the end."""
    count = len(group.processes)
    begin = (runs.checkpoints(workdir) or [0])[-1]
    if at_start:
        time.sleep(rng.uniform(0, 40))
    else:
        group.until(lambda: steps_of(workdir) > begin, seconds=LIMIT)
        time.sleep(rng.uniform(0, AFTER))
    targets = list(range(count)) if rng.random() < 0.5 else [rng.randrange(count)]
    for index in targets:
        group.processes[index].send_signal(signal.SIGTERM)
        time.sleep(rng.uniform(0, 0.1))
    since = time.monotonic()
    statuses = group.wait(LIMIT)
    seconds = time.monotonic() - since
    reached, saved = steps_of(workdir), (runs.checkpoints(workdir) or [0])[-1]
    if reached > begin:
        ok = statuses == [runs.STOPPED] * count and saved == reached
    else:  # before the first step there is nothing new to keep
        ok = 0 not in statuses and saved == begin
    moment = "start" if at_start else "steps"
    return Ending(count, targets, moment, statuses, round(seconds, 1), begin, reached, saved, ok)


def steps_of(workdir: Path) -> int:
    """The last step in the log."""
    if not (workdir / "stage" / "metrics.csv").is_file():
        return 0
    return max(losses(workdir), default=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stops", type=int, default=20)
    parser.add_argument("--processes", default="1,2,2,4")
    parser.add_argument("--minutes", type=float, default=10**6, help="begin no further stop after so many")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, counts = random.Random(args.seed), [int(n) for n in args.processes.split(",")]
    args.folder.mkdir(parents=True)
    start = runs.start_model(args.folder / "start")
    workdir, endings = args.folder / "run", []
    since = time.monotonic()
    for number in range(args.stops):
        if time.monotonic() - since > 60 * args.minutes:
            break
        count = rng.choice(counts)
        with runs.training(workdir, start, count, *FLAGS, steps=ENDLESS) as group:
            endings.append(stop(group, workdir, rng, at_start=number % 5 == 4))
            print(json.dumps(asdict(endings[-1])), flush=True)
            if not endings[-1].ok:
                print(group.outputs(), flush=True)
    steps = max(ending.saved for ending in endings) + 5
    runs.complete(workdir, start, rng.choice(counts), *FLAGS, steps=steps, seconds=LIMIT)
    runs.complete(args.folder / "one", start, 1, *FLAGS, steps=steps, seconds=LIMIT)
    differ = runs.largest_difference(workdir, losses(args.folder / "one"))
    whole = all(ending.ok for ending in endings)
    print(f"{len(endings)} stops, {sum(ending.ok for ending in endings)} as they should be")
    print(f"{steps} steps; losses differ from those of one undisturbed process by at most {differ:.1e} (relative)")
    table = {"stops": [asdict(ending) for ending in endings], "steps": steps, "largest_difference": differ}
    (args.folder / "stops.json").write_text(json.dumps(table, indent=1))
    return 0 if whole and differ < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
