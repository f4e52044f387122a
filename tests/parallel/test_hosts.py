"""Hosts that do not fit together are told before the first step."""

import json
import time

import pytest

from helpers.places import PROGRAMS
from helpers.process_cases import Group
from virst_jax.errors import UserError
from virst_jax.parallel import hosts

SLICES = {"MEGASCALE_COORDINATOR_ADDRESS": "a:1", "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}


def told(**changes: object) -> str:
    return json.dumps({**json.loads(hosts.facts("cpu", 1)), **changes})


def test_equal_hosts():
    assert hosts.compare([told(), told(host="other"), told()]) == ("", [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"jax": "0.0.1"}, "process 2 on odd has jax 0.0.1, others have "),
        ({"Python": "3.99"}, "has Python 3.99, others"),
        ({"libtpu": "7"}, "has libtpu 7, others have none"),
        ({"XLA_FLAGS": "--xla_other"}, "has XLA_FLAGS --xla_other, others"),
        ({"devices": 3}, "has devices 3, others have 1"),
    ],
)
def test_the_odd_host_is_named(changes, message):
    error, notes = hosts.compare([told(), told(), told(host="odd", **changes)])
    assert message in error
    assert "\n" not in error
    assert notes == []


def test_flags_in_another_order_agree(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--a --b")
    first = told()
    monkeypatch.setenv("XLA_FLAGS", "--b  --a")
    assert hosts.compare([first, told()]) == ("", [])


def test_notes():
    late = told(host="late", time=time.time() - 500)
    error, (arguments, clock) = hosts.compare([told(), told(arguments="--other"), late])
    assert error == ""
    assert arguments.startswith("process 1 on ")
    assert "the clock of late is 500 s behind" in clock


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MEGASCALE_SLICE_ID": ""}, "MEGASCALE_SLICE_ID is not; unset what an earlier run has left"),
        ({"MEGASCALE_SLICE_ID": "2"}, "MEGASCALE_SLICE_ID=2 is none of MEGASCALE_NUM_SLICES=2 slices"),
        ({"MEGASCALE_NUM_SLICES": "two"}, "is none of"),
    ],
)
def test_variables_of_an_earlier_run(changes, message):
    hosts.check_environment({})
    hosts.check_environment(SLICES)
    with pytest.raises(UserError, match=message):
        hosts.check_environment({**SLICES, **changes})


def test_every_process_of_unequal_ones_ends_with_the_line(tmp_path):
    with Group(tmp_path, 2, [PROGRAMS / "unequal.py"]) as group:
        statuses = group.wait(60)
    assert 0 not in statuses
    for i in range(2):
        assert "process 1 on " in group.output(i)
        assert "has Python 3.0.1, others have 3." in group.output(i)
