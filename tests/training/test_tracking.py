"""Metrics to services, with Weights & Biases offline and a stand-in for trackio; time to Google's goodput library."""

import itertools
import sys
import time
import types

import pytest

from virst_jax.errors import UserError
from virst_jax.training.goodput import Goodput, open_goodput
from virst_jax.training.log import TrainLog
from virst_jax.training.time_use import DATA, STEPS, TimeUse
from virst_jax.training.tracking import open_tracker


def write(folder, asked, steps, start=0):
    log = TrainLog(folder, start, open_tracker(asked, folder, {"seed": 3}))
    for step in steps:
        log.write(step, {"loss": step / 8})
    log.close()


def test_weights_and_biases_gets_what_is_logged(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    write(tmp_path / "stage", {"to": "wandb", "project": "p"}, [1, 2])
    (file,) = (tmp_path / "stage" / "wandb").glob("offline-run-*/*.wandb")
    texts = ("loss", "0.125", "0.25", "step", (tmp_path / "stage" / "tracking_id").read_text().strip())
    until = time.monotonic() + 60  # a process of its own writes the file
    while missing := [text for text in texts if text.encode() not in file.read_bytes()]:
        assert time.monotonic() < until, missing
        time.sleep(0.2)


def test_a_stage_that_goes_on_keeps_its_run(tmp_path, monkeypatch):
    begun, told = [], []
    stand_in = types.SimpleNamespace(
        init=lambda **o: begun.append(o),
        log=lambda scalars, step: told.append((step, scalars)),  # a value "step" would be renamed
        finish=lambda: None,
    )
    monkeypatch.setitem(sys.modules, "trackio", stand_in)
    for start in (0, 2):
        write(tmp_path / "runs" / "stage", {"to": "trackio", "project": "p"}, [start + 1, start + 2], start)
    assert begun[0] == begun[1]
    assert begun[0]["name"].startswith("runs-stage-")
    assert (begun[0]["project"], begun[0]["config"], begun[0]["resume"]) == ("p", {"seed": 3}, "allow")
    assert told == [(step, {"loss": step / 8}) for step in (1, 2, 3, 4)]


def test_services_that_cannot_be_had(tmp_path, monkeypatch):
    assert open_tracker({"to": "", "project": "p"}, tmp_path, {}) is None
    with pytest.raises(UserError, match="to=mlflow: unknown; give wandb or trackio"):
        open_tracker({"to": "mlflow"}, tmp_path, {})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"wandb is not installed; pip install 'virst-jax\[tracking\]'"):
        open_tracker({"to": "wandb"}, tmp_path, {})

    def refuse(**_):
        raise RuntimeError("no\nkey")

    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(init=refuse))
    with pytest.raises(UserError, match=r"to=trackio: it does not start \(no key\)"):
        open_tracker({"to": "trackio"}, tmp_path, {})


class Store:
    """In place of Google Cloud Logging."""

    def __init__(self):
        self.entries = []

    def write_cloud_logging_entry(self, entry):
        self.entries.append(entry)

    def read_cloud_logging_entries(self, *_, **__):
        return self.entries, None

    def flush(self):
        pass


def test_goodput_is_what_the_library_computes_of_the_laps(tmp_path):
    library = pytest.importorskip("ml_goodput_measurement").goodput
    store = Store()
    goodput = Goodput("job", store)
    now = [time.perf_counter() - 112]  # the seconds of all laps: the last one ends now
    store.entries[0]["job_start_time"] -= 112
    use = TimeUse(lambda: now[0], listener=goodput)
    for _ in range(2):  # the second stage counts on
        goodput.go_on(0)
        for kind, seconds in [("start", 2.5), *[(DATA, 1), (STEPS, 9)] * 5, ("checkpoint", 2.5), ("export", 1)]:
            now[0] += seconds
            use.lap(kind)
        goodput.before += 5
    goodput.close()
    steps = [entry["step_count"] for entry in store.entries if "step_count" in entry]
    assert steps == list(range(10))
    starts = [entry["step_start_time"] for entry in store.entries if "step_count" in entry]
    assert [round(b - a) for a, b in itertools.pairwise(starts)] == [10] * 4 + [16] + [10] * 4
    calculator = library.GoodputCalculator("job", "goodput_job", store, cache_dir=str(tmp_path))
    share, lost, last = calculator.get_job_goodput(include_badput_breakdown=True)
    assert last == 9
    assert 60 < share < 95  # of 112 s, 90 in steps; the library counts a last step by its own rules
    assert lost[library.BadputType.TRAINING_PREP] > 4  # of two times 2.5


def test_goodput_needs_a_job_and_the_library(monkeypatch):
    assert open_goodput({"job": ""}) is None
    monkeypatch.setitem(sys.modules, "ml_goodput_measurement", None)
    with pytest.raises(UserError, match=r"pip install 'virst-jax\[goodput\]'"):
        open_goodput({"job": "x"})
