"""eval.py: as a program without a network, and with a small network on every benchmark."""

import functools
import json
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.dataset_layouts import write_layout
from helpers.evaluation_cases import files_of
from helpers.places import ROOT
from helpers.process_cases import Group

CONFIG = ROOT / "configs" / "eval.py"
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_layout("mevis", root, num_videos=3, seed=0)
    return root


def start(workdir, **settings):
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    command = [sys.executable, str(ROOT / "eval.py"), f"--config={CONFIG}", *flags, f"--workdir={workdir}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(workdir, **settings):
    process = start(workdir, **settings)
    out, errors = process.communicate(timeout=120)
    return process.returncode, out, errors


def test_program_scores_and_reports(data, tmp_path):
    status, out, errors = run(
        tmp_path, dataset="mevis", data_root=data, predictor="truth", png=True, workers=1, progress=False
    )
    assert status == 0, errors
    assert "100.00" in out
    folder = tmp_path / "mevis-valid_u"
    summary = json.loads((folder / "report/summary.json").read_text())
    assert summary["headline"]["value"] == 1
    pngs = list((folder / "Annotations").rglob("*.png"))
    assert len(pngs) == len(list((data / "mevis/valid_u/JPEGImages").rglob("*.jpg"))) * 4
    assert set(np.unique(np.asarray(Image.open(pngs[0])))) <= {0, 255}


def test_interrupted_runs_go_on(data, tmp_path):
    """Killed at some moment, then run again by three processes: the files of a run that nobody disturbed."""
    settings = {"dataset": "mevis", "data_root": data, "predictor": "truth", "progress": False, "worst": 3}
    status, _, errors = run(tmp_path / "a", **settings)
    assert status == 0, errors
    killed = start(tmp_path / "b", **settings)
    until = time.monotonic() + 60
    while not list((tmp_path / "b").rglob("*.json")) and time.monotonic() < until:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    assert not (tmp_path / "b/mevis-valid_u/report").exists()
    processes = [start(tmp_path / "b", **settings, process_index=i, process_count=3) for i in range(3)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert files_of(tmp_path / "b") == files_of(tmp_path / "a")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "mevis"}, "config.data_root is not given"),
        ({"dataset": "nope", "data_root": "."}, "unknown data set 'nope'"),
        ({"dataset": "mevis", "data_root": "nowhere"}, "nowhere: no such folder"),
        ({"nope": 1}, "unknown key 'nope'"),
        ({"worst": "many"}, "config.worst"),
    ],
)
def test_bad_input_takes_one_line(data, tmp_path, settings, message):
    status, out, errors = run(tmp_path, **settings)
    assert status == 2
    assert message in errors
    assert len(errors.strip().splitlines()) == 1
    assert out == ""


def get_config(**settings):
    from configs.eval import get_config

    config = get_config()
    config.update(settings)
    return config


def test_a_failed_video_shows_in_the_status(tmp_path, capsys):
    import eval as program

    write_layout("ref_youtube_vos", tmp_path / "data", num_videos=2, seed=0)
    broken = next((tmp_path / "data").rglob("valid/Annotations/valid000/3/00005.png"))
    broken.write_bytes(broken.read_bytes()[:40])
    config = get_config(
        dataset="ref_youtube_vos", data_root=str(tmp_path / "data"), predictor="empty", progress=False, worst=2
    )
    assert program.run(config, tmp_path / "out") == 1
    shown = capsys.readouterr()
    assert "INCOMPLETE: 1 videos failed" in shown.out
    assert str(broken) in shown.err
    config.predictor = "nonsense"
    with pytest.raises(Exception, match=r"config\.predictor: unknown 'nonsense'"):
        program.run(config, tmp_path / "other")


def test_a_limit_takes_the_first_videos(data, tmp_path):
    import eval as program

    config = get_config(dataset="mevis", data_root=str(data), predictor="empty", progress=False, limit=2)
    assert program.run(config, tmp_path) == 0
    scored = [f.stem for f in (tmp_path / "mevis-valid_u/scores").iterdir()]
    assert sorted(scored) == ["valid_u_00", "valid_u_01"]


