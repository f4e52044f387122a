"""Equality to the bit with PyTorch's bfloat16, layer by layer, where the language model rounds as the release does."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.qwen2 import to_params
from virst_jax.config import Compute, LoraConfig, QwenConfig
from virst_jax.errors import UserError
from virst_jax.models.qwen2 import Qwen2

pytestmark = pytest.mark.torch

CFG = QwenConfig(
    vocab_size=200,
    hidden_size=256,
    intermediate_size=512,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    lora=LoraConfig(rank=0),
)
LENGTH = 40


@pytest.fixture(scope="module")
def network() -> tuple[Any, list[np.ndarray], np.ndarray]:
    """transformers' model in bfloat16 with its weights as ours, what enters and leaves its layers, and its logits."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        vocab_size=CFG.vocab_size,
        hidden_size=CFG.hidden_size,
        intermediate_size=CFG.intermediate_size,
        num_hidden_layers=CFG.num_layers,
        num_attention_heads=CFG.num_heads,
        num_key_value_heads=CFG.num_kv_heads,
        rope_parameters={"rope_type": "default", "rope_theta": CFG.rope_theta},
        rms_norm_eps=CFG.rms_norm_eps,
        attn_implementation="eager",
    )
    model = transformers.Qwen2ForCausalLM(config).eval()
    rng = np.random.RandomState(0)
    for name, value in model.state_dict().items():
        scale = 0.1 if name.endswith("bias") else value.shape[-1] ** -0.5
        drawn = rng.standard_normal(value.shape) * scale + (value.ndim == 1 and "norm" in name)
        value.copy_(torch.from_numpy(drawn))
    frequencies = model.model.rotary_emb.inv_freq.clone()
    model = model.to(torch.bfloat16)
    model.model.rotary_emb.inv_freq = frequencies  # the release makes its tables before its network is rounded
    state = {name: np.asarray(value.float().numpy()) for name, value in model.state_dict().items()}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), to_params(state))
    embeds = torch.from_numpy(rng.standard_normal((1, LENGTH, CFG.hidden_size)).astype(np.float32)).bfloat16()
    with torch.inference_mode():
        out = model(inputs_embeds=embeds, output_hidden_states=True)
    states = [state.float().numpy() for state in out.hidden_states]
    return params, states, out.logits.float().numpy()


def run(params: Any, rounding: str, states: list[np.ndarray]) -> tuple[list[float], np.ndarray]:
    """The share of equal values behind each layer, given what the release has before it, and of the logits."""
    one = QwenConfig(**{**vars(CFG), "num_layers": 1})
    compute = Compute(dtype="bfloat16", param_dtype="bfloat16", attention="plain", rounding=rounding)
    model, mask = Qwen2(one, compute), jnp.ones((1, LENGTH), bool)
    shares = []
    for layer in range(CFG.num_layers - 1):
        mine = {**params, "layers": jax.tree.map(lambda x, i=layer: x[i : i + 1], params["layers"])}
        before = jnp.asarray(states[layer], jnp.bfloat16)

        def leave(params: Any, x: jax.Array) -> Any:
            # what leaves the layer is what would enter the next one
            twice = Qwen2(QwenConfig(**{**vars(CFG), "num_layers": 2}), compute)
            stacked = {**params, "layers": jax.tree.map(lambda y: jnp.concatenate([y, y]), params["layers"])}
            return twice.apply({"params": stacked}, x, mask, return_layers=True)[1][1]

        found = jax.jit(leave)(mine, before)
        shares.append(float(np.mean(np.asarray(found, np.float32) == states[layer + 1])))
    hidden = jnp.asarray(states[-1], jnp.bfloat16)
    logits = jax.jit(lambda p, x: model.apply({"params": p}, x, method=Qwen2.logits))(params, hidden)
    return shares, np.asarray(logits, np.float32)


def test_rounding_as_the_release(network: Any) -> None:
    """Every cast is the release's; products may add up in another order."""
    params, states, logits = network
    shares, ours = run(params, "release", states)
    late, ours_late = run(params, "late", states)
    print("equal values behind a layer", shares, "rounded late", late)
    print("equal logits", np.mean(ours == logits), "rounded late", np.mean(ours_late == logits))
    assert min(shares) > 0.97
    assert max(late) < 0.9
    assert np.mean(ours == logits) > 0.99
    assert np.mean(ours_late == logits) < 0.1


def test_unknown_rounding() -> None:
    with pytest.raises(UserError, match="choose late or release"):
        Compute(rounding="early")
