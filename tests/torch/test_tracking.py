"""Tracking against `transformers`: prompted anchors, then every frame of a video.

Points stand in for VIRST's prompts: both sides take them as prompt tokens. What `transformers` does otherwise than
the release, and how the comparison meets it:
- It encodes the memory of a clicked frame from a binary mask: `TorchSam2` switches that off.
- It decodes several masks only for few points: the configuration allows any number.
- It hands on the pointers of all past anchors; the release those of the attended ones and, as of tracked frames, of
  the others among the last P - 1 frames. Both are the same as long as no unattended anchor is farther back than that.
- An anchor never sees what an earlier prompt on its frame gave: that step is compared on its own.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.torch_sam2 import (
    SMALL,
    TorchSam2,
    assert_close,
    channels_first,
    frames,
    inference,
    quick_jit,
    small,
    tensor,
)
from virst_jax.config import Compute
from virst_jax.models.sam2.sam2 import Features, Sam2
from virst_jax.models.sam2.tracker import PROMPT_LOGIT_LIMIT, Anchors, Tracked, Tracker

pytestmark = pytest.mark.torch

OBJECTS, SLOTS, CHUNK = 2, 5, 4
SOMETIMES = 1.0  # bias of the object score with which objects come and go


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with inference():
        yield


@dataclasses.dataclass
class Prompts:
    """Two points an object and anchor."""

    coords: np.ndarray  # float32[O, A, 2, 2], pixels
    labels: np.ndarray  # int[O, A, 2], -1 is no point


def some_prompts(anchors: int) -> Prompts:
    rng = np.random.RandomState(anchors)
    coords = rng.uniform(10, SMALL.image_size - 10, (OBJECTS, anchors, 2, 2)).astype(np.float32)
    labels = np.stack([np.ones((OBJECTS, anchors), int), rng.randint(-1, 2, (OBJECTS, anchors))], -1)
    return Prompts(coords, labels)


def stacked(outputs: list[Any]) -> dict[str, np.ndarray]:
    """Their outputs of one frame, an object each, as ours are named."""
    return {
        "low_res": np.stack([x["pred_masks"][0, 0].numpy() for x in outputs]),
        "pointer": np.stack([x["object_pointer"][0, 0].numpy() for x in outputs]),
        "object_score": np.stack([x["object_score_logits"][0, 0, 0].numpy() for x in outputs]),
        "memory": np.stack([x["maskmem_features"][:, 0].float().numpy() for x in outputs]),
    }


def track_with_torch(pair: TorchSam2, pixels: np.ndarray, anchors: list[int], prompts: Prompts) -> list[dict[str, Any]]:
    """Every frame's outcome."""
    state = pair.open_video(pixels)
    for slot, frame in enumerate(anchors):
        for index in range(OBJECTS):
            state.obj_id_to_idx(index)
            coords, labels = tensor(prompts.coords[index, slot]), tensor(prompts.labels[index, slot])
            inputs = {"point_coords": coords[None, None], "point_labels": labels[None, None]}
            state.add_point_inputs(index, frame, inputs)
            state.obj_with_new_inputs.append(index)
        pair.model(state, frame_idx=frame)
    for _ in pair.model.propagate_in_video_iterator(state, start_frame_idx=0):
        pass
    results = []
    for frame in range(len(pixels)):
        kind = "cond_frame_outputs" if frame in anchors else "non_cond_frame_outputs"
        results.append(stacked([state.output_dict_per_obj[index][kind][frame] for index in range(OBJECTS)]))
    return results


@functools.cache
def compiled(memory: str) -> tuple[Tracker, Any, Any]:
    """A tracker, its prompting and its tracking."""
    tracker = Tracker(Sam2(SMALL, Compute()))
    assert tracker.memory_dtype == jnp.bfloat16
    tracker.memory_dtype = jnp.dtype(memory)
    return tracker, quick_jit(tracker.prompt_anchors), quick_jit(functools.partial(tracker.track, keep_memory=True))


def encode(pair: TorchSam2, pixels: np.ndarray) -> list[Features]:
    """Frame by frame."""
    return [pair.features(image[None]) for image in pixels]


def prompt(
    pair: TorchSam2, features: list[Features], anchors: list[int], prompts: Prompts, memory: str = "float32"
) -> Anchors:
    count = len(anchors)
    numbers = np.pad(np.array(anchors, np.int32), (0, SLOTS - count))
    coords, labels = prompts.coords.reshape(-1, 2, 2), prompts.labels.reshape(-1, 2)
    tokens = np.asarray(pair.ours(Sam2.embed_points, coords, labels)).reshape(OBJECTS, count, 3, -1)
    tokens = np.pad(tokens, ((0, 0), (0, SLOTS - count), (0, 0), (0, 0)))
    images = jax.tree.map(lambda *x: np.concatenate(x), *[features[i] for i in numbers])
    return compiled(memory)[1](pair.params, images, numbers, np.arange(SLOTS) < count, tokens)


