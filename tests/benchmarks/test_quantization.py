"""Measures of quantization, on networks that are small."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.quantization import language_rows, layer_errors, overlap
from benchmarks.random_network import small_config
from helpers.qwen2 import SMALL as LLM
from virst_jax.config import LoraConfig
from virst_jax.errors import UserError


@pytest.mark.heavy
def test_int8_is_closer_than_int4():
    cfg = small_config()
    cfg = dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, lora=LoraConfig(rank=0)))
    errors = dict(layer_errors(cfg))
    assert list(errors) == ["llm", "vision", *(f"hiera, stage {i}" for i in (1, 2, 3, 4))]
    for int8, int4, _ in errors.values():
        # 8 bits have 16 times as many steps as 4, which groups of input rows make finer
        assert 0 < 4 * int8 < int4 < 0.3


def test_overlap():
    ours, theirs = np.zeros((1, 3, 2, 2), bool), np.zeros((1, 3, 2, 2), bool)
    ours[0, 0], theirs[0, 0, 0] = True, True
    theirs[0, 1] = True
    assert overlap(ours, theirs) == [0.5, 0.0]


@pytest.fixture
def folder(tmp_path):
    """A random Llama with tied embeddings and without biases, and a tokenizer of single letters."""
    rng, width = np.random.default_rng(0), LLM.hidden_size
    keys = LLM.num_kv_heads * LLM.head_dim
    shapes = {"model.embed_tokens.weight": (LLM.vocab_size, width), "model.norm.weight": (width,)}
    for layer in range(LLM.num_layers):
        sizes = {
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (LLM.intermediate_size, width),
            "mlp.up_proj": (LLM.intermediate_size, width),
            "mlp.down_proj": (width, LLM.intermediate_size),
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": size for name, size in sizes.items()}
    draw = lambda shape: rng.standard_normal(shape) / (shape[-1] ** 0.5 if len(shape) > 1 else 1)  # noqa: E731
    save_file({name: draw(shape).astype(np.float32) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    config = {
        "vocab_size": LLM.vocab_size,
        "hidden_size": width,
        "intermediate_size": LLM.intermediate_size,
        "num_hidden_layers": LLM.num_layers,
        "num_attention_heads": LLM.num_heads,
        "num_key_value_heads": LLM.num_kv_heads,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    letters = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz .")}
    tokenizer = {
        "version": "1.0",
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False},
        "model": {"type": "WordLevel", "vocab": letters, "unk_token": "."},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return tmp_path


def test_language(folder):
    with jax.default_matmul_precision("highest"):
        rows = {name: values for name, *values in language_rows(folder, "the dog jumps over the fence. " * 4)}
    assert list(rows) == ["float32", "int8", "int4"]
    assert rows["float32"][1] == 1
    exact, same = rows["float32"][0], {kind: rows[kind][1] for kind in ("int8", "int4")}
    # a network of random parameters guesses: about as many choices as there are tokens
    assert LLM.vocab_size / 3 < exact < LLM.vocab_size * 3
    assert abs(rows["int8"][0] / exact - 1) < 0.02
    assert same["int8"] > 0.9
    assert same["int8"] >= same["int4"] > 0.2


def test_language_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no config\.json of a Llama or Qwen2"):
        list(language_rows(tmp_path, "text"))
