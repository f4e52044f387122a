"""A small language model of random parameters, and the release's names turned to ours."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from virst_jax.config import Compute, LoraConfig, QwenConfig
from virst_jax.models.qwen2 import Qwen2

SMALL = QwenConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    lora=LoraConfig(rank=0),
)


def to_params(state: dict[str, Any]) -> dict[str, Any]:
    """PyTorch names and layouts to ours: matrices are transposed, layers stacked."""
    places = {"self_attn": "attn", "input_layernorm": "input_norm", "post_attention_layernorm": "post_norm"}
    layers: dict[tuple[str, ...], list[Any]] = {}
    params: dict[str, Any] = {
        "embed_tokens": {"embedding": np.asarray(state["model.embed_tokens.weight"])},
        "norm": {"scale": np.asarray(state["model.norm.weight"])},
        "lm_head": {"kernel": np.asarray(state["lm_head.weight"]).T},
    }
    depth = len({name.split(".")[2] for name in state if name.startswith("model.layers.")})
    for i in range(depth):
        for name in (n for n in state if n.startswith(f"model.layers.{i}.")):
            *path, leaf = (places.get(part, part) for part in name.split(".")[3:])
            value = np.asarray(state[name])
            if leaf == "weight":
                leaf = "kernel" if value.ndim == 2 else "scale"
            layers.setdefault((*path, leaf), []).append(value.T)
    params["layers"] = {}
    for place, values in layers.items():
        node = params["layers"]
        for part in place[:-1]:
            node = node.setdefault(part, {})
        node[place[-1]] = np.stack(values)
    return params


def random_params(cfg: QwenConfig, compute: Compute | None = None) -> dict[str, Any]:
    """Every parameter from N(0, 0.2), so that adapters and norms count; norm scales around 1."""
    model = Qwen2(cfg, compute or Compute())
    embeds = jnp.zeros((1, 1, cfg.hidden_size))
    shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), embeds, jnp.ones((1, 1), bool)))["params"]
    rng = np.random.default_rng(3)

    def draw(path: Any, x: Any) -> jax.Array:
        value = 0.2 * rng.standard_normal(x.shape) + (path[-1].key == "scale")
        return jnp.asarray(value, x.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def prompt(cfg: QwenConfig, lengths: tuple[int, ...], size: int) -> tuple[jax.Array, jax.Array]:
    """Embeddings of which the padding is large, so that it is seen when it leaks."""
    embeds = np.random.default_rng(4).standard_normal((len(lengths), size, cfg.hidden_size))
    mask = np.arange(size) < np.array(lengths)[:, None]
    return jnp.asarray(np.where(mask[..., None], embeds, 30.0), jnp.float32), jnp.asarray(mask)


@functools.partial(jax.jit, static_argnums=0)
def run(
    model: Qwen2,
    params: dict[str, Any],
    embeds: jax.Array,
    mask: jax.Array | None,
    positions: jax.Array | None = None,
    dropout: jax.Array | None = None,
) -> Any:
    """Hidden states; with dropout if there is a key for it."""
    rngs = None if dropout is None else {"dropout": dropout}
    return model.apply({"params": params}, embeds, mask, positions, deterministic=dropout is None, rngs=rngs)


def rel_l2(value: Any, reference: Any) -> float:
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))
