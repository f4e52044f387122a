"""The pretraining losses, computed again by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.losses_cases import CFG, ROWS, SHARED, assert_same, make_batch, random_params
from virst_jax.config import IGNORE
from virst_jax.models.sam2.sam2 import Sam2
from virst_jax.models.virst import Virst
from virst_jax.pretraining.losses import (
    CellBatch,
    NamedBatch,
    PatchBatch,
    ReadBatch,
    cell_loss,
    named_loss,
    patch_loss,
    read_parts,
)
from virst_jax.training import losses
from virst_jax.training.losses import video_losses


@pytest.fixture(scope="module")
def cfg():
    return CFG


@pytest.fixture(scope="module")
def params():
    return random_params()


def test_patch_loss_by_hand(cfg, params):
    rng = np.random.default_rng(1)
    clips = rng.integers(0, 255, (2, 4, 48, 48, 3), dtype=np.uint8)
    words = rng.integers(0, 60, (2, 36, 3)).astype(np.int32)
    words[0, :, 2] = IGNORE
    words[1, 5] = IGNORE
    weights = rng.random((2, 36)).astype(np.float32)
    weights[1, 5] = 0
    loss, parts = jax.jit(lambda p, b: patch_loss(cfg, p, b))(params, PatchBatch(clips, words, weights))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = ((clips / 255 - mean) / std).astype(np.float32)
    no_merging = dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, tokens_per_frame=9))
    encode = jax.jit(lambda p, x: Virst(no_merging).apply({"params": p}, x, method=Virst.encode_clips))
    tokens = np.asarray(encode(params, pixels))
    table = np.asarray(params["llm"]["embed_tokens"]["embedding"], np.float64)
    norm = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    logits = 24 * norm(np.asarray(tokens, np.float64)) @ norm(table).T
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    total = found = far = 0.0
    for clip, patch in np.ndindex(2, 36):
        said = [w for w in words[clip, patch] if w != IGNORE]
        best = np.sort(logits[clip, patch])[::-1][: len(said)]
        if said:
            ideal = table[said].sum(0) / np.sqrt(len(said))
            apart = np.square(tokens[clip, patch] - ideal).sum() / np.square(ideal).sum()
            far += weights[clip, patch] * np.log(1 + apart)
        for word in said:
            total -= weights[clip, patch] * logits[clip, patch, word] / len(said)
            found += weights[clip, patch] * (logits[clip, patch, word] in best) / len(said)
    assert float(parts["patch_loss"]) == pytest.approx(total / weights.sum(), rel=1e-4)
    assert float(parts["patch_distance"]) == pytest.approx(far / weights.sum(), rel=1e-4)
    assert float(loss) == pytest.approx((total + far) / weights.sum(), rel=1e-4)
    assert float(parts["patch_recall"]) == pytest.approx(found / weights.sum(), abs=1e-5)


def test_cell_loss_by_hand(cfg, params):
    rng = np.random.default_rng(1)
    frames = rng.integers(0, 255, (2, 128, 128, 3), dtype=np.uint8)
    words = rng.integers(0, 60, (2, 64, 2)).astype(np.int32)
    words[0, :, 1] = IGNORE
    weights = rng.random((2, 64)).astype(np.float32)
    loss, parts = jax.jit(lambda p, b: cell_loss(cfg, p, b))(params, CellBatch(frames, words, weights))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = ((frames / 255 - mean) / std).astype(np.float32)
    encode = jax.jit(lambda p, x: Sam2(cfg.sam2, cfg.compute).apply({"params": p}, x, method=Sam2.encode_image))
    features = encode(params["sam2"], pixels)
    norm = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    project = jax.tree.map(lambda x: np.asarray(x, np.float64), params["second_fusion"]["seg_proj"])
    rows = norm(np.asarray(params["llm"]["lm_head"]["kernel"], np.float64).T)
    said = rows * np.sqrt(cfg.llm.hidden_size) @ project["kernel"] + project["bias"]
    logits = 24 * norm(np.asarray(features.top, np.float64).reshape(2, 64, -1)) @ norm(said).T
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    first = np.take_along_axis(logits, np.maximum(words, 0), -1)
    each = np.where(words == IGNORE, 0, first).sum(-1) / (words != IGNORE).sum(-1)
    length = 0.1 * np.square(np.log(np.square(np.asarray(features.top, np.float64)).mean(-1))).mean()
    assert float(parts["cell_loss"]) == pytest.approx(-(weights * each).sum() / weights.sum(), rel=1e-4)
    assert float(parts["cell_length"]) == pytest.approx(length, rel=1e-4)
    assert float(loss) == pytest.approx(float(parts["cell_loss"]) + length, rel=1e-4)
    assert 0 <= float(parts["cell_recall"]) < 1


@pytest.mark.parametrize("frames", [1, pytest.param(4, marks=pytest.mark.heavy)])
def test_named_loss_is_that_of_a_video_with_words_directions_at_seg(cfg, params, monkeypatch, frames):
    order = np.arange(frames, dtype=np.int32)
    video = make_batch(cfg, 0, used=order.tolist(), slots=frames)
    anchors = np.array([0, 2], np.int32) if frames > 1 else order
    video = dataclasses.replace(video, frames=video.frames[:frames], anchors=anchors)
    words = np.array([[7, 9], [IGNORE, 3], [5, IGNORE]], np.int32)
    rows = np.asarray(params["llm"]["lm_head"]["kernel"], np.float64).T
    rows *= np.sqrt(cfg.llm.hidden_size) / np.linalg.norm(rows, axis=-1, keepdims=True)
    positions = np.tile(np.arange(2, dtype=np.int32), (ROWS, 1))
    hidden = np.zeros((ROWS, video.token_ids.shape[1], rows.shape[-1]), np.float32)
    hidden[:, :2] = np.where((words != IGNORE)[..., None], rows[np.maximum(words, 0)], 0)
    monkeypatch.setattr(losses, "hidden_states", lambda *_: (None, jnp.asarray(hidden)))
    of_video = dataclasses.replace(video, seg_positions=positions)
    _, expected = jax.jit(lambda p, b: video_losses(cfg, p, b))(params, of_video)
    batch = NamedBatch(video.frames, words, video.targets, anchors)
    compiled = jax.jit(lambda p, b: named_loss(cfg, p, b))
    loss, parts = compiled(params, batch)
    assert set(parts) == set(expected) - {"ce_loss"}
    for name, value in parts.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-4, err_msg=name)
    assert float(loss) == pytest.approx(float(parts["mask_loss"] + parts["iou_loss"] + parts["occ_loss"]), rel=1e-5)
    others = dataclasses.replace(batch, words=np.full_like(words, IGNORE))
    assert np.abs(np.asarray(compiled(params, others)[1]["masks"]) - np.asarray(parts["masks"])).max() > 1e-3


def test_read_parts_by_hand(cfg, params):
    video = make_batch(cfg, SHARED)
    words = np.random.default_rng(2).integers(0, 60, (32, 4)).astype(np.int32)
    words[3, 2:] = IGNORE
    words[5] = IGNORE
    parts = (video.token_ids, video.visual_index, video.labels, video.mask)

    def loss(params, prefix_len):
        batch = ReadBatch(words, *parts, prefix_len=prefix_len)
        return losses.finish(cfg, params, read_parts(cfg, params, batch))[0]

    table = np.asarray(params["llm"]["embed_tokens"]["embedding"])
    embeds = table[video.token_ids]
    for row, position in np.argwhere(video.visual_index >= 0):
        said = [w for w in words[video.visual_index[row, position]] if w != IGNORE]
        embeds[row, position] = table[said].sum(0) / np.sqrt(max(1, len(said)))

    @jax.jit
    def read(params, embeds):
        hidden = Virst(cfg).apply({"params": params}, embeds, video.mask, method=Virst.hidden)
        return Virst(cfg).apply({"params": params}, hidden, method=Virst.logits)

    logits = np.asarray(read(params, embeds), np.float64)[:, :-1]
    target = np.where(video.labels == cfg.seg_token_id, IGNORE, video.labels)[:, 1:]
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.mean([logits[row, i, target[row, i]] for row, i in np.argwhere(target != IGNORE)])
    gradients = {}
    for prefix_len in (0, SHARED):
        value, gradients[prefix_len] = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, prefix_len)
        assert float(value) == pytest.approx(cfg.loss.ce * expected, rel=1e-4)
    assert_same(gradients[0], gradients[SHARED])
    assert not any(np.any(x) for x in jax.tree.leaves(gradients[0]["vision"]))
