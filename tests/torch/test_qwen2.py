from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.qwen2 import prompt, rel_l2, run, to_params
from virst_jax.config import Compute, LoraConfig, QwenConfig
from virst_jax.models.generate import filter_logits, generate
from virst_jax.models.qwen2 import Qwen2

pytestmark = pytest.mark.torch

SMALL = QwenConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    lora=LoraConfig(rank=0),
)


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


def build(cfg: QwenConfig) -> Any:
    """transformers' model with random weights, biases and norm scales, in float32."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        num_key_value_heads=cfg.num_kv_heads,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
        rms_norm_eps=cfg.rms_norm_eps,
        tie_word_embeddings=False,
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model


def params_of(model: Any) -> dict[str, Any]:
    return to_params({name: value.numpy() for name, value in model.state_dict().items()})


def logits_of(cfg: QwenConfig, params: dict[str, Any], embeds: jax.Array, mask: jax.Array) -> np.ndarray:
    model = Qwen2(cfg, Compute())
    hidden = run(model, params, embeds, mask)
    return np.asarray(model.apply({"params": params}, hidden, method=Qwen2.logits))


def test_logits_of_padded_rows() -> None:
    torch = pytest.importorskip("torch")

    reference = build(SMALL)
    embeds, mask = prompt(SMALL, (13, 9, 1), 13)
    with torch.no_grad():
        expected = reference(
            inputs_embeds=torch.from_numpy(np.array(embeds)), attention_mask=torch.from_numpy(np.array(mask)).long()
        ).logits.numpy()
    logits = logits_of(SMALL, params_of(reference), embeds, mask)
    assert rel_l2(logits[np.asarray(mask)], expected[np.asarray(mask)]) <= 1e-5


def test_embeddings_and_greedy_tokens() -> None:
    torch = pytest.importorskip("torch")

    reference, steps, lengths = build(SMALL), 10, (7, 4)
    params, model = params_of(reference), Qwen2(SMALL, Compute())
    ids = np.random.default_rng(0).integers(0, SMALL.vocab_size, (2, 7))
    embeds = model.apply({"params": params}, jnp.asarray(ids), method=Qwen2.embed)
    np.testing.assert_array_equal(embeds, reference.get_input_embeddings().weight.detach().numpy()[ids])
    mask = jnp.arange(7) < jnp.array(lengths)[:, None]
    tokens, _ = generate(model, params, embeds, mask, max_new_tokens=steps, eos_ids=())
    for row, length in enumerate(lengths):
        expected = reference.generate(
            torch.from_numpy(ids[row : row + 1, :length]),
            attention_mask=torch.ones((1, length), dtype=torch.long),
            max_new_tokens=steps,
            do_sample=False,
        )[0, length:]
        np.testing.assert_array_equal(tokens[row], expected.numpy())


@pytest.mark.parametrize(("top_k", "top_p"), [(5, None), (None, 0.6), (7, 0.5), (None, 0.05)])
def test_filters(top_k: int | None, top_p: float | None) -> None:
    torch = pytest.importorskip("torch")
    from transformers import TopKLogitsWarper, TopPLogitsWarper  # needs torch

    logits = np.random.default_rng(0).normal(scale=2.0, size=(6, 40)).astype(np.float32)
    expected = torch.from_numpy(logits.copy())
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None:
        expected = TopPLogitsWarper(top_p)(None, expected)
    np.testing.assert_array_equal(filter_logits(jnp.asarray(logits), top_k, top_p), expected.numpy())


@pytest.mark.heavy
@pytest.mark.full_size
def test_one_layer_at_full_width() -> None:
    torch = pytest.importorskip("torch")

    full = QwenConfig()
    cfg = QwenConfig(vocab_size=64, num_layers=1, lora=LoraConfig(rank=0))
    assert (cfg.hidden_size, cfg.intermediate_size, cfg.head_dim) == (3584, 18944, 128)
    assert (cfg.num_heads, cfg.num_kv_heads) == (full.num_heads, full.num_kv_heads) == (28, 4)
    reference = build(cfg)
    embeds, mask = prompt(cfg, (8, 5), 8)
    with torch.no_grad():
        expected = reference(
            inputs_embeds=torch.from_numpy(np.array(embeds)), attention_mask=torch.from_numpy(np.array(mask)).long()
        ).logits.numpy()
    params = params_of(reference)
    del reference
    logits = logits_of(cfg, params, embeds, mask)
    assert rel_l2(logits[np.asarray(mask)], expected[np.asarray(mask)]) <= 1e-5
