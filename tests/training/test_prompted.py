"""Batches that train the tracker from simulated prompts."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.losses_cases import CFG, random_params
from helpers.places import ROOT
from virst_jax.config import TrackerConfig, VirstConfig, tiny
from virst_jax.data.batches import BatchConfig, stack
from virst_jax.data.prompted import BOX, MASK, POINT
from virst_jax.data.prompts import load_tokenizer
from virst_jax.data.synthetic.videos import SyntheticVideos
from virst_jax.errors import UserError
from virst_jax.models.sam2.mask_decoder import Masks
from virst_jax.models.sam2.prompt_encoder import BOX_CORNERS, PADDING
from virst_jax.models.sam2.prompted import ObjectAnchors, ObjectBank, PromptedTracker, PromptTokens
from virst_jax.models.sam2.sam2 import Features, Prediction, Sam2
from virst_jax.models.sam2.tracker import Tracked
from virst_jax.training import prompted
from virst_jax.training.losses import encode_frames
from virst_jax.training.prompted import PromptedBatch, prompted_loss
from virst_jax.training.step import batch_loss
from virst_jax.training.tasks import check_kind, get_task

TOKENIZER = load_tokenizer(ROOT / "virst_jax" / "assets" / "tiny" / "tokenizer", tiny().seg_token_id)
SIDE = CFG.sam2.image_size
KINDS = {
    "video_prompted": BatchConfig(
        kind="video_prompted",
        batch_size=2,
        conversations=5,
        seg_frames=4,
        anchors=2,
        corrections=2,
        central_share=0.5,
        max_stride=4,
    ),
    "image_prompted": BatchConfig(kind="image_prompted", batch_size=2, conversations=5, corrections=1),
}


def examples(kind: str, count: int, batch: BatchConfig | None = None, **settings: Any) -> list[dict[str, np.ndarray]]:
    batch, task = batch or KINDS[kind], get_task(kind)
    maker = task.make_examples(CFG, TOKENIZER, batch)
    source = SyntheticVideos(40, 3, expressions=2, is_image=task.is_image, **settings)
    return [maker(source[i % 40], np.random.default_rng(i)) for i in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_as_announced(kind: str) -> None:
    made, announced = stack(examples(kind, 2)), get_task(kind).shapes(CFG, KINDS[kind], 0)
    assert {k: (v.shape, v.dtype) for k, v in made.items()} == {k: (s, np.dtype(d)) for k, (s, d) in announced.items()}


def test_prompts_are_drawn_as_sam2_draws_them() -> None:
    made = examples("video_prompted", 120)
    kinds = np.concatenate([x["kinds"][x["first_valid"]] for x in made])
    assert 0.35 < (kinds == MASK).mean() < 0.65
    assert 0.35 < (kinds[kinds != MASK] == BOX).mean() < 0.65
    for x in made:
        frames = x["first"][x["first_valid"]]
        assert frames[0] == 0
        assert len(set(frames)) == len(frames)
        corrected = x["corrected"][x["corrected_valid"]]
        assert not set(corrected) & set(frames)
        assert len(corrected) + len(frames) <= 2
        if (x["kinds"] == MASK).any():
            assert (x["kinds"] == MASK).all()  # a video has either
            assert not len(corrected)
        # objects can be seen where they are prompted first
        assert (x["targets"][:, 0].any((1, 2)) == x["object_valid"]).all()
    assert any(x["corrected_valid"].any() for x in made)
    assert {int(x["first_valid"].sum()) for x in made} == {1, 2}
    for x in examples("image_prompted", 10):
        assert (x["kinds"] != MASK).all()


def test_of_absent_objects_nothing_is_there_and_clicks_say_so() -> None:
    batch = dataclasses.replace(KINDS["video_prompted"], absent_share=0.5, click_share=1.0)
    made = examples("video_prompted", 60, batch)
    present = np.concatenate([x["targets"].any((1, 2, 3))[x["object_valid"]] for x in made])
    assert 0.35 < present.mean() < 0.65
    for x in made:  # the others are pointed at as ever
        there = x["targets"].any((1, 2, 3))
        assert (x["targets"][there, 0].any((1, 2))).all()
    # a box around nothing is a negative click
    video = prompted._PromptedVideo.__new__(prompted._PromptedVideo)
    video.batch = PromptedBatch(**{k: jnp.asarray(v) for k, v in made[0].items()})
    target = jnp.zeros((2, SIDE, SIDE), bool).at[1, 3:9, 2:6].set(True)
    coords, labels = video.first_prompt(jax.random.key(0), target, jnp.array(BOX), None)
    assert labels[:, :2].tolist() == [[0, PADDING], list(BOX_CORNERS)]
    assert coords.shape == (2, labels.shape[1], 2)


def test_videos_run_forward_and_backward() -> None:
    """Frames at equal distances; a video that is too short repeats its last one."""
    maker = get_task("video_prompted").make_examples(CFG, TOKENIZER, KINDS["video_prompted"])
    video = SyntheticVideos(1, 3, num_frames=16)[0]
    drawn = [maker.draw_frames(video, np.random.default_rng(i)) for i in range(40)]
    strides = {tuple(np.diff(numbers)) for numbers in drawn}
    assert strides == {(s,) * 3 for s in (-4, -3, -2, -1, 1, 2, 3, 4)}
    short = dataclasses.replace(video, num_frames=2)
    assert {tuple(maker.draw_frames(short, np.random.default_rng(i))) for i in range(9)} == {(0, 1, 1, 1), (1, 1, 1, 0)}


def test_objects_of_a_video_without_a_list_are_those_of_its_expressions() -> None:
    video = dataclasses.replace(SyntheticVideos(4, 3, expressions=2, size=(64, 96))[1], read_objects=None)
    assert video.read_masks is not None
    maker = get_task("video_prompted").make_examples(CFG, TOKENIZER, KINDS["video_prompted"])
    found = maker.read_masks(video, [3, 3, 5])  # type: ignore[attr-defined]
    assert found.shape == (2, 3, SIDE, SIDE)
    assert (found[:, 0] == found[:, 1]).all()
    share = video.read_masks(0, [3]).mean()
    assert found[0, 0].mean() == pytest.approx(share, abs=0.01)
    with pytest.raises(UserError, match="its masks are not public"):
        maker(dataclasses.replace(video, read_masks=None), np.random.default_rng(0))


def test_a_tracker_alone_is_trained_by_prompts() -> None:
    alone = TrackerConfig(sam2=CFG.sam2)
    check_kind(alone, "video_prompted")
    with pytest.raises(UserError, match=r"need a language model.*take video_prompted, image_prompted"):
        check_kind(alone, "video")


# The loss, computed again step by step with what a session uses


class TrainedTracker(PromptedTracker):
    """As in training: memories are made of logits, on prompted frames, too."""

    def encode_memory(self, params: Any, frame: Features, prediction: Prediction, binary: bool) -> Tracked:
        return super().encode_memory(params, frame, prediction, False)


def by_hand(cfg: VirstConfig, params: Any, batch: PromptedBatch) -> dict[str, list[np.ndarray]]:
    """IoU of every object after each prediction that counts: of a video whose first frame has one prompt."""
    sam = Sam2(cfg.sam2, cfg.compute)
    tracker, weights, count = TrainedTracker(sam, "float32"), params["sam2"], batch.frames.shape[0]
    features = encode_frames(sam, params, batch.frames)
    key = jax.random.key(batch.seed)
    clicks, objects = batch.from_truth.shape[1] - 1, batch.targets.shape[0]
    prompt = jax.jit(tracker.prompt)
    propagate = jax.jit(tracker.propagate)

    def frame(t: int) -> Features:
        return jax.tree.map(lambda x: x[t], features)

    def full(found: Tracked) -> jax.Array:
        return sam.high_res(found.prediction.low_res) > 0

    def refined(t: int, key: jax.Array, slot: int, coords: Any, labels: Any, past: Any, start: Any) -> list[Tracked]:
        out = [] if start is None else [start]
        for number in range(0 if start is None else 1, clicks + 1):
            if number:
                seen = full(out[-1]) & ~batch.from_truth[slot, number]
                step_key = jax.random.fold_in(key, number)
                point, label = prompted.next_click(step_key, seen, batch.targets[:, t])
                coords, labels = [*coords, point], [*labels, label]
            tokens = PromptTokens(jnp.stack(coords, 1), jnp.stack(labels, 1), jnp.full(objects, len(labels), jnp.int32))
            last = out[-1].prediction.low_res if out else jnp.zeros((objects, *[cfg.sam2.low_res_size] * 2))
            out.append(prompt(weights, frame(t), tokens, last, jnp.array(bool(out)), past))
        return out

    first_key = jax.random.split(jax.random.fold_in(key, 0), 1)[0]
    target = batch.targets[:, 0]
    if int(batch.kinds[0]) == POINT:
        point, label = prompted.next_click(jax.random.fold_in(first_key, 0), jnp.zeros_like(target), target)
        coords, labels = [point], [label]
    else:
        box = prompted.noisy_box(jax.random.fold_in(first_key, 0), target)
        coords, labels = [box[:, 0], box[:, 1]], [jnp.full(objects, 2), jnp.full(objects, 3)]
    first = refined(0, first_key, 0, coords, labels, None, None)
    found = {0: first}
    frames, kept = [0], [first[-1]]
    bank = ObjectBank.empty(cfg.sam2, objects, jnp.float32, jnp.float32)
    keys = jax.random.split(jax.random.fold_in(key, 1), count)
    bank = bank.after(jnp.array(0), first[-1].memory, first[-1].prediction.pointer)
    for t in range(1, count):
        anchors = ObjectAnchors(
            jnp.broadcast_to(jnp.array(frames, jnp.int32), (objects, len(frames))),
            jnp.ones((objects, len(frames)), bool),
            jnp.stack([x.memory for x in kept], 1),
            jnp.stack([x.prediction.pointer for x in kept], 1),
        )
        numbers = jnp.array(1), jnp.array(count)
        chunk = jax.tree.map(lambda x, t=t: x[t : t + 1], features)
        after, out = propagate(weights, anchors, bank, chunk, jnp.array([t]), jnp.array([True]), *numbers)
        steps = [jax.tree.map(lambda x: x[0], out)]
        if t in np.asarray(batch.corrected)[np.asarray(batch.corrected_valid)]:
            steps = refined(t, keys[t], 1, [], [], (anchors, bank, jnp.array(t), *numbers), steps[0])
            frames, kept = [*frames, t], [*kept, steps[-1]]
            after = bank.after(jnp.array(t), steps[-1].memory, steps[-1].prediction.pointer)
        bank, found[t] = after, steps

    def iou(t: int, out: Tracked) -> np.ndarray:
        mask, truth = np.asarray(full(out)), np.asarray(batch.targets[:, t])
        union = (mask | truth).sum((1, 2))
        return np.where(union > 0, (mask & truth).sum((1, 2)) / np.maximum(union, 1), 1.0)

    every = [iou(t, out) for t, steps in found.items() for out in steps]
    return {
        "mean_iou": every,
        "first_iou": [iou(0, first[0])],
        "corrected_iou": [iou(0, first[-1])],
        "tracked_iou": [iou(t, steps[0]) for t, steps in found.items() if t],
    }


def prompted_batch(kind: int, clicks: int = 2) -> PromptedBatch:
    rng = np.random.default_rng(5)
    y, x = np.mgrid[:SIDE, :SIDE]
    disks = [[(y - 40 - 9 * t) ** 2 + (x - 50 - 20 * o) ** 2 < 500 for t in range(3)] for o in range(2)]
    return PromptedBatch(
        frames=rng.integers(0, 255, (3, SIDE, SIDE, 3), dtype=np.uint8),
        targets=jnp.asarray(disks),
        object_valid=jnp.array([True, True]),
        first=jnp.array([0]),
        first_valid=jnp.array([True]),
        kinds=jnp.array([kind]),
        corrected=jnp.array([1]),
        corrected_valid=jnp.array([True]),
        from_truth=jnp.array([[True, False, True], [True, True, False]])[:, : clicks + 1],
        seed=jnp.array(7),
    )


@pytest.mark.heavy
@pytest.mark.parametrize(("kind", "mode"), [(POINT, "single"), (BOX, "multimask")])
def test_training_computes_what_a_session_computes(kind: int, mode: str) -> None:
    """A first prompt, clicks, tracking, a correction on a tracked frame, tracking from both.

    IoU is a ratio of counts of pixels: where rounding moves one of some 500 pixels over the edge it changes by 2e-3.
    """
    sam2 = dataclasses.replace(CFG.sam2, evaluated_mask=mode, stability_threshold=0.0)  # never falls back
    cfg, params, batch = dataclasses.replace(CFG, sam2=sam2), random_params(), prompted_batch(kind)
    loss, parts = jax.jit(lambda p, b: prompted_loss(cfg, p, b))(params, batch)
    expected = by_hand(cfg, params, batch)
    assert len(expected["mean_iou"]) == 3 + 3 + 1
    assert 0.01 < np.mean(expected["mean_iou"]) < 0.99
    for name, values in expected.items():
        assert float(parts[name]) == pytest.approx(float(np.mean(values)), abs=3e-3), name
    total = sum(float(parts[name]) for name in ("focal_loss", "dice_loss", "iou_loss", "score_loss"))
    assert float(loss) == pytest.approx(total, rel=1e-5)


def test_losses_by_hand() -> None:
    rng = np.random.default_rng(0)
    logits, target = rng.normal(0, 3, (2, 9, 11)), rng.random((2, 9, 11)) > 0.5
    p = 1 / (1 + np.exp(-logits))
    right = np.where(target, p, 1 - p)
    focal = (np.where(target, 0.25, 0.75) * (1 - right) ** 2 * -np.log(right)).mean((1, 2))
    np.testing.assert_allclose(prompted.focal_loss(jnp.asarray(logits), jnp.asarray(target)), focal, rtol=1e-5)
    shared = np.minimum(p, target).sum((1, 2))
    dice = 1 - (2 * shared + 1) / (p.sum((1, 2)) + target.sum((1, 2)) + 1)
    np.testing.assert_allclose(prompted.soft_dice_loss(jnp.asarray(logits), jnp.asarray(target)), dice, rtol=1e-5)


def test_only_the_best_of_three_masks_learns() -> None:
    """Of an ambiguous prompt one of the three, of a clear one the first; the predicted IoU of all that may be taken."""
    rng = np.random.default_rng(1)
    target = jnp.asarray(rng.random((2, SIDE, SIDE)) > 0.5)
    side = CFG.sam2.low_res_size
    masks = Masks(
        jnp.asarray(rng.normal(0, 2, (2, 4, side, side)), jnp.float32),
        jnp.asarray(rng.random((2, 4)), jnp.float32),
        jnp.zeros((2, 4, 8)),
        jnp.ones((2, 1)),
    )
    sam = Sam2(CFG.sam2, CFG.compute)

    def total(logits: jax.Array, ious: jax.Array) -> jax.Array:
        given = dataclasses.replace(masks, logits=logits, ious=ious)
        _, losses = prompted.mask_losses(CFG.prompt_loss, sam, given, target, jnp.array([True, False]))
        return sum(losses[name].sum() for name in ("focal_loss", "dice_loss", "iou_loss"))

    by_logits, by_ious = jax.grad(total, (0, 1))(masks.logits, masks.ious)
    learns = np.abs(np.asarray(by_logits)).sum((2, 3)) > 0
    assert learns[0].sum() == 1
    assert not learns[0, 0]
    assert learns[1].tolist() == [True, False, False, False]
    assert (np.asarray(by_ious) != 0).tolist() == [[False, True, True, True], [True, False, False, False]]


@pytest.mark.heavy
def test_gradients_reach_what_is_used() -> None:
    batch = stack(examples("video_prompted", 2, dataclasses.replace(KINDS["video_prompted"], conversations=2)))
    batch["kinds"][:] = [[POINT, BOX], [BOX, POINT]]
    given = get_task("video_prompted").batch(batch, 0)

    def of(sam: Any) -> jax.Array:
        return batch_loss(CFG, {"sam2": sam}, given, None, prompted_loss)[0]

    sam = random_params()["sam2"]
    gradients = jax.jit(jax.grad(of))(sam)
    sizes = {
        jax.tree_util.keystr(path): float(jnp.abs(x).max())
        for path, x in jax.tree_util.tree_leaves_with_path(gradients)
    }
    assert all(np.isfinite(size) for size in sizes.values())
    for part in ("point_embed", "mask_conv0", "memory_encoder", "memory_attention", "image_encoder", "time_embed"):
        assert max(size for name, size in sizes.items() if part in name) > 0, part
