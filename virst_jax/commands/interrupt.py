"""Ctrl-C and SIGTERM that are not lost: code of libraries may swallow the exception that they raise.

Python runs handlers in the main thread alone. The system may give a signal to any thread; a main thread that waits for
a lock does not learn of that one before it has the lock. `watched` wakes it.
"""

import contextlib
import os
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
        with _main_thread_woken():
            yield
    finally:
        for number, old in ours.items():
            signal.signal(number, old)


@contextlib.contextmanager
def _main_thread_woken() -> Iterator[None]:
    """Inside, a signal that another thread has received wakes the main thread, which then runs its handler."""
    before = signal.set_wakeup_fd(-1)
    told_already = before != -1  # an event loop of this thread
    if told_already or not hasattr(signal, "pthread_kill") or signal.getsignal(signal.SIGURG) is None:
        signal.set_wakeup_fd(before)
        yield  # with None, a library needs SIGURG for itself, as those in Go do
        return
    seen, told = os.pipe()
    os.set_blocking(told, False)
    ended = threading.Event()
    thread = threading.Thread(
        target=_wake, args=(seen, threading.get_ident(), ended), daemon=True, name="wake for signals"
    )
    # of no meaning by itself, and ignored by default
    urgent = signal.signal(signal.SIGURG, lambda number, frame: None)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        ended.set()
        with contextlib.suppress(BlockingIOError):  # with a full pipe, the thread has something to read, too
            os.write(told, b"\0")
        thread.join()
        signal.signal(signal.SIGURG, urgent)
        os.close(told)
        os.close(seen)


def _wake(seen: int, main: int, ended: threading.Event) -> None:
    """Sends SIGURG to a thread for every other signal whose number is read from a pipe, until the work has ended."""
    while (number := os.read(seen, 1)) and not ended.is_set():
        if number[0] == signal.SIGURG:
            continue
        for seconds in (0, 0.1, 1):  # more than once: the thread may be about to wait
            if not ended.wait(seconds):
                signal.pthread_kill(main, signal.SIGURG)


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
