"""The parts of SAM 2 against `transformers`, on random weights."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from helpers.torch_sam2 import (
    SMALL,
    TorchSam2,
    assert_close,
    channels_first,
    channels_last,
    frames,
    inference,
    small,
    tensor,
)
from virst_jax.config import Sam2Config
from virst_jax.models.sam2.hiera import ImageEncoder
from virst_jax.models.sam2.mask_decoder import Masks, multimask, single_mask
from virst_jax.models.sam2.memory import memory_position
from virst_jax.models.sam2.sam2 import Features, Prediction, Sam2
from virst_jax.ops.position import sine_2d

pytestmark = pytest.mark.torch

SIZE, WIDTH, DEPTH, LOW = SMALL.feature_size, SMALL.hidden_size, SMALL.memory_dim, SMALL.low_res_size
OBJECTS = 4
MIXED_BIAS = 1.02  # of the object score: some objects are there, some are not


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with inference():
        yield


def normal(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.RandomState(seed).standard_normal(shape)).astype(np.float32)


# image encoder


def test_image_encoder() -> None:
    """Stages, pyramid, the decoder's convolutions over it, position encodings, and what stands for no memory."""
    pair, pixels = small(), frames(2, SMALL.image_size)
    encoder = pair.model.vision_encoder
    theirs = encoder(channels_first(pixels))
    stages = encoder.backbone(channels_first(pixels)).intermediate_hidden_states
    features, kept = pair.ours(
        Sam2.encode_image,
        pixels,
        mutable="intermediates",
        capture_intermediates=lambda module, method: isinstance(module, ImageEncoder),
    )
    kept = kept["intermediates"]["image_encoder"]
    assert len(kept["stages"][0]) == len(stages) == 4
    for a, b in zip(kept["stages"][0], stages):
        assert_close(a, b)
    assert len(kept["__call__"][0]) == len(theirs.fpn_hidden_states) == 3
    for a, b, position in zip(kept["__call__"][0], theirs.fpn_hidden_states, theirs.fpn_position_encoding):
        assert_close(a, channels_last(b))
        assert_close(sine_2d(*a.shape[1:]), channels_last(position)[0], 1e-6)
    top = features.top + pair.params["no_memory_embed"]
    for a, b in zip((features.high0, features.high1, top), pair.model.get_image_embeddings(channels_first(pixels))):
        assert_close(a, channels_last(b))


# prompt encoder


def test_points() -> None:
    pair, rng = small(), np.random.RandomState(1)
    coords = rng.uniform(0, SMALL.image_size, (OBJECTS, 5, 2)).astype(np.float32)
    labels = np.array([[1, 0, 2, 3, -1], [0, 0, 1, 1, 1], [-1, -1, -1, -1, -1], [3, 2, 1, 0, 1]])
    theirs, _ = pair.model.prompt_encoder(tensor(coords)[None], tensor(labels)[None], None, None)
    assert_close(pair.ours(Sam2.embed_points, coords, labels), theirs[0], 2e-5)


def test_no_prompt() -> None:
    pair = small()
    theirs, _ = pair.model.prompt_encoder(tensor(np.zeros((1, 2, 1, 2))), tensor(-np.ones((1, 2, 1), int)), None, None)
    assert_close(pair.ours(Sam2.no_prompt, batch=2), theirs[0], 1e-6)


def test_boxes() -> None:
    """A box's corners; the padding that transformers puts behind a box is ours where a box is given as points."""
    pair = small()
    boxes = np.array([[3, 5, 60, 70], [0, 0, 127, 127], [20.5, 30.25, 21, 90]], np.float32)
    theirs, _ = pair.model.prompt_encoder(None, None, tensor(boxes)[None], None)
    assert_close(pair.ours(Sam2.embed_boxes, boxes), theirs[0, :, :2], 2e-5)
    corners = pair.ours(Sam2.embed_points, boxes.reshape(-1, 2, 2), np.tile([2, 3], (3, 1)))
    assert_close(corners, theirs[0], 2e-5)


