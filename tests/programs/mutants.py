"""Prints for every fault of helpers.mutants which operation bisecting names.

    PYTHONPATH=tests:. python tests/programs/mutants.py [WORDS]

With words, only the faults whose name or operation holds them.
"""

import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path

from helpers.bisect_case import write_case
from helpers.mutants import MUTANTS, first_named, open_recorded


def main() -> int:
    words = " ".join(sys.argv[1:])
    named = 0
    chosen = [m for m in MUTANTS if words in m.name or words in m.expected]
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            recorded = open_recorded(write_case(Path(folder)))
        print(f"{'fault':38} {'first difference':30} {'error':>8} {'explained':>9} {'s':>5}")
        for mutant in chosen:
            start = time.perf_counter()
            row = first_named(mutant, recorded)
            found = row.operation if row else "none"
            named += found == mutant.expected
            numbers = (row.alone, row.explained) if row else (None, None)
            told = " ".join("" if x is None else f"{x:9.1e}" for x in numbers)
            wrong = "" if found == mutant.expected else f"  EXPECTED {mutant.expected}"
            print(f"{mutant.name:38} {found:30} {told} {time.perf_counter() - start:5.1f}{wrong}", flush=True)
    print(f"{named} of {len(chosen)} named")
    return 0 if named == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
