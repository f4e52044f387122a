import csv
import dataclasses
import math
import os
import shutil
import signal
import subprocess
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import train
import virst_jax
from helpers import compiling
from helpers.network import random_params
from helpers.places import ROOT
from helpers.train_cases import command, losses, recipe
from helpers.train_processes import start_model
from virst_jax import cli
from virst_jax.errors import UserError
from virst_jax.io import lock, model_folder
from virst_jax.io.model_folder import load_model
from virst_jax.training.start import Start
from virst_jax.training.tasks import TASKS


def run(arguments, **kwargs):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, **kwargs)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    config = recipe()
    config.profile.steps = 2
    train.train(config, workdir)
    return workdir


@pytest.fixture(scope="module")
def start(undisturbed):
    """A model to begin with: to draw one takes longer to compile than the steps of a test."""
    return undisturbed / "stage" / "model"


def test_it_learns_and_leaves_a_model(undisturbed):
    found = losses(undisturbed)
    assert list(found) == [1, 2, 3, 4, 5, 6]
    assert float(found[6]) < float(found[1])
    with (undisturbed / "stage" / "metrics.csv").open() as file:
        rates = [float(row["learning_rate/llm_vision_projector"]) for row in csv.DictReader(file)]
    # one step of warm-up, then a cosine from 3e-3 to a tenth of it over the five others
    assert rates[0] == rates[1] == pytest.approx(3e-3)
    assert rates[5] == pytest.approx(3e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi * 4 / 5)) / 2), rel=1e-4)
    model = undisturbed / "stage" / "model"
    cfg, params = load_model(model)
    assert cfg.llm.hidden_size == 32
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
    assert virst_jax.load(model).cfg.name == "tiny"


def test_steps_are_traced_where_asked(undisturbed):
    folder = undisturbed / "stage" / "profile"
    (trace,) = folder.glob("plugins/profile/*/*.xplane.pb")
    assert b"train_step" in trace.read_bytes()
    assert (folder / "memory.prof").stat().st_size


def test_a_stage_says_where_its_time_went(start, tmp_path, capsys):
    config = recipe(steps=2)
    config.model.init = str(start)
    train.train(config, tmp_path)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "(goodput)" in line]
    assert line.startswith("stage: ")
    for kind in ("steps", "compile", "data", "checkpoint", "export", "start"):
        assert f"{kind} " in line
    assert not (tmp_path / "stage" / "profile").exists()


# in six steps patches learn which words are common; the language model, which has layers to go through, is slower
@pytest.mark.parametrize(("kind", "share"), [("image_patches", 0.8), ("image_read", 0.95)])
def test_words_come_before_masks(start, tmp_path, kind, share):
    config = recipe(kind, learning_rate=1e-2, name="muon", ema=0.0)
    config.model.init = str(start)
    config.eval.videos = 1  # of which there can be no evaluation yet
    train.train(config, tmp_path)
    found = losses(tmp_path)
    assert float(found[6]) < share * float(found[1])


def test_conversations_are_packed(start, tmp_path):
    config = recipe(steps=2)
    config.model.init, config.stage.data.shapes.packed_length = str(start), 100
    train.train(config, tmp_path)
    found = losses(tmp_path)
    assert list(found) == [1, 2]
    assert all(0 < float(loss) < 10 for loss in found.values())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda n: n.name)
def test_a_stopped_run_goes_on_as_if_undisturbed(undisturbed, tmp_path, number):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command(tmp_path), cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    saved = tmp_path / "stage" / "checkpoints"
    deadline = time.monotonic() + 300
    # a step after the first checkpoint has begun to be written
    while not (saved.is_dir() and any(saved.iterdir())):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.02)
    process.send_signal(number)
    status = process.wait(120)
    process.stderr.close()
    # it may have been done by then
    assert status in (-9, 130, 0)
    if status == 130:
        assert any(entry.name.isdigit() for entry in saved.iterdir())
    train.train(recipe(), tmp_path)
    assert losses(tmp_path) == losses(undisturbed)
    _, ours = load_model(tmp_path / "stage" / "model")
    _, theirs = load_model(undisturbed / "stage" / "model")
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_finished_run_does_nothing(undisturbed):
    before = (undisturbed / "stage" / "metrics.csv").stat().st_mtime_ns
    train.train(recipe(), undisturbed)
    assert (undisturbed / "stage" / "metrics.csv").stat().st_mtime_ns == before


