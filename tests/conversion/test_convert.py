"""Conversion of checkpoints in the release's exact three-file layout, there and back."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from conversion import convert
from conversion.assemble import assemble, take_apart
from conversion.formats.torch_file import TorchFile, write_torch_file
from conversion.names import canonical
from conversion.rules import LLM_PROJECTIONS, rule_table
from helpers.places import DATA
from helpers.small_checkpoint import Files, assert_equal_trees, peft, small, specs, write_checkpoint
from virst_jax.config import (
    LoraConfig,
    to_json,
    virst_7b,
    weights_of,
)
from virst_jax.io.model_folder import load_model, parameter_shapes
from virst_jax.models.lora import merge_lora
from virst_jax.models.quantized import dequantize_params
from virst_jax.models.tree import flatten


@pytest.fixture
def release(tmp_path: Path) -> Callable[..., Files]:
    return lambda **changes: write_checkpoint(tmp_path, **changes)


@pytest.mark.parametrize("trained_only", [True, False])
@pytest.mark.parametrize("rename", [peft, lambda name: name], ids=["peft", "plain"])
def test_keeps_adapters_and_lays_the_trained_file_over_the_others(release, trained_only, rename):
    files = release(trained_only=trained_only, rename=rename)
    assert files.run("--lora", "keep") == 0
    cfg, params = load_model(files.folder / "out")
    assert cfg == small(4)
    assert_equal_trees(params, files.params)
    assert (files.folder / "out" / "tokenizer" / "merges.txt").exists()
    assert [p.name for p in files.folder.iterdir() if p.name.endswith(".part")] == []


def test_a_start_for_training_has_fresh_fusions(release):
    files = release()
    f = files.folder
    (f / "small.json").write_text(to_json(small()))
    sources = ["--videochat", str(f / "videochat"), "--sam2", str(f / "sam2.pt"), "--out", str(f / "start")]
    assert convert.main([*sources, "--config", str(f / "small.json"), "--dtype", "float32"]) == 0
    cfg, params = load_model(f / "start")
    assert cfg.llm.lora.rank == 0
    ours, theirs = flatten(params), flatten(files.params)
    trained = {rule_table(small(4))[name].path for name in files.trained}
    for path, value in ours.items():
        part = path.split("/")[0]
        if part in convert.FRESH:
            assert np.isfinite(value).all()
            assert not np.array_equal(value, theirs[path])
            assert path.endswith(("bias", "gate")) or np.asarray(value).any(), path
        elif path not in trained:
            np.testing.assert_array_equal(np.asarray(value), np.asarray(theirs[path]), err_msg=path)


def test_base_layer_names_of_newer_peft(release):
    projections = tuple(theirs for theirs, _, _ in LLM_PROJECTIONS)

    def rename(name: str) -> str:
        stem, _, leaf = name.rpartition(".")
        return peft(f"{stem}.base_layer.{leaf}" if stem.endswith(projections) else name)

    files = release(trained_only=False, rename=rename)
    assert files.run("--lora", "keep") == 0
    assert_equal_trees(load_model(files.folder / "out")[1], files.params)


def test_merges_adapters(release):
    files = release()
    assert files.run() == 0
    cfg, params = load_model(files.folder / "out")
    assert cfg.llm.lora.rank == 0
    expected = merge_lora(files.params, 16.0 / 4)
    a, b = flatten(params), flatten(expected)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_allclose(a[path], b[path], rtol=1e-6, atol=1e-5, err_msg=path)


def test_quantizes_what_it_converts(release):
    files = release()
    assert files.run("--quantize", "int8", "--lora", "keep") == 0
    cfg, params = load_model(files.folder / "out")
    assert (cfg.llm.lora.rank, weights_of(cfg)) == (0, {"llm": "int8", "vision": "int8", "hiera": "float"})
    scales = {path: x for path, x in flatten(params).items() if path.endswith("kernel_scale")}
    back, expected = flatten(dequantize_params(cfg, params)), flatten(merge_lora(files.params, 16.0 / 4))
    assert back.keys() == expected.keys()
    for path in back:
        # by half a scale, and what merging rounds
        bound = scales[f"{path}_scale"].max() / 2 if f"{path}_scale" in scales else 0
        assert abs(back[path] - expected[path]).max() <= bound + 1e-5, path
    assert (files.folder / "out" / "tokenizer").is_dir()
    assert not [p.name for p in files.folder.iterdir() if p.name.startswith((".out", "out."))]


def test_casts_all_but_the_prompt_encoder(release):
    files = release(rank=0)
    assert files.run("--dtype", "bfloat16") == 0
    flat = flatten(load_model(files.folder / "out")[1])
    for path, value in flat.items():
        expected = np.float32 if path.startswith("sam2/prompt_encoder/") else ml_dtypes.bfloat16
        assert value.dtype == expected, path
        want = flatten(files.params)[path].astype(expected)
        np.testing.assert_array_equal(np.asarray(value), want, err_msg=path)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("peft_names", [True, False])
def test_back_to_torch_is_exact(release, dtype, peft_names):
    files = release()
    assert files.run("--lora", "keep", "--dtype", np.dtype(dtype).name) == 0
    out = files.folder / "back.pt"
    flags = ["--peft-names"] if peft_names else []
    assert convert.main(["--to-torch", str(files.folder / "out"), "--out", str(out), *flags]) == 0
    source = dict(take_apart(rule_table(small(4)), flatten(load_model(files.folder / "out")[1]).items()))
    with TorchFile(out, root="model_state_dict") as torch_file:
        names = torch_file.names()
        assert set(names) == {peft(n) if peft_names else n for n in source}
        for name in names:
            want = source[canonical(name)]()
            got = torch_file.read(name)
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(got, want, err_msg=name)


@pytest.mark.parametrize("manifest", ["release_state_dict", "release_peft_state_dict"])
def test_every_name_of_the_full_release_is_used(manifest):
    """All 1624 (2016) names fill all parameters of virst_7b with the right shapes; nothing is computed."""
    shapes: dict[str, list[int]] = json.loads((DATA / "manifests" / f"{manifest}.json").read_text())
    rank = 64 if "peft" in manifest else 0
    cfg = virst_7b()
    cfg = dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, lora=LoraConfig(rank)))
    named = {canonical(name): tuple(shape) for name, shape in shapes.items()}
    assert len(named) == len(shapes) == (2016 if rank else 1624)

    def read(name: str) -> np.ndarray:
        shape = named[name]
        if shape[:1] == (152064,):
            shape = (cfg.llm.vocab_size, *shape[1:])
        return np.broadcast_to(np.float32(0), shape)

    wanted = {path: tuple(leaf.shape) for path, leaf in flatten(parameter_shapes(cfg)).items()}
    empty = lambda path, shape, dtype: np.lib.stride_tricks.as_strided(  # noqa: E731
        np.zeros(1, np.float32), shape, (0,) * len(shape)
    )
    tree = assemble(rule_table(cfg), named, read, where="manifest", expected=wanted, allocate=empty)
    assert {path: leaf.shape for path, leaf in flatten(tree).items()} == wanted


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


def _drop(path: Path, root: str, name: str, **extra: np.ndarray) -> None:
    with TorchFile(path, root=root) as file:
        tensors = {n: np.array(file.read(n)) for n in file.names() if n != name}
    path.unlink()
    write_torch_file(path, specs({**tensors, **extra}), root=root)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "sam2.pt").unlink(), "sam2.pt"),
        (lambda f: (f / "virst.pt").write_bytes((f / "virst.pt").read_bytes()[:-4000]), "virst.pt"),
        (lambda f: _truncate(next((f / "videochat").glob("*.safetensors"))), "safetensors"),
        (lambda f: _drop(f / "sam2.pt", "model", "no_mem_embed"), "model.seg_model.no_mem_embed"),
        (lambda f: _drop(f / "virst.pt", "model_state_dict", "", extra=np.zeros(2, np.float32)), "extra"),
        (
            lambda f: _drop(f / "sam2.pt", "model", "no_obj_ptr", no_obj_ptr=np.zeros((1, 31), np.float32)),
            "no_object_pointer",
        ),
        (
            lambda f: _drop(
                f / "virst.pt", "model_state_dict", "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight"
            ),
            "one of their two matrices",
        ),
        (lambda f: (f / "out").mkdir(), "exists already"),
        (lambda f: (f / "videochat" / "merges.txt").unlink(), "no tokenizer"),
    ],
    ids=[
        "missing",
        "truncated pt",
        "truncated safetensors",
        "missing name",
        "unknown name",
        "shape",
        "lora",
        "out",
        "tok",
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(release, capsys, damage, message):
    files = release()
    damage(files.folder)
    existed = (files.folder / "out").exists()
    assert files.run() == 2
    assert message in error_of(capsys)
    assert (files.folder / "out").exists() == existed
    assert [p.name for p in files.folder.iterdir() if p.name.endswith(".part")] == []


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_model_folder_errors(release, capsys, tmp_path):
    files = release(rank=0)
    assert files.run() == 0
    capsys.readouterr()
    assert convert.main(["--to-torch", str(tmp_path / "nothing"), "--out", str(tmp_path / "a.pt")]) == 2
    assert "no model" in error_of(capsys)
    config = files.folder / "out" / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 24', '"intermediate_size": 25'))
    assert convert.main(["--to-torch", str(files.folder / "out"), "--out", str(tmp_path / "a.pt")]) == 2
    assert "do not fit" in error_of(capsys)
    config.write_text(config.read_text().replace("intermediate_size", "intermediate"))
    assert convert.main(["--to-torch", str(files.folder / "out"), "--out", str(tmp_path / "a.pt")]) == 2
    assert "unknown key" in error_of(capsys)
    assert not (tmp_path / "a.pt").exists()


@pytest.mark.torch
def test_torch_loads_what_goes_back(release):
    torch = pytest.importorskip("torch")
    files = release(rank=0)
    assert files.run() == 0
    out = files.folder / "back.pt"
    assert convert.main(["--to-torch", str(files.folder / "out"), "--out", str(out)]) == 0
    state = torch.load(out, weights_only=True)["model_state_dict"]
    wanted = {name: read() for name, read in take_apart(rule_table(small()), flatten(files.params).items())}
    assert state.keys() == wanted.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(value.numpy(), wanted[name], err_msg=name)
