"""Model folders with integer kernels: made, loaded, described, and refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import virst_jax
from conversion import convert
from conversion.quantize import merged_leaves
from helpers.network import CFG, SMALL, random_params, write_model
from helpers.segmenting import DOG, video
from virst_jax import cli
from virst_jax.config import LoraConfig, quantized, to_json, weights_of
from virst_jax.errors import UserError
from virst_jax.io import digests, model_folder
from virst_jax.models.lora import merge_lora
from virst_jax.models.quantized import dequantize_params, quantize_params, quantized_leaves
from virst_jax.models.tree import flatten
from virst_jax.training import folders


def run(capsys, *words) -> str:
    """The last line that a command prints; of an error, its line."""
    status = cli.main(["convert", *map(str, words)])
    said = capsys.readouterr()
    assert status == (2 if "error: " in said.err else 0)
    return (said.err if status else said.out).strip().splitlines()[-1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "whole")


@pytest.fixture(scope="module")
def folder(whole):
    out = whole.parent / "int8"
    assert (
        convert.main(["--model", str(whole), "--quantize", "int8", "--parts", "llm,vision,hiera", "--out", str(out)])
        == 0
    )
    return out


def test_a_folder_holds_what_quantizing_in_memory_gives(folder):
    cfg, params = model_folder.load_model(folder)
    assert cfg == quantized(CFG, "int8", ["llm", "vision", "hiera"])
    original = model_folder.load_model(folder.parent / "whole")[1]
    jax.tree.map(np.testing.assert_array_equal, params, quantize_params(cfg, original))
    assert sorted(x.name for x in folder.iterdir()) == ["config.json", "digests.json", "params", "tokenizer"]


def test_loaded_in_bfloat16_integers_and_scales_stay(folder):
    _, params = model_folder.load_model(folder, "bfloat16")
    projection = params["llm"]["layers"]["attn"]["q_proj"]
    assert {name: str(x.dtype) for name, x in projection.items()} == {
        "kernel": "int8",
        "kernel_scale": "float32",
        "bias": "bfloat16",
    }


def test_masks_are_those_of_the_dequantized_network(folder):
    model = virst_jax.load(folder)
    ours = model.segment(video(5), [DOG])
    plain = dequantize_params(model.cfg, model.network.params)
    theirs = virst_jax.api.Model(CFG, plain, model.tokenizer).segment(video(5), [DOG])
    # float32 rounds sums apart; a pixel whose logit is next to 0 may turn
    assert (ours.masks != theirs.masks).mean() < 1e-3
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-3)


def test_described(folder, capsys):
    assert cli.main(["info", "--model", str(folder), "--check"]) == 0
    said = capsys.readouterr().out
    assert "llm int8, vision int8, hiera int8" in said
    assert "are as they were saved" in said


def test_refused(folder, whole, tmp_path, capsys):
    out = tmp_path / "out"
    assert "is quantized already (llm int8, vision int8, hiera int8)" in run(
        capsys, "--model", folder, "--quantize", "int4", "--out", out
    )
    assert "has integer kernels; give the model" in run(capsys, "--to-torch", folder, "--out", tmp_path / "back.pt")
    assert "--model takes --quantize" in run(capsys, "--model", whole, "--out", out)
    assert "choose some of llm,vision,hiera" in run(
        capsys, "--model", whole, "--quantize", "int8", "--parts", "head", "--out", out
    )
    with pytest.raises(SystemExit):
        run(capsys, "--model", whole, "--quantize", "int3", "--out", out)
    assert "invalid choice: 'int3'" in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot be trained; start from the model that it was made of"):
        folders.read_config(folder)
    assert not out.exists()


@pytest.mark.parametrize("checked", [True, False])
def test_damaged_scales_are_found_with_digests_and_without(folder, tmp_path, checked):
    cfg, params = model_folder.load_model(folder)
    params = jax.tree.map(np.array, params)
    params["llm"]["lm_head"]["kernel_scale"][3] = np.nan
    model_folder.save_model(tmp_path / "bad", cfg, params, None)
    file = tmp_path / "bad" / digests.FILE
    file.unlink()
    message = "holds what is no positive number"
    if checked:
        file.write_text(
            json.dumps({"tensors": json.loads((folder / digests.FILE).read_text())["tensors"], "files": {}})
        )
        message = "a parameter is not as saved, first llm/lm_head/kernel_scale"
    with pytest.raises(UserError, match=message):
        model_folder.load_model(tmp_path / "bad")


def test_parameters_of_another_kind_are_refused(folder, tmp_path):
    _, params = model_folder.load_model(folder)
    fields = jax.tree.map(np.array, params)
    fields["llm"]["lm_head"]["kernel"] = fields["llm"]["lm_head"]["kernel"].astype(np.float32)
    model_folder.save_model(tmp_path / "mixed", model_folder.read_config(folder), fields, None)
    with pytest.raises(UserError, match=r"is stored as float32, config\.json asks for int8"):
        model_folder.load_model(tmp_path / "mixed")


def test_adapters_are_merged_first():
    params = jax.tree.map(np.asarray, random_params(SMALL))
    lora = dataclasses.replace(SMALL.llm.lora, rank=2)
    cfg = quantized(dataclasses.replace(SMALL, llm=dataclasses.replace(SMALL.llm, lora=LoraConfig(0))), "int4", ["llm"])
    found = dict(quantized_leaves(cfg, merged_leaves(flatten(params).items(), lora)))
    merged = jax.tree.map(np.asarray, merge_lora(params, lora.scale))
    expected = flatten(quantize_params(cfg, merged))
    assert found.keys() == expected.keys()
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert weights_of(cfg) == {"llm": "int4", "vision": "float", "hiera": "float"}
    assert '"weights": "int4"' in to_json(cfg)
    del params["llm"]["layers"]["mlp"]["up_proj"]["lora_b"]
    with pytest.raises(UserError, match="up_proj lacks a part of its adapter"):
        list(merged_leaves(flatten(params).items(), lora))
