"""A model folder that is damaged in any way is refused in one line; what is sound is read, old folders too."""

import json
import logging
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from virst_jax import cli
from virst_jax.api import EMBEDDED, find_model
from virst_jax.config import HieraConfig, Sam2Config
from virst_jax.errors import UserError
from virst_jax.io import digests, model_folder, tracker_folder

TINY = EMBEDDED["tiny"]


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1 << (at % 8)
    path.write_bytes(data)


def without_files(folder: Path) -> None:
    """Leaves the digests of parameters alone, which large files are checked by."""
    content = json.loads((folder / digests.FILE).read_text())
    (folder / digests.FILE).write_text(json.dumps({**content, "files": {}}))


def test_the_shipped_model_has_digests():
    stated = digests.read(TINY)
    assert stated is not None
    names = {
        "/".join(key.key for key in path)
        for path, _ in jax.tree_util.tree_leaves_with_path(
            model_folder.parameter_shapes(model_folder.read_config(TINY))
        )
    }
    assert set(stated.tensors) == names
    assert model_folder.check_model(TINY) == (len(names), len(stated.files))


@pytest.mark.parametrize("seed", range(6))
def test_one_flipped_bit_is_found(folder, seed, caplog, capsys):
    rng = np.random.default_rng(seed)
    files = sorted((f for f in folder.rglob("*") if f.is_file()), key=lambda f: (f.stat().st_size, f.name))[-5:]
    if seed % 2:
        without_files(folder)
    # values of parameters: the largest files hold little else
    place = files[1 + seed % 4]
    flip(place, int(rng.integers(place.stat().st_size // 4, place.stat().st_size * 3 // 4)))
    for read in (model_folder.load_model, model_folder.check_model):
        with pytest.raises(UserError, match="model") as info:
            read(folder)
        assert "\n" not in str(info.value)
    assert not caplog.records
    assert capsys.readouterr() == ("", "")


def test_every_file_counts(folder):
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match="model") as info:
            model_folder.load_model(folder)
        assert "\n" not in str(info.value)
        file.write_bytes(content)
    model_folder.load_model(folder)


def test_an_old_folder_without_digests_is_read(folder):
    (folder / digests.FILE).unlink()
    assert model_folder.check_model(folder) is None
    _, ours = model_folder.load_model(folder)
    _, theirs = model_folder.load_model(TINY)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    # and damage that Orbax sees is one line there, too
    largest = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:1000])
    logging.getLogger("absl").setLevel(logging.WARNING)
    with pytest.raises(UserError, match="broken parameters") as info:
        model_folder.load_model(folder)
    assert "\n" not in str(info.value)
    assert len(str(info.value)) < 500


def test_another_dtype_is_checked_too(folder):
    without_files(folder)
    _, params = model_folder.load_model(folder, "bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    largest = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    flip(largest, largest.stat().st_size // 2)
    with pytest.raises(UserError, match=r"not as saved, first \w+/"):
        model_folder.load_model(folder, "bfloat16")


def test_the_check_can_be_left_out_aloud(folder, monkeypatch, capsys):
    without_files(folder)
    largest = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    flip(largest, largest.stat().st_size // 2)
    model_folder.load_model(folder, check=False)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv(model_folder.SKIP_CHECK, "1")
    model_folder.load_model(folder)
    assert "are not compared with their digests" in capsys.readouterr().err


def test_digests_are_written_with_a_model(tmp_path):
    cfg, params = model_folder.load_model(TINY)
    model_folder.save_model(tmp_path / "saved", cfg, params, TINY / "tokenizer")
    stated, shipped = digests.read(tmp_path / "saved"), digests.read(TINY)
    assert stated is not None
    assert stated.tensors == shipped.tensors
    assert model_folder.check_model(tmp_path / "saved") == (len(stated.tensors), len(stated.files))


def test_digests_tell_values_dtypes_and_shapes_apart():
    x = np.arange(6, dtype=np.float32)
    others = [x.reshape(2, 3), x.astype(np.float64), x[::-1], x + np.float32([0, 0, 0, 0, 0, 1e-6])]
    assert len({digests.of_tensor(array) for array in (x, *others)}) == 5
    assert digests.of_tensor(x.reshape(2, 3).T) == digests.of_tensor(np.ascontiguousarray(x.reshape(2, 3).T))
    assert digests.of_tensor(jax.numpy.asarray(x)) == digests.of_tensor(x)
    assert digests.of_tensor(np.float32(3)) == digests.of_tensor(jax.numpy.float32(3))


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"tensors": {"a": 1}, "files": {}}', '{"tensors": [], "files": 3}']
)
def test_damaged_digests(folder, content):
    (folder / digests.FILE).write_text(content)
    with pytest.raises(UserError, match=r"digests\.json: damaged"):
        model_folder.load_model(folder)


