"""The whole network: named axes, precision, rematerialisation, and that every size follows from the config."""

import dataclasses
import functools
import math
import zlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from virst_jax.checkpoint import parameter_shapes
from virst_jax.config import (
    Compute,
    HieraConfig,
    LoraConfig,
    QwenConfig,
    Sam2Config,
    VirstConfig,
    VisionConfig,
    get_preset,
    tiny,
    virst_7b,
)
from virst_jax.errors import UserError
from virst_jax.losses import VideoBatch, video_losses
from virst_jax.models.layers import AXES
from virst_jax.models.virst import Virst

SMALL = VirstConfig(
    llm=QwenConfig(30, 16, 24, num_layers=2, num_heads=4, num_kv_heads=2, lora=LoraConfig(rank=2)),
    vision=VisionConfig(hidden_size=8, depth=3, num_heads=2, image_size=64),
    sam2=Sam2Config(
        hiera=HieraConfig(8, 1, (1, 2, 3, 1), global_att_blocks=(4,), window_spec=(8, 4, 4, 2)),
        image_size=128,
        hidden_size=32,
        memory_dim=8,
        memory_layers=2,
        memory_mlp_dim=16,
        decoder_mlp_dim=16,
        iou_head_dim=16,
    ),
    seg_token_id=29,
)


@functools.cache
def random_params(cfg: VirstConfig) -> Any:
    """Kernels of unit gain, so that nothing fades or grows."""

    def draw(path: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
        name, rng = path[-1].key, np.random.default_rng(zlib.crc32(jax.tree_util.keystr(path).encode()))
        x = rng.standard_normal(shape.shape)
        if "kernel" in name or "lora" in name:
            x /= math.sqrt(max(1, np.prod(shape.shape[-2:-1])))
        elif name in ("scale", "gamma"):
            x = 1 + 0.1 * x
        x = 0.3 * x if name == "bias" else x
        # objects are there: an absent one's mask is constant
        x = x + 3 if jax.tree_util.keystr(path).endswith("['object_head']['layer2']['bias']") else x
        return jnp.asarray(x, shape.dtype)

    return jax.tree_util.tree_map_with_path(draw, parameter_shapes(cfg))


def random_batch(cfg: VirstConfig, frames: int = 4, propagate: bool = True) -> VideoBatch:
    rng = np.random.default_rng(0)
    side, image, visual = cfg.vision.image_size, cfg.sam2.image_size, 64
    length = visual + 6
    labels = np.full(length, -100)
    labels[-4:] = [3, cfg.seg_token_id, cfg.seg_token_id, 4]
    index = np.full(length, -1)
    index[1 : 1 + visual] = np.arange(visual)
    y, x = np.mgrid[:image, :image]
    disk = (y - image / 2) ** 2 + (x - image / 3) ** 2 < (image / 4) ** 2
    return VideoBatch(
        clips=jnp.asarray(rng.standard_normal((1, 4, side, side, 3)), jnp.float32),
        token_ids=jnp.asarray(np.where(labels > 0, labels, 1))[None],
        visual_index=jnp.asarray(index)[None],
        labels=jnp.asarray(labels)[None],
        mask=jnp.ones((1, length), bool),
        seg_positions=jnp.asarray([[length - 3, length - 2]]),
        frames=jnp.asarray(rng.standard_normal((frames, image, image, 3)), jnp.float32),
        targets=jnp.asarray(np.broadcast_to(disk, (1, frames, image, image))),
        anchors=jnp.asarray([1, 3]),
        frames_used=jnp.arange(frames) if propagate else jnp.asarray([1, 3]),
    )


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


@functools.cache
def loss_and_gradients(remat: str, dtype: str = "float32") -> Any:
    cfg = dataclasses.replace(SMALL, compute=Compute(dtype=dtype, remat=remat))
    step = jax.jit(jax.value_and_grad(lambda p, b: video_losses(cfg, p, b), has_aux=True))
    with jax.default_matmul_precision("highest"):
        return step(random_params(SMALL), random_batch(SMALL))


@pytest.mark.parametrize("policy", ["full", "dots"])
def test_remat_changes_nothing(policy):
    (plain, _), plain_gradients = loss_and_gradients("none")
    (loss, _), gradients = loss_and_gradients(policy)
    np.testing.assert_allclose(loss, plain, rtol=1e-6)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(plain_gradients))
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(plain_gradients)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6 * scale)


def test_unknown_remat_policy_raises():
    with pytest.raises(ValueError, match="unknown remat policy 'some'"):
        loss_and_gradients("some")


def test_bfloat16_stays_near():
    (plain, parts), _ = loss_and_gradients("none")
    (loss, low), gradients = loss_and_gradients("none", "bfloat16")
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradients))
    np.testing.assert_allclose(low["ce_loss"], parts["ce_loss"], rtol=2e-2)
    np.testing.assert_allclose(loss, plain, rtol=0.1)


def test_every_used_parameter_gets_a_gradient():
    _, gradients = loss_and_gradients("none")
    silent = {
        jax.tree_util.keystr(path)
        for path, g in jax.tree_util.tree_leaves_with_path(gradients)
        if not bool(jnp.any(g != 0))
    }
    # what training does not touch: mask prompts only exist where two anchors share a frame, and only the first of
    # the decoder's masks is trained
    unused = ("initial_fusion", "occ_predictor", "mask_downsample", "no_memory_position", "prompt_encoder", "no_object")
    assert {name for name in silent if not any(part in name for part in (*unused, "hyper_mlps_"))} == set()
    assert not any("hyper_mlps_0" in name for name in silent)
