import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.losses_cases import CFG, ROWS, SHARED, TAIL, assert_same, make_batch, packed, random_params, with_filler
from virst_jax.ops import cross_entropy
from virst_jax.training import losses
from virst_jax.training.losses import TextBatch, text_loss, video_losses
from virst_jax.training.step import batch_loss

ANCHORS = (0, 2)


@pytest.fixture(scope="module")
def cfg():
    return CFG


@pytest.fixture(scope="module")
def params():
    return random_params()


@pytest.fixture(scope="module")
def compiled(cfg):
    def losses_of(params, batch):
        return jax.value_and_grad(lambda p: video_losses(cfg, p, batch), has_aux=True)(params)

    return jax.jit(losses_of)


@pytest.mark.heavy  # gradients take a minute to compile
def test_computing_the_prefix_once_changes_nothing(cfg, params, compiled):
    """On anchors alone: what is tracked comes behind the prefix."""
    (loss, parts), gradients = compiled(params, make_batch(cfg, 0, used=ANCHORS, slots=2))
    (shared_loss, shared_parts), shared_gradients = compiled(params, make_batch(cfg, SHARED, used=ANCHORS, slots=2))
    assert float(loss) == pytest.approx(float(shared_loss), rel=1e-5)
    assert_same(shared_parts, parts)
    ours, theirs = (jnp.concatenate([x.ravel() for x in jax.tree.leaves(g)]) for g in (shared_gradients, gradients))
    assert float(jnp.linalg.norm(theirs)) > 1e-3
    assert float(jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs)) < 1e-4


def text_of(batch):
    fields = ("clips", "token_ids", "visual_index", "labels", "mask")
    return TextBatch(*(getattr(batch, name) for name in fields), prefix_len=SHARED, places=batch.places)


def assert_near(gradients, expected):
    """All in all, and with respect to each part of the network."""
    for part, tree in expected.items():
        ours, theirs = (jnp.concatenate([x.ravel() for x in jax.tree.leaves(g)]) for g in (gradients[part], tree))
        assert float(jnp.linalg.norm(ours - theirs)) <= 1e-4 * float(jnp.linalg.norm(theirs)), part


def test_packing_changes_nothing_of_texts(cfg, params):
    """Three conversations of different lengths in one row that is longer, and one that fills up."""
    batch = with_filler(make_batch(cfg, SHARED))
    row = packed(batch, ROWS, ROWS * TAIL - 4)
    assert row.token_ids.shape == (1, SHARED + ROWS * TAIL - 4)
    run = jax.jit(jax.value_and_grad(lambda p, b: text_loss(cfg, p, b)[0]))
    (loss, gradients), (expected, others) = (run(params, text_of(x)) for x in (row, batch))
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert_near(gradients, others)
    assert float(jnp.linalg.norm(others["llm"]["layers"]["attn"]["q_proj"]["kernel"])) > 1e-3


@pytest.mark.heavy  # gradients take a minute to compile, for each of two forms
def test_packing_changes_nothing_of_segmentation(params):
    """With the initial fusion, a conversation that fills up and one without [SEG]."""
    cfg = dataclasses.replace(CFG, fusion=dataclasses.replace(CFG.fusion, initial=True))
    batch = with_filler(make_batch(cfg, SHARED, used=ANCHORS, slots=2))
    seg = batch.seg_positions.copy()
    seg[1] = -1
    batch = batch.replace(seg_positions=seg, conversation_valid=np.array([True, False, True, False]))
    row = packed(batch, ROWS, ROWS * TAIL - 4)
    assert (row.seg_positions[[1, 3]] == -1).all()
    run = jax.jit(jax.value_and_grad(lambda p, b: video_losses(cfg, p, b), has_aux=True))
    ((loss, parts), gradients), ((expected, others), plain) = (run(params, x) for x in (row, batch))
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    for name in parts.keys() - {"masks"}:
        assert float(parts[name]) == pytest.approx(float(others[name]), rel=1e-4), name
    np.testing.assert_allclose(parts["masks"][::2][:2], others["masks"][::2][:2], atol=1e-3)
    assert_near(gradients, plain)
    assert float(jnp.linalg.norm(plain["initial_fusion"]["gate"])) > 0


