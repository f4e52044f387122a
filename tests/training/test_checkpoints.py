"""Checkpoints: on another number of processes, scored later, and what is said of those that do not fit."""

import shutil
import time

import grain
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from helpers.places import PROGRAMS
from helpers.process_cases import Group
from virst_jax.config import tiny
from virst_jax.errors import UserError
from virst_jax.io import buckets
from virst_jax.training.checkpoints import TrainCheckpoints
from virst_jax.training.optim import OptimConfig
from virst_jax.training.step import init_state


@pytest.fixture(params=["folder", "s3"])
def place(request, make_bucket, tmp_path):
    """Where Orbax writes itself, and where checkpoints are sent to."""
    return tmp_path / "saved" if request.param == "folder" else buckets.place(f"{make_bucket('s3').address}/saved")


@pytest.mark.parametrize(
    ("place", "before", "after"),
    [("folder", 1, 2), ("folder", 2, 1), ("s3", 2, 1)],  # tests/test_train_buckets.py goes on with two in s3
    indirect=["place"],
)
def test_another_number_of_processes(tmp_path, place, before, after):
    for count, what in ((before, "save"), (after, "restore")):
        with Group(tmp_path / what, count, [PROGRAMS / "checkpoint.py", what, place, 7], 2) as group:
            assert group.wait(300) == [0] * count, group.output(0)
    assert all("restored 7 2016" in group.output(i) for i in range(after))


def state_of(step, width=8, **optim):
    params = {"llm": {"kernel": jnp.arange(float(width))}}
    return init_state(tiny(), OptimConfig(**optim), ((".*", 1.0),), params).replace(step=jnp.int32(step))


def test_the_best_is_kept_though_it_is_scored_later(place):
    saved = TrainCheckpoints(place, keep=1)
    for step, score in ((1, 0.1), (2, 0.9), (3, 0.2), (4, None)):
        saved.save(state_of(step))
        assert saved.score(step) is None
        if score is not None:
            saved.add_score(step, score)
    saved.close()
    again = TrainCheckpoints(place, keep=1)
    assert again.manager.all_steps() == [2, 4]
    assert {file.relative_to(place).parts[0] for file in buckets.files_below(place)} == {"2", "4"}
    assert again.score(2) == 0.9
    assert int(again.restore(4, state_of(0), {}).step) == 4


def test_a_checkpoint_of_another_recipe(place):
    saved = TrainCheckpoints(place)
    saved.save(state_of(3), wait=True)
    for other, words in (
        (state_of(0, width=16), r"of another recipe \(.*kernel \[8\] in it, \[16\] now\)"),
        (state_of(0, ema=0.5), r"of another recipe \(ema/llm/kernel is not in it\)"),
    ):
        with pytest.raises(UserError, match=words) as error:
            saved.restore(3, other, {})
        assert "remove" not in str(error.value)


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_an_upload_that_fails(place, tmp_path, monkeypatch):
    """It is one line, and leaves nothing that counts as a checkpoint. What is left goes with the next start."""
    saved = TrainCheckpoints(place)
    saved.save(state_of(1), wait=True)
    put, sent = buckets.put, []

    def refuse(source, target):
        if source.name == "_METADATA":
            while not sent:
                time.sleep(0.01)
            raise PermissionError("Access Denied")
        put(source, target)
        sent.append(target)

    with monkeypatch.context() as patched:
        patched.setattr(buckets, "put", refuse)
        saved.save(state_of(2))
        with pytest.raises(UserError, match=rf"{place}/2: cannot be written \(Access Denied\); check the address, the"):
            saved.wait()
    saved.close()
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    left = {file.relative_to(place).as_posix() for file in buckets.files_below(place)}
    assert "1/commit_success.txt" in left
    assert "2/commit_success.txt" not in left
    assert any(name.startswith("2/") for name in left)

    again = TrainCheckpoints(place)
    assert again.latest_step() == 1
    assert {file.relative_to(place).parts[0] for file in buckets.files_below(place)} == {"1"}
    again.save(state_of(2), wait=True)
    again.close()
    assert TrainCheckpoints(place).latest_step() == 2


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_a_disk_that_cannot_be_written(place, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VIRST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"file/cache/.*: cannot be written") as error:
        TrainCheckpoints(place).save(state_of(1))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_a_checkpoint_of_a_bucket_in_a_folder(place, tmp_path):
    """A run in s3:// goes on in a folder that it is copied to."""
    saved = TrainCheckpoints(place)
    saved.save(state_of(3), score=0.5, wait=True)
    saved.close()
    store, root = buckets.system(place)
    store.get(root, str(tmp_path / "copy"), recursive=True)
    copied = TrainCheckpoints(tmp_path / "copy")
    assert (copied.latest_step(), copied.score(3)) == (3, 0.5)
    restored = copied.restore(3, state_of(0), {})
    assert restored.params["llm"]["kernel"].tolist() == list(range(8))


@pytest.mark.parametrize("earlier", [True, False])
def test_a_damaged_checkpoint(tmp_path, earlier):
    saved = TrainCheckpoints(tmp_path)
    for step in (2, 4) if earlier else (4,):
        saved.save(state_of(step), wait=True)
    shutil.rmtree(tmp_path / "4" / "state" / "d")
    advice = "remove this folder to go on from step 2" if earlier else "remove this folder to begin this stage again"
    with pytest.raises(UserError, match=f"4: .*damaged or missing.*{advice}"):
        saved.restore(4, state_of(0), {})
    if earlier:
        shutil.rmtree(tmp_path / "4")
        restored = TrainCheckpoints(tmp_path).restore(2, state_of(0), {})
        assert int(restored.step) == 2


def test_a_checkpoint_of_an_earlier_version(tmp_path):
    """It holds the state of grain's iterators beside the training state."""
    data = iter(grain.MapDataset.range(9).to_iter_dataset())
    state = state_of(3)
    saved = {"step": state.step, "params": state.params, "opt_state": state.opt_state}
    items = {"state": ocp.args.StandardSave(saved), "shapes": grain.checkpoint.CheckpointSave(data)}
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=ocp.args.Composite(**items))
    assert (tmp_path / "3" / "shapes" / "process_0-of-1.json").is_file()
    assert int(TrainCheckpoints(tmp_path).restore(3, state_of(0), {}).step) == 3