def test_mask_prompts() -> None:
    pair, logits = small(), normal(2, OBJECTS, LOW, LOW, scale=8)
    _, dense = pair.model.prompt_encoder(None, None, None, tensor(logits)[:, None])
    assert_close(pair.ours(lambda sam, x: sam.prompt_encoder.masks(x), logits), channels_last(dense))
    _, none = pair.model.prompt_encoder(tensor(np.zeros((2, 1, 1, 2))), tensor(np.ones((2, 1, 1), int)), None, None)
    assert_close(pair.ours(lambda sam: sam.prompt_encoder.no_mask(2)), channels_last(none), 1e-7)
    position = pair.model.get_image_wide_positional_embeddings()[0]
    assert_close(pair.ours(lambda sam: sam.prompt_encoder.dense_position()), channels_last(position), 2e-5)


# mask decoder


@dataclasses.dataclass
class Inputs:
    """Of the decoder, for every object another image."""

    image: np.ndarray
    sparse: np.ndarray
    dense: np.ndarray
    high: tuple[np.ndarray, np.ndarray]


def decoder_inputs() -> Inputs:
    return Inputs(
        image=normal(3, OBJECTS, SIZE, SIZE, WIDTH),
        sparse=normal(4, OBJECTS, 3, WIDTH),
        dense=normal(5, OBJECTS, SIZE, SIZE, WIDTH, scale=0.5),
        high=(normal(6, OBJECTS, 4 * SIZE, 4 * SIZE, WIDTH // 8), normal(7, OBJECTS, 2 * SIZE, 2 * SIZE, WIDTH // 4)),
    )


def run_decoder(sam: Sam2, image: Any, sparse: Any, dense: Any, high: Any) -> Masks:
    return sam.mask_decoder(image, sam.prompt_encoder.dense_position(), sparse, dense, high)


def decode(pair: TorchSam2, x: Inputs) -> Masks:
    return pair.ours(run_decoder, x.image, x.sparse, x.dense, x.high)


def decode_with_torch(pair: TorchSam2, x: Inputs, several: bool) -> list[Any]:
    out = pair.model.mask_decoder(
        image_embeddings=channels_first(x.image),
        image_positional_embeddings=pair.model.get_image_wide_positional_embeddings().repeat(OBJECTS, 1, 1, 1),
        sparse_prompt_embeddings=tensor(x.sparse)[:, None],
        dense_prompt_embeddings=channels_first(x.dense),
        multimask_output=several,
        high_resolution_features=[channels_first(y) for y in x.high],
    )
    return [y[:, 0] for y in out]


def assert_same_masks(ours: Masks, theirs: list[Any]) -> None:
    for a, b in zip((ours.logits, ours.ious, ours.tokens, ours.object_score), theirs):
        assert_close(a, b)


def test_decoder_with_several_masks() -> None:
    pair, x = small(), decoder_inputs()
    assert_same_masks(multimask(decode(pair, x)), decode_with_torch(pair, x, several=True))


@pytest.mark.parametrize("fallback", [True, False])
def test_decoder_with_one_mask(fallback: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the fallback, some objects' single mask is stable, that of others gives way to the best of three."""
    pair, x = small(), decoder_inputs()
    decoder, masks = pair.model.mask_decoder, decode(small(), x)
    delta = 0.1 * float(jnp.abs(masks.logits[:, 0]).mean())
    monkeypatch.setattr(decoder, "dynamic_multimask_stability_delta", delta)
    scores = np.sort(decoder._get_stability_scores(tensor(masks.logits[:, 0])).numpy())
    threshold = float(scores[OBJECTS // 2 - 1 : OBJECTS // 2 + 1].mean())
    monkeypatch.setattr(decoder, "dynamic_multimask_stability_thresh", threshold)
    monkeypatch.setattr(decoder, "dynamic_multimask_via_stability", fallback)
    cfg = dataclasses.replace(SMALL, stability_delta=delta, stability_threshold=threshold)
    chosen = single_mask(masks, cfg if fallback else None)
    kept = (np.asarray(chosen.logits) == np.asarray(masks.logits[:, :1])).all((1, 2, 3))
    assert kept.sum() == (OBJECTS // 2 if fallback else OBJECTS)
    assert_same_masks(chosen, decode_with_torch(pair, x, several=False))


def test_fallback_at_its_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks without any positive pixel, full, just stable (196 of 200 pixels), just not (195), and clearly not."""
    decoder = small().model.mask_decoder
    monkeypatch.setattr(decoder, "dynamic_multimask_stability_thresh", 0.98)
    logits = normal(8, 5, 4, 20, 20)
    logits[:, 0] = -1
    logits[1, 0] = 1
    logits[2:, 0, :10] = 1
    for index, weak in ((2, 4), (3, 5), (4, 100)):
        logits[index, 0].reshape(-1)[:weak] = 0.01
    ious = normal(9, 5, 4)
    empty = jnp.zeros((5, 4, 1))
    ours = single_mask(Masks(jnp.asarray(logits), jnp.asarray(ious), empty, empty[:, 0]), Sam2Config())
    theirs = decoder._dynamic_multimask_via_stability(tensor(logits)[:, None], tensor(ious)[:, None])
    kept = [np.array_equal(a, b) for a, b in zip(np.asarray(ours.logits[:, 0]), logits[:, 0])]
    assert kept == [True, True, True, False, False]
    assert_close(ours.logits, theirs[0][:, 0], 0)
    assert_close(ours.ious, theirs[1][:, 0], 0)


# heads: the choice of a mask, the pointer, and objects that are not there


def frame_features(seed: int) -> Features:
    sides = (4 * SIZE, WIDTH // 8), (2 * SIZE, WIDTH // 4), (SIZE, WIDTH)
    return Features(*(jnp.asarray(normal(seed + i, side, side, width)) for i, (side, width) in enumerate(sides)))


def torch_frame(frame: Features, image: Any) -> list[Any]:
    """What their decoder takes for one object."""
    return [channels_first(x)[None] for x in (frame.high0, frame.high1, image)]


def predict_in_modes(sam: Sam2, image: Any, frame: Features, coords: Any, labels: Any, prompt: Any) -> list[Any]:
    tokens = sam.embed_points(coords, labels)
    made = [sam.predict(image, frame, tokens, prompt, mode=mode) for mode in ("multimask", "stable")]
    return [(prediction, sam.high_res(prediction.low_res)) for prediction in made]


def test_prediction() -> None:
    """From a point and a mask prompt; two objects are not there, and one object's single mask is not stable."""
    pair, frame = small(MIXED_BIAS), frame_features(20)
    image, prompt = normal(23, OBJECTS, SIZE, SIZE, WIDTH), normal(24, OBJECTS, LOW, LOW, scale=4)
    coords = np.random.RandomState(25).uniform(0, SMALL.image_size, (OBJECTS, 1, 2)).astype(np.float32)
    labels = np.array([[1], [0], [1], [-1]])
    ours = pair.ours(predict_in_modes, image, frame, coords, labels, prompt)
    assert (np.asarray(ours[0][0].iou) == np.asarray(ours[1][0].iou)).sum() == 1
    for several, (prediction, high_res) in zip((True, False), ours):
        assert sorted(np.sign(prediction.object_score)) == [-1, -1, 1, 1]
        scores = []
        for i in range(OBJECTS):
            theirs = pair.model._single_frame_forward(
                input_points=tensor(coords[i : i + 1])[None],
                input_labels=tensor(labels[i : i + 1])[None],
                input_masks=tensor(prompt[i])[None, None],
                image_embeddings=torch_frame(frame, image[i]),
                multimask_output=several,
            )
            assert_close(prediction.low_res[i], theirs.pred_masks[0, 0])
            assert_close(high_res[i], theirs.high_res_masks[0, 0])
            assert_close(prediction.pointer[i], theirs.object_pointer[0, 0])
            assert_close(prediction.iou[i], theirs.iou_scores[0, 0].max())
            scores.append(theirs.object_score_logits[0, 0, 0])
        assert_close(prediction.object_score, np.stack([np.asarray(x) for x in scores]))  # one alone is next to 0


def test_given_mask() -> None:
    """A mask in place of a prediction, here also an empty one.

    transformers takes the pointer from the best of three masks; the release from the first, which is asked for here.
    """
    pair, frame = small(), frame_features(30)
    mask = (normal(33, 3, 8, 8) > 0.3).astype(np.float32).repeat(16, 1).repeat(16, 2)
    mask[2] = 0
    ours = pair.ours(Sam2.use_mask, frame, mask)
    for i in range(3):
        image = torch_frame(frame, frame.top)
        given = tensor(mask[i])[None, None]
        theirs = pair.model._use_mask_as_output(image[2], image[:2], given)
        assert_close(ours.low_res[i], theirs.pred_masks[0, 0], 1e-6)
        assert_close(ours.object_score[i], theirs.object_score_logits[0, 0, 0])
        pointer = theirs.object_pointer
        if mask[i].any():
            downsampled = pair.model.mask_downsample(given)
            pointer = pair.model._single_frame_forward(
                input_masks=downsampled, image_embeddings=image, multimask_output=False
            ).object_pointer
        assert_close(ours.pointer[i], pointer[0, 0])


# memory


@pytest.mark.parametrize("heads", [1, 2])
def test_memory_attention(heads: int) -> None:
    """Three memories of five slots, five pointers of seven: ten pointer tokens. What lies in dead slots is ignored."""
    pair = TorchSam2(dataclasses.replace(SMALL, memory_heads=heads)) if heads > 1 else small()
    frame, objects = frame_features(40), 2
    memory, pointers = normal(43, objects, 5, SIZE * SIZE, DEPTH), normal(44, objects, 7, WIDTH)
    age = np.array([6, 0, 3, 2, 6])
    valid = np.array([True, True, False, False, True])
    time = np.array([3, 0, 11, 1, 2, 5, 15], np.float32) / 15
    valid_pointers = np.array([True, True, True, False, True, False, True])
    memory[:, ~valid] = 1e3
    pointers[:, ~valid_pointers] = -1e3
    ours = pair.ours(Sam2.with_memory, frame, memory, age, valid, pointers, time, valid_pointers)

    model = pair.model
    position = model.memory_encoder.position_encoding((objects, DEPTH, SIZE, SIZE), "cpu", tensor(memory).dtype)
    position = position.flatten(2).permute(2, 0, 1)
    memories, positions = model._build_memory_attention_inputs(
        [
            (
                a + 1 if a < 6 else 0,
                {"maskmem_features": tensor(memory[:, i].swapaxes(0, 1)), "maskmem_pos_enc": position},
            )
            for i, a in enumerate(age)
            if valid[i]
        ],
        "cpu",
    )
    chosen = [tensor(pointers[:, i]) for i in np.flatnonzero(valid_pointers)]
    distances = np.round(time[valid_pointers] * 15).astype(int).tolist()
    tokens, token_positions = model._process_object_pointers(distances, chosen, 16, objects, WIDTH, "cpu")
    assert len(tokens) == 5 * WIDTH // DEPTH
    import torch

    top = tensor(frame.top).reshape(-1, 1, WIDTH).expand(-1, objects, -1)
    theirs = model.memory_attention(
        current_vision_features=top,
        current_vision_position_embeddings=tensor(pair.ours(Sam2.image_position))[:, None],
        memory=torch.cat([*memories, tokens]),
        memory_posision_embeddings=torch.cat([*positions, token_positions]),
        num_object_pointer_tokens=len(tokens),
    )
    assert_close(ours.reshape(objects, -1, WIDTH), theirs[0])


def test_memory_encoder() -> None:
    """Of an object that is there and of one that is not."""
    pair, frame = small(), frame_features(50)
    low_res, score = normal(53, 2, LOW, LOW, scale=6), np.array([2, -1], np.float32)
    low_res[1] = -1024
    arrays = map(jnp.asarray, (low_res, normal(54, 2, WIDTH), score, np.ones(2)))
    ours = pair.ours(Sam2.encode_memory, frame, Prediction(*arrays))
    theirs, position = pair.encode_memory(
        current_vision_feats=tensor(frame.top).reshape(-1, 1, WIDTH).expand(-1, 2, -1),
        pred_masks_high_res=tensor(pair.ours(Sam2.high_res, low_res))[:, None],
        object_score_logits=tensor(score)[:, None, None],
    )
    assert_close(ours, theirs.permute(1, 0, 2))
    assert_close(memory_position(SMALL), position[:, 0], 1e-6)