@pytest.mark.heavy  # the tracker takes half a minute to compile
def test_filling_up_changes_nothing(cfg, params):
    compiled = jax.jit(lambda params, batch: video_losses(cfg, params, batch))
    loss, parts = compiled(params, make_batch(cfg, SHARED))
    batch = make_batch(cfg, SHARED, slots=4)
    batch = batch.replace(targets=batch.targets.copy())
    batch.targets[:, :3] = make_batch(cfg, SHARED).targets
    filled, filled_parts = compiled(params, batch)
    for name in ("mask_bce_loss", "mask_dice_loss", "iou_loss", "occ_loss", "mean_iou"):
        assert float(filled_parts[name]) == pytest.approx(float(parts[name]), rel=1e-5), name
    assert float(filled) == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.heavy  # gradients through the tracker take a minute to compile
def test_a_conversation_that_does_not_count(cfg, params, compiled):
    batch = make_batch(cfg, SHARED)
    (_, parts), gradients = compiled(params, batch)
    changed = batch.targets.copy()
    changed[2] = ~changed[2]
    off = np.array([True, True, False])
    (_, one), _ = compiled(params, batch.replace(conversation_valid=off))
    (_, two), _ = compiled(params, batch.replace(conversation_valid=off, targets=changed))
    assert float(one["mask_loss"]) == pytest.approx(float(two["mask_loss"]), rel=1e-6)
    assert float(one["mask_loss"]) != pytest.approx(float(parts["mask_loss"]), rel=1e-6)


def test_cross_entropy_in_pieces(cfg, params, monkeypatch):
    batch = make_batch(cfg, SHARED)
    text = TextBatch(batch.clips, batch.token_ids, batch.visual_index, batch.labels, batch.mask, prefix_len=SHARED)
    whole, _ = jax.jit(lambda p, b: text_loss(cfg, p, b))(params, text)
    monkeypatch.setattr(cross_entropy, "BUDGET", 500)
    pieces, _ = jax.jit(lambda p, b: text_loss(cfg, p, b))(params, text)
    assert float(pieces) == pytest.approx(float(whole), rel=1e-6)
    assert float(whole) > 1


@pytest.mark.heavy  # gradients of two forms of the network take two minutes to compile
def test_a_batch_of_large_frames_one_video_after_another(cfg, params, monkeypatch):
    """The losses and gradients of two videos at once, also where the image encoder is trained."""
    one = make_batch(cfg, SHARED, used=ANCHORS, slots=2)
    other = one.replace(frames=one.frames[::-1], targets=~one.targets)
    batch = jax.tree.map(lambda *x: np.stack(x), one, other)

    def run(side):
        monkeypatch.setattr(losses, "FRAME_BY_FRAME", side)
        given = jax.jit(jax.value_and_grad(lambda p: batch_loss(cfg, p, batch, None, losses.video_parts), has_aux=True))
        return given(params)

    (loss, parts), gradients = run(1)
    (expected, others), plain = run(2**20)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert parts.keys() == others.keys()
    for name, part in others.items():
        assert float(parts[name]) == pytest.approx(float(part), rel=1e-5), name
    for part, tree in plain.items():
        ours, theirs = (jnp.concatenate([x.ravel() for x in jax.tree.leaves(g)]) for g in (gradients[part], tree))
        assert float(jnp.linalg.norm(ours - theirs)) <= 1e-4 * float(jnp.linalg.norm(theirs)), part
    assert float(jnp.linalg.norm(plain["sam2"]["image_encoder"]["trunk"]["patch_embed"]["kernel"])) > 0
