"""train.py on two processes of which one is lost. tests/programs/random_stops.py stops several and continues them."""

import re
import signal
import time

import pytest

from helpers.train_processes import checkpoints, start_model, training
from virst_jax.parallel.processes import LOST

pytestmark = pytest.mark.heavy
SECONDS = 600  # the machine may be busy


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return start_model(tmp_path_factory.mktemp("start") / "model")


def test_a_killed_process_ends_the_other_within_a_minute(start, tmp_path):
    workdir = tmp_path / "run"
    with training(workdir, start, 2, steps=10**6) as group:
        group.until(lambda: bool(checkpoints(workdir)), seconds=SECONDS)
        group.processes[1].kill()
        since = time.monotonic()
        assert group.wait(SECONDS) == [LOST, -signal.SIGKILL], group.outputs()
        assert time.monotonic() - since < 60
        assert len(re.findall(r"^process 0 ends: .*run the same command", group.output(0), re.M)) == 1
