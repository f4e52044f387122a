"""Configs by name and by path, and the settings that change them."""

import argparse
from pathlib import Path

import pytest

from virst_jax.commands import config_file, eval, train
from virst_jax.commands.parser import Parser
from virst_jax.errors import UserError
from virst_jax.io import buckets

ROOT = Path(__file__).parents[2]


def parsed(command, *arguments: str) -> argparse.Namespace:
    parser = Parser()
    command.add_arguments(parser)
    return parser.parse_args(list(arguments))


def test_every_recipe_has_a_name():
    stages = ["stage1", "stage2", "stage3"]
    assert config_file.recipes() == ["clicks", "finetune", *stages, "synthetic"]
    for name in config_file.recipes():
        by_path = config_file.load(str(ROOT / "configs" / f"{name}.py"))
        assert config_file.load(name).to_dict() == by_path.to_dict()
        assert config_file.load(name).stages


def test_a_file_of_ones_own(tmp_path):
    """Copied from configs/ to anywhere, it still finds what recipes share."""
    file = tmp_path / "mine.py"
    file.write_text((ROOT / "configs" / "stage2.py").read_text().replace("30_000", "7"))
    assert config_file.load(str(file)).stage2.steps == 7
    file.write_text(
        "def get_config(kind='x'):\n    import ml_collections\n    return ml_collections.ConfigDict({'k': kind})"
    )
    assert config_file.load(f"{file}:y").k == "y"
    assert config_file.load(str(file), ["--config.k=z"]).k == "z"


def test_settings():
    settings = ["--config.seed=3", "--config.model.init", "tiny", "--config.distributed", "--config.mesh.fsdp=-1"]
    args = parsed(train, "--config=stage1", *settings, "--workdir", "w")
    config = train.config_of(args)
    assert (config.seed, config.model.init, config.distributed, config.mesh.fsdp) == (3, "tiny", True, -1)
    assert args.workdir == Path("w")
    assert config_file.load("synthetic", ["--config.stages=('refine',)"]).stages == ("refine",)
    short = parsed(eval, "--data_root=D", "--model", "m", "--config.dataset=mevis", "--config.png=True")
    config = eval.config_of(short)
    assert (config.data_root, config.model, config.dataset, config.png) == ("D", "m", "mevis", True)


def test_work_folders_may_be_in_buckets():
    assert buckets.address_of(parsed(eval, "--workdir=s3://bucket/runs").workdir) == "s3://bucket/runs"
    for address in ("gs://bucket/runs", "s3://bucket/runs"):
        args = parsed(train, "--config=synthetic", "--workdir", f"{address}/")
        assert buckets.address_of(train.workdir_of(args)) == address


def test_steps_cut_every_stage_short():
    args = parsed(train, "--config=synthetic", "--config.steps=2", "--dry-run", "--config.seed=5")
    assert train.config_of(args).stage1.to_dict() == config_file.load("synthetic").stage1.to_dict()
    assert (args.steps, train.workdir_of(args)) == (2, Path("runs/synthetic"))
    with pytest.raises(UserError, match=r"--config.steps=some: give a whole number"):
        train.config_of(parsed(train, "--config=synthetic", "--config.steps=some"))
    config = train.config_of(parsed(train, "--config=synthetic", "--steps=2"))
    for name in config.stages:
        assert config[name].steps == 2
        assert config[name].optim.warmup_steps <= 2
    whole = parsed(train, "--config=synthetic")
    assert train.workdir_of(whole) == Path("runs/synthetic")
    # what it leaves behind must not pass for the models of a whole run
    assert train.workdir_of(parsed(train, "--config=synthetic", "--steps=2")) != train.workdir_of(whole)


def test_a_large_network_starts_from_a_model():
    with pytest.raises(UserError, match=r"model\.init is missing: virst_7b starts from a model"):
        train.check_start(config_file.load("stage1"))
    for setting in ("init", "tokenizer"):
        train.check_start(config_file.load("stage1", [f"--config.model.{setting}=x"]))
    train.check_start(config_file.load("synthetic"))


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        ("stage7", [], "stage7: no such config; did you mean stage"),
        ("zzz", [], "zzz: no such config: give a Python file, or one of clicks, finetune, stage1,"),
        ("nowhere/synthetik.py", [], "nowhere/synthetik.py: no such config; did you mean synthetic?"),
        ("synthetic", ["--config.sed=1"], "--config.sed: unknown key 'sed' in config; did you mean seed?"),
        ("stage1", ["--config.batch=1"], "--config.batch: unknown key 'batch' in config"),
        ("stage1", ["--config.stage1.optim.b3=1"], "unknown key 'b3' in config.stage1.optim; known are b2, clip_norm"),
        ("stage1", ["--config.seed.x=1"], "config.seed is a value, which has no 'x'"),
        ("stage1", ["--config.seed=x"], "--config.seed=x: invalid literal"),
        ("stage1", ["--config.stage1.groups[99]=1"], "config.stage1.groups has no element '99'"),
        ("common", [], "common: no such config"),
    ],
)
def test_what_does_not_fit(given, settings, message):
    with pytest.raises(UserError) as error:
        config_file.load(given, settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:", "cannot be run (SyntaxError"),
        ("import nothing_like_this", "cannot be run (ModuleNotFoundError"),
        ("from configs_of_mine import x", "cannot be run (ModuleNotFoundError"),
        ("x = 1", "has no function get_config"),
        ("def get_config():\n    return 1 / 0", "get_config fails (ZeroDivisionError"),
    ],
)
def test_broken_files(tmp_path, text, message):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        config_file.load(str(file))
    assert str(error.value).startswith(f"{file}: ")
    assert message in str(error.value)