def test_one_run_at_a_time(tmp_path):
    with lock.exclusive(tmp_path), pytest.raises(UserError, match="another run is at work here"):
        train.train(recipe(), tmp_path)


class FakeModel:
    """Segments nothing, and counts how often a network is set up."""

    made = 0

    def __init__(self, cfg, params, tokenizer, **_):
        FakeModel.made += 1
        self.network = SimpleNamespace(params=params)
        self.seen = []

    def segment(self, video, texts):
        self.seen.append(np.asarray(self.network.params["llm"]["norm"]["scale"]).copy())
        return SimpleNamespace(masks=np.zeros((len(texts), video.num_frames, *video.size), bool))


@pytest.mark.heavy
def test_a_dry_run_does_everything_and_leaves_nothing(start, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "Model", FakeModel)
    monkeypatch.setitem(TASKS, "image_text", dataclasses.replace(TASKS["image_text"], evaluated=True))
    config = recipe(steps=1000)
    config.model.init, config.eval.videos = str(start), 3
    config.stages = ("stage", "later")
    with config.unlocked():
        config.later = config.stage.copy_and_resolve_references()
        config.later.data.rare = {**config.stage.data.shapes.to_dict(), "weight": 0.001}
    (tmp_path / "dry_run").mkdir()
    (tmp_path / "dry_run" / "old").write_text("of a run that was killed")
    restored = []
    monkeypatch.setattr(train.TrainCheckpoints, "restore", keep(train.TrainCheckpoints.restore, restored))
    train.rehearse(config, tmp_path, 2)
    assert not list(tmp_path.iterdir())
    assert len(restored) == 2  # both stages were left off and gone on with
    printed = capsys.readouterr().out
    for words in (
        "stage",
        "later",
        "batches: shapes",
        "batches: rare",
        "checkpoint",
        "held-out video",
        "all 1000 steps",
    ):
        assert words in printed


def test_steps_are_given_nothing_that_is_not_on_the_devices(start, tmp_path, monkeypatch):
    add = jax.jit(lambda x: x + 1)
    monkeypatch.setattr(train, "compile_step", lambda *_: lambda state, batch: add(np.ones(3, np.float32)))
    config = recipe()
    config.model.init = str(start)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train.train(config, tmp_path)


def test_evaluations_share_one_network(tmp_path, monkeypatch):
    """A new one would compile all over again."""
    monkeypatch.setattr(train, "Model", FakeModel)
    monkeypatch.setattr(FakeModel, "made", 0)
    monkeypatch.setitem(TASKS, "image_text", dataclasses.replace(TASKS["image_text"], evaluated=True))
    config = recipe(steps=4)
    config.eval.videos, config.eval.every = 1, 2
    made = []
    monkeypatch.setattr(train.Segmenter, "__init__", keep(train.Segmenter.__init__, made))
    train.train(config, tmp_path)
    assert FakeModel.made == 1
    (segmenter,) = made
    first, second = segmenter.model.seen
    assert (first != second).any()  # with the parameters of the moment


def keep(method, instances):
    def kept(self, *arguments):
        instances.append(self)
        return method(self, *arguments)

    return kept


def test_goes_on_without_making_the_first_state(undisturbed, tmp_path, monkeypatch):
    """Fresh parameters and optimizer state beside restored ones would take the memory twice."""
    shutil.copytree(undisturbed / "stage" / "checkpoints", tmp_path / "stage" / "checkpoints")
    monkeypatch.setattr(Start, "state", lambda _: pytest.fail("the first state was made"))
    train.train(recipe(), tmp_path)
    _, ours = load_model(tmp_path / "stage" / "model")
    _, theirs = load_model(undisturbed / "stage" / "model")
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_the_model_to_start_from_is_not_kept(undisturbed, tmp_path, monkeypatch):
    loaded = []

    def load(*arguments, **options):
        loaded.append(load_model(*arguments, **options))
        return loaded[-1]

    monkeypatch.setattr(model_folder, "load_model", load)
    config = recipe(steps=1)
    config.model.init = str(undisturbed / "stage" / "model")
    train.train(config, tmp_path)
    ((_, params),) = loaded
    assert all(x.is_deleted() for x in jax.tree.leaves(params))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    config = recipe(learning_rate=1e38, clip_norm=0.0)
    config.checkpoint.every = 0
    with pytest.raises(UserError, match="not finite"):
        train.train(config, tmp_path)
    (batch,) = (tmp_path / "stage").glob("nan_batch_*.npz")
    assert "token_ids" in np.load(batch)