def test_data_and_results_in_buckets(data, bucket, tmp_path, capsys, monkeypatch):
    """Two processes that share nothing but the bucket give the files of one; every finished video is sent at once."""
    import eval as program

    config = get_config(dataset="mevis", data_root=str(data), predictor="truth", progress=False, worst=1)
    assert program.run(config, tmp_path) == 0
    expected = files_of(tmp_path / "mevis-valid_u")
    config.data_root = bucket.put(data / "mevis", "rvos/MeViS")[: -len("/MeViS")]
    bucket.put(data / "mevis", "rvos/other")
    truth, before = program.predict_truth, []

    def results():
        start = "runs/mevis-valid_u/"
        return {name.removeprefix(start): x for name, x in bucket.files().items() if name.startswith(start)}

    def predict(video, expressions):
        before.append({name for name in results() if name.startswith("masks/")})
        return truth(video, expressions)

    monkeypatch.setattr(program, "predict_truth", predict)
    config.process_count = 2
    for index in range(2):
        config.process_index = index
        assert program.run(config, Path(f"{bucket.address}/runs")) == 0
    assert f"report: {bucket.address}/runs/mevis-valid_u/report" in capsys.readouterr().out
    assert results() == expected
    assert not before[0]
    assert len(before[1]) > 0
    copied = [file for file in (tmp_path / "cache").rglob("meta_expressions.json") if "valid_u" in str(file)]
    assert len(copied) == 1  # the data set alone, and once


@pytest.mark.heavy
def test_three_processes_of_which_one_has_nothing_to_do(small_model, tmp_path):
    """They find each other by jax.distributed, and each loads the model when it needs it."""
    write_layout("mevis", tmp_path / "data", num_videos=2, seed=0)
    settings = {"model": small_model, "dataset": "mevis", "data_root": tmp_path / "data", "progress": False, "limit": 2}
    flags = [f"--config.{key}={value}" for key, value in {**settings, "distributed": True}.items()]
    program = [ROOT / "eval.py", f"--config={CONFIG}", *flags, f"--workdir={tmp_path / 'out'}"]
    with Group(tmp_path / "logs", 3, program) as group:
        statuses = group.wait(900)
        assert statuses == [0, 0, 0], "\n".join(map(group.output, range(3)))
    (folder,) = (tmp_path / "out").iterdir()
    summary = json.loads((folder / "report/summary.json").read_text())
    assert summary["headline"]["value"] < 0.9
    assert len(list((folder / "scores").iterdir())) == 2


BENCHMARKS = ("mevis", "mevis_v2", "custom", "ref_youtube_vos", "ref_davis17", "revos", "reasonvos", "lvvis")
BENCHMARKS += ("refcoco", "refcoco+", "refcocog", "refclef", "reasonseg")


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    from helpers.network import write_model

    return write_model(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def load_once():
    """Every benchmark uses the same compiled network."""
    from virst_jax import api

    @functools.cache
    def load(path, dtype=None):
        model = real(path, dtype=dtype)
        model.group_size = 1  # any number of expressions in one shape
        return model

    patch, real = pytest.MonkeyPatch(), api.load
    patch.setattr(api, "load", load)
    yield
    patch.undo()


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_network_on_every_benchmark(name, small_model, load_once, tmp_path, capsys):
    import eval as program

    write_layout(name, tmp_path / "data", num_videos=1, seed=1)
    config = get_config(
        model=str(small_model), dataset=name, data_root=str(tmp_path / "data"), progress=False, worst=1, workers=0
    )
    assert program.run(config, tmp_path / "out") == 0
    (folder,) = (tmp_path / "out").iterdir()
    summary = json.loads((folder / "report/summary.json").read_text())
    assert all(0 <= v <= 1 for group in summary["groups"] for v in group["scores"].values())
    assert summary["headline"]["value"] < 0.9
    masks = [json.loads(file.read_text()) for file in (folder / "masks").rglob("*.json")]
    assert all(len(m["counts"]) == len(m["scores"]) for m in masks)
    assert any(np.std(m["scores"]) > 0 for m in masks) or len(masks[0]["scores"]) == 1

    # the same again gives the same, and without the network if all is there
    before = files_of(folder)
    assert program.run(config, tmp_path / "out") == 0
    assert files_of(folder) == before
    config.seed = 1
    with pytest.raises(Exception, match="other settings"):
        program.run(config, tmp_path / "out")


@pytest.mark.parametrize(("predictor", "is_told"), [("model", True), ("truth", False)])
def test_scores_of_the_small_model_are_not_taken_for_more(data, tmp_path, capsys, monkeypatch, predictor, is_told):
    program = runpy.run_path(str(ROOT / "eval.py"))
    monkeypatch.setitem(program["_run"].__globals__, "_evaluate", lambda *_: 0)
    config = get_config(dataset="mevis", data_root=str(data), split="valid_u", predictor=predictor)
    assert program["run"](config, tmp_path) == 0
    assert ('note: the model "tiny" of this package is a demonstration' in capsys.readouterr().err) == is_told