def test_digests_do_not_lead_out_of_the_folder(folder, tmp_path):
    (tmp_path / "x").write_text("")
    (folder / digests.FILE).write_text(json.dumps({"tensors": {}, "files": {"../x": "0"}}))
    with pytest.raises(UserError, match="not in the folder"):
        model_folder.load_model(folder)


@pytest.fixture(scope="module")
def tracker(tmp_path_factory) -> Path:
    """SAM 2.1 alone, with random parameters."""
    folder = tmp_path_factory.mktemp("tracker")
    cfg = Sam2Config(
        hiera=HieraConfig(
            embed_dim=4, stages=(1, 1, 1, 1), global_att_blocks=(), window_pos_embed_bkg_spatial_size=(2, 2)
        )
    )
    rng = np.random.default_rng(0)
    shapes = tracker_folder.parameter_shapes(cfg)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype), shapes)
    model_folder.write_parameters(folder / model_folder.PARAMS, params)
    tracker_folder.write_description(folder, cfg, params)
    return folder


def test_a_tracker_is_checked_as_a_model_is(tracker, tmp_path, monkeypatch, capsys):
    folder = Path(shutil.copytree(tracker, tmp_path / "tracker"))
    stated = digests.read(folder)
    assert stated is not None
    assert tracker_folder.check_tracker(folder) == (len(stated.tensors), len(stated.files))
    cfg, params = tracker_folder.load_tracker(folder)
    assert {digests.of_tensor(leaf) for leaf in jax.tree.leaves(params)} == set(stated.tensors.values())
    without_files(folder)
    largest = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    flip(largest, largest.stat().st_size // 2)
    for read in (tracker_folder.load_tracker, tracker_folder.check_tracker):
        with pytest.raises(UserError, match="not as saved, first"):
            read(folder)
    tracker_folder.load_tracker(folder, check=False)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv(model_folder.SKIP_CHECK, "1")
    tracker_folder.load_tracker(folder)
    assert "are not compared with their digests" in capsys.readouterr().err


def test_what_an_old_tracker_lacks(tracker, tmp_path):
    folder = Path(shutil.copytree(tracker, tmp_path / "tracker"))
    (folder / digests.FILE).unlink()
    assert tracker_folder.check_tracker(folder) is None
    tracker_folder.load_tracker(folder)


@pytest.mark.parametrize("name", ["config.json", "digests.json", "tokenizer/tokenizer.json", "params/_METADATA"])
def test_a_pipe_in_a_model_is_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=r"is a pipe, a socket or a device|config\.json is missing"):
        model_folder.load_model(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llm", {"num_heads": 0}, "no network can be built by it"),
        ("sam2", {"hiera": {"stages": [1, "2", 3, 1]}}, "must be integers"),
        ("sam2", {"hiera": {"stages": [[1], 2]}}, "must be integers"),
        ("llm", {"num_layers": 10**5000}, "not valid JSON"),
    ],
)
def test_a_config_that_makes_no_network(folder, key, value, message):
    config = json.loads((folder / "config.json").read_text())
    text = json.dumps(config | {key: {**config[key], "mark": 0}}).replace('"mark": 0', _inner(value))
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=message) as info:
        model_folder.load_model(folder)
    assert "config.json" in str(info.value)
    assert "\n" not in str(info.value)


def _inner(value: dict) -> str:
    """The members of an object as JSON, numbers of any length."""
    (name, number), *_ = value.items()
    text = "1" + "0" * 5000 if isinstance(number, int) and number > 10**100 else json.dumps(number)
    return f'"{name}": {text}'


def test_a_tracker_is_no_model_and_can_be_looked_at(tracker, capsys):
    with pytest.raises(UserError, match=r"holds SAM 2\.1 alone, without the language model"):
        find_model(tracker)
    assert cli.main(["info", "--model", str(tracker), "--check", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["holds"] == "SAM 2.1 alone, no language model"
    assert "parameters and" in told["digests"]
    assert "are as they were saved" in told["digests"]
