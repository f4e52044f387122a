"""What a target of the fuzzer is, and what a case of it may cost."""

import importlib
import pkgutil
import resource
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from virst_jax.errors import UserError

SECONDS = 20.0  # of processor time, for one case
MEGABYTES = 700  # by which the process may grow in one case


@dataclass(frozen=True)
class Target:
    """A function that reads something, and the input that it is given.

    `read` gets a drawn case. It returns whatever it likes, or raises UserError. `cost` is what a case takes, in
    hundredths of a second: dear targets have fewer cases in the tests.
    """

    name: str
    cases: st.SearchStrategy[Any]
    read: Callable[[Any], object]
    cost: int = 1


def find_targets() -> list[Target]:
    """The targets of all files in targets/."""
    package = importlib.import_module(f"{__package__}.targets")
    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    found = [target for module in modules for target in module.TARGETS]
    assert len({target.name for target in found}) == len(found)
    return sorted(found, key=lambda target: target.name)


def run_case(target: Target, case: Any) -> bool:
    """Whether a case was read; False for a UserError.

    Raises:
      AssertionError: it took too long or too much memory, or the error's message is no line that can be printed.
      Exception: whatever else the target raises, which is a fault.
    """
    before, began = peak(), time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.read(case)
        good = True
    except UserError as error:
        good = False
        message = str(error)
        message.encode("utf-8")
        assert message, "an error without a message"
        assert len(message) < 2000, f"a message of {len(message)} characters: {message[:200]}"
        assert "\n" not in message, f"a message of several lines: {message[:200]!r}"
    spent, grown = time.process_time() - began, peak() - before
    assert spent < SECONDS, f"{spent:.1f} s for one case"
    assert grown < MEGABYTES, f"{grown} MB for one case"
    return good


def peak() -> int:
    """The most memory that this process has had, in MB."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size >> (20 if sys.platform == "darwin" else 10)