def test_another_recipe_does_not_go_on(start, tmp_path):
    config = recipe(steps=4)
    config.model.init = str(start)
    train.train(config, tmp_path)
    (tmp_path / "stage" / "model" / "config.json").unlink()
    (tmp_path / "stage" / "model").rename(tmp_path / "gone")
    config.stage.steps = 6
    config.model.overrides.llm.num_layers = 3
    cfg = model_folder.read_config(start)
    deeper = dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, num_layers=3))
    model_folder.save_model(tmp_path / "deeper", deeper, random_params(deeper), start / "tokenizer")
    config.model.init = str(tmp_path / "deeper")
    with pytest.raises(UserError, match=r"checkpoints/4: this checkpoint is of another recipe \(.*\[3, .* now\)"):
        train.train(config, tmp_path)


def other_source(config):
    del config.stage.data.shapes.sources["synthetic"]
    config.stage.data.shapes.sources.mevis = {"root": "nowhere"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.stage.optim.update(rate=1.0), "rate"),
        (lambda c: c.stage.data.shapes.update(batchsize=2), "batchsize"),
        (lambda c: c.model.update(preset="huge"), "unknown config 'huge'"),
        (lambda c: c.model.update(init="nowhere"), "nowhere"),
        (lambda c: c.mesh.update(data=3, fsdp=2), "mesh data=3 x fsdp=2"),
        (lambda c: other_source(c), "nowhere"),
        (lambda c: c.update(stages=("other",)), "other"),
    ],
)
def test_bad_recipes(tmp_path, change, message):
    config = recipe()
    with config.unlocked():
        change(config)
    with pytest.raises(UserError, match=message):
        train.train(config, tmp_path)


@pytest.mark.heavy
def test_goes_on_with_more_devices_on_another_mesh(tmp_path):
    start = start_model(tmp_path / "start")

    def on(devices, workdir, steps, **mesh):
        flags = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
        flags += [f"--config.stage.steps={steps}", "--config.stage.optim.schedule=constant"]
        flags += ["--config.stage.data.shapes.batch_size=8", f"--config.model.init={start}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        environment["XLA_FLAGS"] = compiling.flags(devices)
        done = subprocess.run(command(workdir, *flags), cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    on(1, tmp_path / "one", 4, data=1)
    on(4, tmp_path / "many", 2, data=2, fsdp=2)
    shutil.rmtree(tmp_path / "many" / "stage" / "model")
    on(8, tmp_path / "many", 4, data=2, fsdp=2, tensor=2)
    one, many = losses(tmp_path / "one"), losses(tmp_path / "many")
    assert list(many) == [1, 2, 3, 4]
    for step, loss in one.items():
        assert float(many[step]) == pytest.approx(float(loss), rel=2e-4), step


def test_bad_flags_are_one_line(tmp_path):
    done = run(command(tmp_path, "--config.sead=3"))
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "sead" in lines[0]
    assert "Traceback" not in done.stderr


def test_steps_are_compiled_without_being_run(capsys):
    config = f"--config={ROOT}/tests/helpers/train_cases.py:image_text"
    assert cli.main(["train", config, "--compile-only"]) == 2
    assert "--topology is missing" in capsys.readouterr().err
    assert cli.main(["train", config, "--compile_only", "--topology=cpu:1"]) == 0
    printed = capsys.readouterr().out
    assert "stage, batches of kind shapes: 2 samples" in printed
    assert "cpu:1: 1 devices" in printed
    for row in ("trained parameters", "optimizer", "temporary", "FLOPs a step"):
        assert row in printed
