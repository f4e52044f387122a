"""Checkpoints: on another number of processes, scored later, and what is said of those that do not fit."""

import shutil

import grain
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from helpers.places import PROGRAMS
from helpers.process_cases import Group
from virst_jax.config import tiny
from virst_jax.errors import UserError
from virst_jax.training.checkpoints import TrainCheckpoints
from virst_jax.training.optim import OptimConfig
from virst_jax.training.step import init_state


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)], ids=["1 to 2", "2 to 1"])
def test_another_number_of_processes(tmp_path, before, after):
    for count, what in ((before, "save"), (after, "restore")):
        with Group(tmp_path / what, count, [PROGRAMS / "checkpoint.py", what, tmp_path / "saved", 7], 2) as group:
            assert group.wait(300) == [0] * count, group.output(0)
    assert all("restored 7 2016" in group.output(i) for i in range(after))


def state_of(step, width=8, **optim):
    params = {"llm": {"kernel": jnp.arange(float(width))}}
    return init_state(tiny(), OptimConfig(**optim), ((".*", 1.0),), params).replace(step=jnp.int32(step))


def test_the_best_is_kept_though_it_is_scored_later(tmp_path):
    saved = TrainCheckpoints(tmp_path, keep=1)
    for step, score in ((1, 0.1), (2, 0.9), (3, 0.2), (4, None)):
        saved.save(state_of(step))
        assert saved.score(step) is None
        if score is not None:
            saved.add_score(step, score)
    saved.close()
    again = TrainCheckpoints(tmp_path, keep=1)
    assert again.manager.all_steps() == [2, 4]
    assert again.score(2) == 0.9
    assert int(again.restore(4, state_of(0), {}).step) == 4


def test_a_checkpoint_of_another_recipe(tmp_path):
    saved = TrainCheckpoints(tmp_path)
    saved.save(state_of(3), wait=True)
    for other, words in (
        (state_of(0, width=16), r"of another recipe \(.*kernel \[8\] in it, \[16\] now\)"),
        (state_of(0, ema=0.5), r"of another recipe \(ema/llm/kernel is not in it\)"),
    ):
        with pytest.raises(UserError, match=words) as error:
            saved.restore(3, other, {})
        assert "remove" not in str(error.value)


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
