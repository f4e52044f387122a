"""Signals that reach a command: whichever thread the system gives them to, the main thread runs their handler."""

import signal
import socket
import threading
import time

import pytest

from virst_jax.commands import interrupt

NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def send_from_thread(number: signal.Signals, over: threading.Event) -> list[str]:
    """Another thread receives a signal. If the event is not set for long, the thread sets it and adds to the list."""
    told = list[str]()

    def receive() -> None:
        signal.pthread_kill(threading.get_ident(), number)
        if not over.wait(30):
            told.append("late")
            over.set()

    threading.Timer(0.2, receive).start()  # the main thread waits by then
    return told


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_of_another_thread_ends_the_wait(number):
    over, late = threading.Event(), list[list[str]]()

    def run() -> None:
        with interrupt.watched():
            late.append(send_from_thread(number, over))
            over.wait()

    given = signal.signal(number, signal.SIG_DFL)  # tests may run under nohup
    try:
        with pytest.raises(KeyboardInterrupt):
            run()
        over.set()
    finally:
        signal.signal(number, given)
    assert late == [[]]


def test_a_signal_of_another_thread_is_counted_once():
    over = threading.Event()
    with interrupt.watched(), interrupt.gently(over.set):
        late = send_from_thread(signal.SIGTERM, over)
        over.wait()
        time.sleep(1.5)  # the main thread has been woken for the last time
        assert (late, interrupt._asked) == ([], [interrupt.Terminated])


def test_nothing_is_left_behind():
    handlers = {number: signal.getsignal(number) for number in [*NUMBERS, signal.SIGURG]}
    threads = threading.active_count()
    with interrupt.watched():
        assert threading.active_count() == threads + 1
        with interrupt.watched():  # a command that calls another
            pass
    assert threading.active_count() == threads
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert signal.set_wakeup_fd(-1) == -1


def test_the_fd_of_an_event_loop_is_left_alone():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        before = signal.set_wakeup_fd(ours.fileno())
        try:
            with interrupt.watched():
                pass
            assert signal.set_wakeup_fd(before) == ours.fileno()
        finally:
            signal.set_wakeup_fd(before)
