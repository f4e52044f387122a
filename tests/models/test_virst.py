"""The whole network: named axes, precision, rematerialisation, and that every size follows from the config."""

import functools
import json
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.compiling import SAME_BITS
from helpers.network import SMALL, random_params
from virst_jax.config import Compute, from_json, get_preset, tiny, to_json, virst_7b
from virst_jax.errors import UserError
from virst_jax.io.model_folder import parameter_shapes
from virst_jax.models.layers import AXES
from virst_jax.models.qwen2 import Qwen2
from virst_jax.models.sam2.hiera import ImageEncoder
from virst_jax.models.sam2.memory import MemoryAttention
from virst_jax.models.umt import VideoEncoder
from virst_jax.models.virst import Virst


@pytest.mark.parametrize("name", ["virst_7b", "tiny"])
def test_every_parameter_names_its_axes(name):
    cfg = get_preset(name)
    boxed = jax.eval_shape(lambda: Virst(cfg).init(jax.random.key(0)))["params"]
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))
    for path, leaf in leaves:
        where = jax.tree_util.keystr(path)
        assert isinstance(leaf, nn.LogicallyPartitioned), where
        assert len(leaf.names) == leaf.value.ndim, where
        assert set(leaf.names) <= AXES, where
        stacked = "layers" in where or (leaf.names and leaf.names[0] == "layers")
        assert not stacked or leaf.names[0] == "layers" or "mask_decoder" in where, where


def test_full_size():
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameter_shapes(virst_7b())))
    assert 8.3e9 < count < 8.4e9  # 8.2 billion of the release, and the adapters


def test_presets():
    assert tiny().sam2.image_size < 512
    with pytest.raises(UserError, match="unknown config 'virst_8b': choose one of tiny, virst_7b"):
        get_preset("virst_8b")


def test_config_files_of_earlier_versions():
    text = to_json(tiny())
    earlier = json.dumps({**json.loads(text), "train_anchors": 3})
    assert from_json(earlier) == from_json(text) == tiny()
    with pytest.raises(UserError, match="unknown key 'train_anchor'"):
        from_json(json.dumps({**json.loads(text), "train_anchor": 3}))


def stacks() -> dict[str, tuple[nn.Module, tuple[Any, ...]]]:
    """Every module with stacked layers, with an input."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    side, positions, width = SMALL.vision.image_size, SMALL.sam2.feature_size**2, SMALL.sam2.hidden_size
    keys = 2 * positions + 4
    return {
        "llm": (Qwen2(SMALL.llm, Compute()), (draw(1, 5, 16), jnp.ones((1, 5), bool))),
        "vision": (VideoEncoder(SMALL.vision, Compute()), (draw(1, 4, side, side, 3),)),
        "image_encoder": (ImageEncoder(SMALL.sam2, Compute()), (draw(1, 64, 64, 3),)),
        "memory_attention": (
            MemoryAttention(SMALL.sam2, Compute()),
            (draw(1, positions, width), draw(positions, width), draw(1, keys, 8), draw(1, keys, 8), None, 4),
        ),
    }


def value_and_gradients(module: nn.Module, params: Any, inputs: tuple[Any, ...]) -> Any:
    def loss(params: Any) -> jax.Array:
        out = module.apply({"params": params}, *inputs)
        return sum((x.astype(jnp.float32) ** 2).mean() for x in jax.tree.leaves(out))

    with jax.default_matmul_precision("highest"):
        return jax.jit(jax.value_and_grad(loss), compiler_options=SAME_BITS)(params)


def params_of(name: str) -> Any:
    params = random_params(SMALL)
    return params[name] if name in params else params["sam2"][name]


@functools.cache
def plain(name: str) -> Any:
    module, inputs = stacks()[name]
    return value_and_gradients(module, params_of(name), inputs)


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("llm", "full"),
        ("llm", "dots"),
        ("llm", "offload"),
        ("vision", "dots"),
        ("image_encoder", "full"),
        ("memory_attention", "full"),
    ],
)
def test_remat_changes_nothing(name, policy):
    module, inputs = stacks()[name]
    loss, gradients = value_and_gradients(module.clone(compute=Compute(remat=policy)), params_of(name), inputs)
    np.testing.assert_allclose(loss, plain(name)[0], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(plain(name)[1])):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * max(1e-6, float(jnp.abs(b).max())))


def test_unknown_remat_policy_raises():
    with pytest.raises(UserError, match="unknown remat 'some': choose one of none, full, dots, offload"):
        Compute(remat="some")


@pytest.mark.parametrize("name", ["llm", "vision", "image_encoder", "memory_attention"])
def test_bfloat16_stays_near(name):
    module, inputs = stacks()[name]
    low = jax.jit(lambda p: module.clone(compute=Compute(dtype="bfloat16")).apply({"params": p}, *inputs))
    high = jax.jit(lambda p: module.apply({"params": p}, *inputs))
    low, high = low(params_of(name)), high(params_of(name))
    for a, b in zip(jax.tree.leaves(low), jax.tree.leaves(high)):
        assert a.dtype == jnp.bfloat16
        error = jnp.linalg.norm((a.astype(jnp.float32) - b).ravel()) / jnp.linalg.norm(b.ravel())
        assert 1e-5 < error < 5e-2


def test_initial_fusion_leaves_conversations_without_seg_alone():
    cfg = SMALL
    params = random_params(cfg)
    rng = np.random.default_rng(0)
    embeds = jnp.asarray(rng.standard_normal((2, 6, cfg.llm.hidden_size)), jnp.float32)
    size = cfg.sam2.feature_size
    maps = jnp.asarray(rng.standard_normal((2, 1, size, size, cfg.sam2.hidden_size)), jnp.float32)
    places = jnp.array([[2, 4], [-1, -1]])
    fused = Virst(cfg).apply({"params": params}, embeds, places, maps, method=Virst.fuse_initially)
    np.testing.assert_array_equal(fused[1], embeds[1])
    changed = (fused[0] != embeds[0]).any(-1)
    assert changed.tolist() == [False, False, True, False, True, False]
