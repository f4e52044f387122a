"""What a dry run does beside training; tests/test_train.py runs one."""

from pathlib import Path

import pytest

from helpers.train_cases import recipe as small_recipe
from virst_jax.api import EMBEDDED
from virst_jax.config import override, tiny
from virst_jax.data.prompts import load_tokenizer
from virst_jax.errors import UserError
from virst_jax.io.model_folder import TOKENIZER
from virst_jax.training import dry_run, recipe
from virst_jax.training.streams import choose_stream
from virst_jax.training.time_use import TimeUse


def two_kinds():
    config = small_recipe()
    config.stage.data.rare = {**config.stage.data.shapes.to_dict(), "weight": 0.001}
    config.stage.data.never = {**config.stage.data.shapes.to_dict(), "weight": 0.0}
    return config


def checked(config):
    cfg = override(tiny(), config.model.overrides.to_dict())
    tokenizer = load_tokenizer(Path(EMBEDDED["tiny"]) / TOKENIZER, cfg.seg_token_id)
    said = []
    dry_run.check_data(recipe.stages(config), config, cfg, tokenizer, said.append)
    return said


def test_every_kind_of_batch_has_its_turn():
    (stage,) = recipe.stages(two_kinds())
    brief = dry_run.shortened(stage, 3)
    assert [choose_stream(brief, 0, step) for step in range(brief.steps)] == ["rare", "shapes"] * 3
    assert brief.optim == stage.optim  # the learning rate is part of the compiled step


def test_the_recipe_in_short():
    config = two_kinds()
    config.eval.videos, config.profile.steps = 8, 3
    short = dry_run.in_short(config)
    assert (short.eval.videos, short.eval.every, short.checkpoint.every) == (1, 0, 0)
    assert "profile" not in short
    assert (config.eval.videos, config.profile.steps, config.checkpoint.every) == (8, 3, 2)


def test_all_data_sets_that_cannot_be_read_are_named():
    config = two_kinds()
    (line,) = checked(config)  # two kinds of batch make the same examples of it
    filled = "of which one fills 22% of its 160 text positions (its longest conversation 22 of 80)"
    assert line.startswith(f"stage, rare, synthetic: 50 samples, {filled}, read in ")
    with config.unlocked():
        config.stage.data.rare.sources = {"mevis": {"root": "nowhere"}, "revos": {"root": "elsewhere", "weight": 2.0}}
    with pytest.raises(UserError, match=r"^2 data sets cannot be read: stage, rare, mevis: .*stage, rare, revos: "):
        checked(config)
    with config.unlocked():
        del config.stage.data.rare.sources["revos"]
    with pytest.raises(UserError, match=r"^stage, rare, mevis: nowhere"):
        checked(config)


def test_how_much_text_there_is_to_pack():
    config = two_kinds()
    for data in (config.stage.data.shapes, config.stage.data.rare):
        data.packed_length = 100
    (line,) = checked(config)
    assert "fills 36% of its 100 text positions (its longest conversation 22 of 80)" in line


def test_hours_follow_from_the_weights():
    (stage,) = recipe.stages(two_kinds())
    seconds = {"shapes": [60, 30, 2, 3], "rare": [70, 30, 1001, 1000]}
    rows = []
    for turn in range(4):
        for name, values in seconds.items():
            rows.append({"step": str(len(rows) + 1), f"{name}/seconds": str(values[turn]), f"{name}/loss": "1"})
    report = dry_run.StageReport(stage, TimeUse(), TimeUse(), rows)
    assert (report.seconds("shapes"), report.seconds("rare")) == (2, 1000)
    assert report.hours == pytest.approx(6 * (2 + 0.001 * 1000) / 1.001 / 3600)
    assert dry_run.StageReport(stage, TimeUse(), TimeUse(), rows[:4]).hours is None
    told = dict(report.lines())
    assert told["batches: rare"] == "1000.00 s a step, the first one 70 s; losses 1.000, 1.000, 1.000, 1.000"
