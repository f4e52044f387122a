"""Several processes stop together, and end when one of them is gone."""

import re
import signal
import threading
import time

import pytest

from helpers.places import PROGRAMS
from helpers.process_cases import Group
from virst_jax.parallel import processes


def stopped_at(group):
    return [re.findall(r"^stopped (\d+) (\d+)$", group.output(i), re.M) for i in range(len(group.processes))]


@pytest.mark.parametrize(
    "signals",
    [((0, signal.SIGTERM),), ((1, signal.SIGINT),), ((1, signal.SIGTERM), (0, signal.SIGTERM), (1, signal.SIGTERM))],
    ids=["main", "other", "both at different steps"],
)
def test_all_stop_at_the_same_step(tmp_path, signals):
    # nothing in these steps makes the faster host wait, so it runs ahead
    with Group(tmp_path, 2, [PROGRAMS / "steps.py", 0.01, 0.05]) as group:
        group.until("step 5", 1)
        for index, number in signals:
            group.processes[index].send_signal(number)
            time.sleep(0.03)
        assert group.wait(60) == [0, 0], group.output(0) + group.output(1)
        (first,), (second,) = stopped_at(group)
        assert first == second
        assert int(first[1]) == 2 * (int(first[0]) + 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_one_process_stops_by_any_signal_that_asks_for_it(number):
    given = signal.signal(number, signal.SIG_DFL)  # tests may run under nohup
    try:
        with processes.Stop() as stop:
            assert not stop.at_step()
            signal.raise_signal(number)
            assert stop.at_step()
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, given)


def test_a_hangup_that_nohup_ignores_stops_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with processes.Stop() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.at_step()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_steps_in_a_thread_do_without_signals():
    asked = []

    def steps():
        with processes.Stop() as stop:
            asked.append(stop.at_step())

    thread = threading.Thread(target=steps)
    thread.start()
    thread.join(60)
    assert asked == [False]


def ends(group, index):
    return re.findall(r"^process \d ends: .*", group.output(index), re.M)


def test_a_killed_process_ends_the_others_with_a_line(tmp_path):
    with Group(tmp_path, 3, [PROGRAMS / "steps.py", 0.1, 0.1, 0.1]) as group:
        group.until("step 5", 1)
        group.processes[1].kill()
        statuses = group.wait(60)
        assert statuses == [4, -signal.SIGKILL, 4]
        for i in (0, 2):
            (line,) = ends(group, i)
            assert "run the same command" in line


@pytest.mark.heavy
def test_a_process_that_hangs_ends_them_all(tmp_path):
    """It gives no sign of life and closes no connection, as a host that is cut off."""
    with Group(tmp_path, 2, [PROGRAMS / "steps.py", 0.1, 0.1]) as group:
        group.until("step 5", 1)
        group.processes[1].send_signal(signal.SIGSTOP)
        group.processes[0].wait(60)
        (line,) = ends(group, 0)
        assert re.search("process 1 has not answered for 30 s", line)


def test_an_error_in_one_process_ends_the_others(tmp_path):
    with Group(tmp_path, 2, [PROGRAMS / "steps.py", 0.1, 0.1], FAULT="1") as group:
        statuses = group.wait(60)
        assert statuses[1] == 2
        assert statuses[0] == 4
        assert ends(group, 1) == ["process 1 ends: a fault of this process"]
        assert len(ends(group, 0)) == 1


def test_a_process_that_is_interrupted_alone_ends_the_others(tmp_path):
    """Where no steps are taken that could agree on it, as while a model is loaded."""
    with Group(tmp_path, 2, [PROGRAMS / "steps.py", 0.1, 0.1], FAULT="1", KIND="interrupt") as group:
        assert group.wait(120) == [4, 130], group.outputs()
        assert ends(group, 1) == ["process 1 ends: interrupted; what is finished is kept, the same command goes on"]
        assert len(ends(group, 0)) == 1


def test_the_main_process_is_killed(tmp_path):
    with Group(tmp_path, 2, [PROGRAMS / "steps.py", 0.1, 0.1]) as group:
        group.until("step 5", 1)
        group.processes[0].kill()
        assert 0 not in group.wait(60)
        assert ends(group, 1) or "JAX distributed service detected fatal errors" in group.output(1)


def test_our_line_comes_before_the_trace_of_jax():
    """JAX's signs of life are half of its limit apart, so that much may have passed when a process is killed."""
    assert processes.JAX_SILENCE / 2 > processes.SILENCE + 4 * processes.BEAT