def track(pair: TorchSam2, features: list[Features], anchors: Anchors) -> list[Tracked]:
    """Every frame's outcome."""
    tracker, _, step = compiled("float32")
    bank, results, length = tracker.start(OBJECTS), [], len(features)
    for start in range(0, length, CHUNK):
        numbers = np.arange(start, start + CHUNK, dtype=np.int32)
        valid = numbers < length
        chunk = jax.tree.map(lambda *x: np.concatenate(x), *[features[i] for i in np.where(valid, numbers, 0)])
        bank, out = step(pair.params, anchors, bank, chunk, numbers, valid, np.int32(length))
        results += [jax.tree.map(lambda x, i=i: np.asarray(x[i]), out) for i in range(valid.sum())]
    return results


def prompt_and_track(pair: TorchSam2, pixels: np.ndarray, anchors: list[int], prompts: Prompts) -> list[Tracked]:
    features = encode(pair, pixels)
    return track(pair, features, prompt(pair, features, anchors, prompts))


def assert_same(ours: list[Tracked], theirs: list[dict[str, Any]], tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a.prediction.low_res, b["low_res"], tolerance)
        assert_close(a.prediction.pointer, b["pointer"], tolerance)
        assert_close(a.memory, b["memory"], tolerance)
    # on the scale of the whole video: those of a frame may all be next to 0
    scores = np.stack([a.prediction.object_score for a in ours])
    assert_close(scores, np.stack([np.asarray(b["object_score"]) for b in theirs]), tolerance)


@pytest.mark.parametrize(
    ("anchors", "count"),
    [
        pytest.param([0], 12, id="first_frame"),
        pytest.param([5], 12, id="middle_frame"),
        pytest.param([2, 9], 13, id="two_frames"),
        pytest.param([0, 3, 6, 9, 12], 16, id="more_than_are_attended"),
        pytest.param([1], 20, id="longer_than_the_memory"),
    ],
)
def test_every_frame(anchors: list[int], count: int) -> None:
    pair, pixels, prompts = small(), frames(count, SMALL.image_size), some_prompts(len(anchors))
    ours, theirs = prompt_and_track(pair, pixels, anchors, prompts), track_with_torch(pair, pixels, anchors, prompts)
    assert len(ours) == len(theirs) == count
    assert_same(ours, theirs, 1e-4)


def test_objects_that_come_and_go() -> None:
    """Absent objects leave a mask of -1024, a learned pointer and a marked memory, from which later frames track."""
    pair, pixels, prompts = small(SOMETIMES), frames(12, SMALL.image_size), some_prompts(1)
    ours, theirs = prompt_and_track(pair, pixels, [0], prompts), track_with_torch(pair, pixels, [0], prompts)
    scores = np.stack([x.prediction.object_score for x in ours])
    assert 4 < (scores > 0).sum() < 20
    assert np.abs(scores).min() > 5e-3  # rounding decides none
    assert_same(ours, theirs, 1e-4)


def test_a_second_prompt_on_one_frame() -> None:
    """It gets the first one's clamped logits as a mask prompt, and overrules the first."""
    pair, pixels, prompts = small(), frames(2, SMALL.image_size), some_prompts(3)
    anchors = prompt(pair, encode(pair, pixels), [1, 0, 1], prompts)
    assert anchors.valid.tolist() == [False, True, True, False, False]
    before = np.asarray(anchors.prediction.low_res[0])
    assert (np.abs(before).max((1, 2)) > PROMPT_LOGIT_LIMIT).all()
    images = pair.model.get_image_embeddings(channels_first(pixels[1:]))
    for index, slot in np.ndindex(OBJECTS, 2):
        theirs = pair.model._single_frame_forward(
            input_points=tensor(prompts.coords[index, 2 * slot])[None, None],
            input_labels=tensor(prompts.labels[index, 2 * slot])[None, None],
            input_masks=tensor(np.clip(before[index], -32, 32))[None, None] if slot else None,
            image_embeddings=images,
        )
        assert_close(anchors.prediction.low_res[2 * slot, index], theirs.pred_masks[0, 0])
        assert_close(anchors.prediction.pointer[2 * slot, index], theirs.object_pointer[0, 0])


def test_rounded_memories(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memories as they are kept outside of tests: in bfloat16, which shows in what is tracked from them."""
    pair, pixels, prompts = small(), frames(2, SMALL.image_size), some_prompts(1)
    monkeypatch.setattr(pair, "round_memory", True)
    theirs = track_with_torch(pair, pixels, [0], prompts)
    features = encode(pair, pixels)
    anchors = prompt(pair, features, [0], prompts, "bfloat16")
    assert anchors.memory.dtype == jnp.bfloat16
    rounded = anchors.memory.astype(jnp.float32)
    a, b = np.asarray(rounded[0]), theirs[0]["memory"]
    differ = a != b
    assert differ.mean() < 0.01
    # those lay on the edge between two neighbours
    np.testing.assert_allclose(a[differ], b[differ], rtol=2.0**-7, atol=1e-5 * np.abs(b).max())
    expected = theirs[1]["low_res"]
    assert_close(
        track(pair, features, dataclasses.replace(anchors, memory=rounded))[1].prediction.low_res, expected, 1e-4
    )
    unrounded = track(pair, features, prompt(pair, features, [0], prompts))[1].prediction.low_res
    assert np.abs(unrounded - expected).max() > 1e-3 * np.abs(expected).max()
