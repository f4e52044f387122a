"""Ctrl-C and SIGTERM that are not lost: code of libraries may swallow the exception that they raise."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

_asked: list[type[KeyboardInterrupt]] = []
_gentle: list[Callable[[], None]] = []  # called instead of raising, the first time
# a batch system or `kill` ends a process so, and a terminal that is closed
_SIGNALS = [s for s in (signal.SIGINT, getattr(signal, "SIGTERM", None), getattr(signal, "SIGHUP", None)) if s]


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: ends a command as Ctrl-C does, with everything saved that Ctrl-C saves."""

    status = 143  # what a shell gives for SIGTERM

    def __init__(self) -> None:
        super().__init__("terminated; finished parts are kept")


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Inside, the signals raise KeyboardInterrupt and are remembered for `check`."""
    _asked.clear()

    def catch(number: int, frame: object) -> None:
        kind = KeyboardInterrupt if number == signal.SIGINT else Terminated
        _asked.append(kind)
        if _gentle and len(_asked) == 1:
            _gentle[-1]()
            return
        raise kind

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.getsignal(s) for s in _SIGNALS}
    # what nohup has set to be ignored stays so
    ours = {s: old for s, old in before.items() if s == signal.SIGINT or old is not signal.SIG_IGN}
    for number in ours:
        signal.signal(number, catch)
    try:
        yield
    finally:
        for number, old in ours.items():
            signal.signal(number, old)


@contextlib.contextmanager
def gently(stop: Callable[[], None]) -> Iterator[None]:
    """Inside, the first signal calls `stop` and raises nothing, so that what is at work is ended whole.

    A second one raises, and behind the block `check` does.

    Args:
      stop: takes no lock: it runs between any two steps of the main thread.
    """
    _gentle.append(stop)
    try:
        yield
    finally:
        _gentle.pop()


def check() -> None:
    """Raises KeyboardInterrupt if the command was told to end; to be called in loops."""
    if _asked:
        raise _asked[0]
