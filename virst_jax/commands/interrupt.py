"""Ctrl-C that is not lost: code of libraries may swallow the exception that it raises."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

_asked = threading.Event()


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt and is remembered for `check`."""
    _asked.clear()

    def catch(number: int, frame: Any) -> None:
        _asked.set()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, catch)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def check() -> None:
    """Raises KeyboardInterrupt if Ctrl-C was pressed; to be called in loops."""
    if _asked.is_set():
        raise KeyboardInterrupt
