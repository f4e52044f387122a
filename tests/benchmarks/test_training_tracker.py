"""What the prediction of the tracker's training step takes for granted."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from benchmarks import training_tracker
from virst_jax.config import Compute, Sam2Config, get_preset, virst_7b
from virst_jax.models.sam2 import memory
from virst_jax.models.sam2.sam2 import Features, Sam2
from virst_jax.models.sam2.tracker import Anchors, Tracker
from virst_jax.profiling import flops
from virst_jax.profiling.prediction import KERNELS, MOVES
from virst_jax.profiling.schedule import Spent

FRAMES = 10


def key_masks(cfg: Sam2Config, anchors: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Those that memory attention is given in training, bool[frame, calls, K]."""
    masks: list[np.ndarray] = []

    def attention(*args: Any, **options: Any) -> Any:
        if options["key_mask"] is not None:
            jax.debug.callback(lambda x: masks.append(np.asarray(x)[0]), options["key_mask"], ordered=True)
        return plain(*args, **options)

    plain = memory.attention
    monkeypatch.setattr(memory, "attention", attention)
    sam = Sam2(cfg, Compute())
    made, size, width = Tracker(sam, training=True), cfg.feature_size, cfg.hidden_size
    image = jnp.zeros((cfg.image_size, cfg.image_size, 3))
    params = meta.unbox(jax.eval_shape(lambda: sam.init(jax.random.key(0), image)["params"]))
    sides = (4 * size, width // 8), (2 * size, width // 4), (size, width)
    features = Features(*(jnp.zeros((FRAMES, side, side, channels)) for side, channels in sides))
    empty = jax.tree.map(lambda x: jnp.zeros((len(anchors), *x.shape)), jax.eval_shape(lambda: made.empty(1)))
    prompted = Anchors(jnp.asarray(anchors), jnp.ones(len(anchors), bool), empty.prediction, empty.memory)
    track = jax.jit(functools.partial(made.track_in_training, jax.tree.map(lambda x: jnp.zeros(x.shape), params)))
    jax.block_until_ready(track(prompted, features, jnp.arange(FRAMES), jnp.ones(FRAMES, bool)))
    jax.effects_barrier()
    return np.stack(masks).reshape(FRAMES - len(anchors), -1, masks[0].size)


@pytest.mark.parametrize("anchors", [(0, 4), (3, 8), (8, 9)])
def test_memories_that_frames_attend_to(anchors: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = dataclasses.replace(get_preset("tiny").sam2, max_anchors_attended=-1)
    pointers = (len(anchors) + cfg.max_pointers - 1) * (cfg.hidden_size // cfg.memory_dim)
    found, expected = key_masks(cfg, anchors, monkeypatch), training_tracker.keys_seen(cfg, FRAMES, anchors)
    np.testing.assert_array_equal(found[:, 0, :-pointers], expected[:, :-pointers])


def test_share_of_blocks_that_are_run() -> None:
    cfg = virst_7b().sam2
    forward, backward = training_tracker.blocks_run(cfg, 12, 3)
    seen = np.mean([training_tracker.keys_seen(cfg, 12, (a, 5, 11))[:, : 9 * 4096].mean() for a in range(5)])
    assert 0.8 * seen < forward < backward < 0.7  # the longer blocks of the gradient are passed over less often
    assert training_tracker.blocks_run(cfg, 30, 1)[0] > forward  # in a long video the buffers are full
    assert training_tracker.blocks_run(cfg, 3, 3) == (1, 1)  # anchors alone attend to nothing


@pytest.mark.parametrize(("frames", "anchors"), [(12, 3), (10, 2), (4, 1), (8, 5)])
def test_flops_count_the_memories_that_are_there(frames: int, anchors: int) -> None:
    """As the mean over all places of the anchors, where a frame may attend to all of them."""
    cfg = dataclasses.replace(virst_7b().sam2, max_anchors_attended=-1)
    slots = (anchors + cfg.num_maskmem - 1) * cfg.feature_size**2
    seen = training_tracker.all_places(cfg, frames, anchors)[:, :slots]
    memories = flops.memories_seen(cfg, frames, anchors)
    assert memories * cfg.feature_size**2 == pytest.approx(seen.sum(1).mean())
    assert flops.memories_seen(virst_7b().sam2, 8, 5) < flops.memories_seen(cfg, 8, 5)  # attends to three


def test_a_training_step_counts_the_memories_that_are_there() -> None:
    cfg, sam = virst_7b(), virst_7b().sam2
    shape = flops.StepShape(1, 1, 1, 3, 0, 0, 12, used=12, anchors=3, seg_tokens=10)
    found = flops.step_flops(cfg, shape).parts["memory attention"].forward
    keys = (3 + sam.num_maskmem - 1 - flops.memories_seen(sam, 12, 3)) * sam.feature_size**2
    of_a_key = 2 * sam.feature_size**2 * (sam.hidden_size + sam.memory_dim) + 2 * sam.memory_dim * sam.hidden_size
    assert found == pytest.approx(9 * 3 * (flops.memory_attention(sam, 3) - keys * of_a_key * sam.memory_layers))


def test_only_kernels_of_memories_take_their_share() -> None:
    spent = Spent()
    of_memories = "jit(f)/while/body/memory_attention/layers/cross_attn/splash_mha_"
    for name, category in ((f"{of_memories}fwd", KERNELS), (f"{of_memories}dkv", KERNELS), (of_memories, MOVES)):
        spent.add((name, category), 4.0)
    spent.add(("jit(f)/memory_attention/layers/self_attn/splash_mha_fwd", KERNELS), 4.0)
    found = training_tracker.passing_over(spent, 0.5, 0.75)
    assert found.seconds == 2 + 3 + 4 + 4
    assert spent.seconds == 16
    assert found.by[f"{of_memories}dkv", KERNELS] == 3
