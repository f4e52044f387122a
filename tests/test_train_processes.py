"""train.py on two processes of which one is lost. tests/programs/random_stops.py stops several and continues them."""

import csv
import re
import signal
import time

import pytest

from helpers.train_cases import losses
from helpers.train_processes import STOPPED, checkpoints, start_model, training
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


def test_a_stop_in_an_evaluation_is_made_up_for(start, tmp_path):
    """Both processes end between two videos; the checkpoint is there, and its evaluation comes first afterwards."""
    workdir, kind = tmp_path / "run", "image_text,evaluated"
    flags = ("--config.eval.every=2", "--config.eval.videos=4", "--config.eval.source.num_videos=4")
    with training(workdir, start, 2, *flags, kind=kind, steps=2) as group:
        group.until(r"held-out videos: +\d+%.* 1/4", seconds=SECONDS)
        group.processes[1].send_signal(signal.SIGTERM)
        assert group.wait(SECONDS) == [STOPPED, STOPPED], group.outputs()
    assert checkpoints(workdir) == [2]
    assert scores(workdir) == {}
    with training(workdir, start, 2, *flags, kind=kind, steps=2) as group:
        assert group.wait(SECONDS) == [0, 0], group.outputs()
    assert list(scores(workdir)) == [2]
    assert list(losses(workdir))[:2] == [1, 2]


def scores(workdir):
    """J&F by step."""
    with (workdir / "stage" / "metrics.csv").open() as file:
        return {int(row["step"]): row["eval/j_and_f"] for row in csv.DictReader(file) if row.get("eval/j_and_f")}
