"""train.py with its work folder in a bucket, in a store on this machine: killed, continued, and by two processes."""

import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

import train
from helpers.places import PROGRAMS
from helpers.process_cases import Group
from helpers.train_cases import command, losses, recipe
from helpers.train_processes import DEVICES, MESH, STOPPED, largest_difference, start_model
from virst_jax.api import find_model
from virst_jax.io import buckets
from virst_jax.io.model_folder import is_whole, load_model


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run of `recipe`."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train.train(recipe(), folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed_from_a_model(tmp_path_factory):
    """The folders of a model and of a run that starts from it, with larger batches."""
    start, folder = start_model(tmp_path_factory.mktemp("start") / "model"), tmp_path_factory.mktemp("undisturbed")
    config = recipe()
    config.model.init, config.stage.data.shapes.batch_size = str(start), 4
    train.train(config, folder)
    return start, folder


@pytest.mark.heavy
@pytest.mark.parametrize("bucket", ["gs", "s3"], indirect=True)
def test_a_killed_run_goes_on_in_a_bucket(bucket, undisturbed, tmp_path, monkeypatch):
    """It has the curve and the model of a run in a folder."""
    monkeypatch.setattr(buckets, "SILENCE", 6.0)
    workdir = buckets.place(f"{bucket.address}/run")
    saved = workdir / "stage" / "checkpoints"
    # one process with one device, as this one
    with Group(tmp_path / "logs", 1, [*command(Path("WORKDIR"))[1:-1], f"--workdir={workdir}"]) as group:
        group.until(lambda: (saved / "2" / "commit_success.txt").exists(), seconds=600)
        group.until(lambda: (saved / "4").exists(), seconds=600)  # while it is written, or sent
        os.kill(group.processes[0].pid, signal.SIGKILL)
        group.wait(60)
    assert not is_whole(workdir / "stage" / "model")
    train.train(recipe(), workdir)
    assert losses(workdir) == losses(undisturbed)
    assert not (workdir / ".lock").exists()
    assert any(name.startswith("run/stage/tensorboard/") for name in bucket.files())
    assert is_whole(workdir / "stage" / "model")
    _, ours = load_model(find_model(f"{workdir}/stage/model"))
    _, theirs = load_model(undisturbed / "stage" / "model")
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.heavy
@pytest.mark.parametrize("bucket", ["gs", "s3"], indirect=True)
def test_two_processes_train_in_a_bucket(bucket, undisturbed_from_a_model, tmp_path):
    """From a model in the bucket; one is stopped, both end, and both go on. The curve is that of one process."""
    start, undisturbed = undisturbed_from_a_model
    workdir = buckets.place(f"{bucket.address}/run")
    given = [*MESH, f"--config.model.init={bucket.put(start, 'start')}", "--config.stage.data.shapes.batch_size=4"]
    given += ["--config.distributed=True", f"--workdir={workdir}"]
    arguments = [*command(Path("WORKDIR"))[1:-1], *given]
    environment = {"VIRST_CACHE": str(tmp_path / "cache")}
    with Group(tmp_path / "first", 2, arguments, devices=DEVICES // 2, **environment) as group:
        group.until(lambda: (workdir / "stage" / "checkpoints" / "2" / "commit_success.txt").exists(), seconds=600)
        group.processes[1].send_signal(signal.SIGTERM)
        statuses = group.wait(600)
        assert statuses in ([STOPPED] * 2, [0] * 2), group.outputs()  # it may have been done by then
    with Group(tmp_path / "second", 2, arguments, devices=DEVICES // 2, **environment) as group:
        assert group.wait(600) == [0, 0], group.outputs()
    assert largest_difference(workdir, losses(undisturbed)) < 1e-3
    assert is_whole(workdir / "stage" / "model")
    assert not (workdir / ".lock").exists()


@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_processes_that_write_at_different_speeds(bucket, tmp_path):
    """None waits in vain for a sign that another one has removed."""
    with Group(tmp_path, 2, [PROGRAMS / "uploads.py", f"{bucket.address}/checkpoints"]) as group:
        assert group.wait(120) == [0, 0], group.outputs()
    assert "whole" in group.output()
