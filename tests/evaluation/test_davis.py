"""The official protocol of Ref-DAVIS17 against one written with arrays of labels."""

import dataclasses
import itertools

import numpy as np
import pytest
from PIL import Image

from helpers.evaluation_cases import plain_scores
from virst_jax.data.datasets.readers import LabelMasks
from virst_jax.data.samples import Expression, Video
from virst_jax.errors import UserError
from virst_jax.evaluation import bitmask
from virst_jax.evaluation.davis import VOID, score_annotators, score_indexed

SIZE, LENGTH, OBJECTS = (40, 66), 4, 3
NAMES = tuple(f"{i:05d}" for i in range(LENGTH))


@pytest.fixture
def labels():
    out = np.zeros((LENGTH, *SIZE), np.uint8)
    for t in range(LENGTH):
        for n in range(OBJECTS):
            if (t, n) != (LENGTH - 1, 2):
                out[t, 4 + 10 * n : 16 + 10 * n, 5 + 3 * t + 14 * n : 25 + 3 * t + 14 * n] = n + 1
    out[1, 30:, :30] = VOID
    return out


@pytest.fixture
def video(labels, tmp_path):
    for name, frame in zip(NAMES, labels, strict=True):
        image = Image.fromarray(frame)
        image.putpalette(list(range(256)) * 3)
        image.save(tmp_path / f"{name}.png")
    ids = sorted(str(i) for i in range(4 * OBJECTS))  # "10" before "2"
    values = tuple((int(i) // 4 + 1,) for i in ids)
    masks = LabelMasks(str(tmp_path), NAMES, values, SIZE)
    return Video("v", LENGTH, SIZE, tuple(Expression(f"e{i}", i) for i in ids), None, masks, NAMES)


def noisy(labels, seed=0):
    """A prediction for every expression id."""
    rng = np.random.default_rng(seed)
    found = {}
    for i in range(4 * OBJECTS):
        moved = np.roll(labels == i // 4 + 1, rng.integers(-4, 5, 2), axis=(1, 2))
        found[str(i)] = moved ^ (rng.random(moved.shape) < 0.01)
    return found


def reader(found):
    return lambda video, i, frames: bitmask.pack(found[video.expressions[i].id][list(frames)])


def official(labels, found):
    """Objects' J and F by annotator: argmax with background 0.1, best assignment, void left out."""
    void = labels == VOID
    rows = []
    for annotator in range(4):
        stack = np.stack(
            [np.full(labels.shape, 0.1)] + [found[str(4 * n + annotator)].astype(float) for n in range(OBJECTS)]
        )
        indexed = stack.argmax(0)
        results = [(indexed == n + 1) & ~void for n in range(OBJECTS)]
        pairs = {
            (n, k): plain_scores(results[n], (labels == k + 1) & ~void)
            for n, k in itertools.product(range(OBJECTS), repeat=2)
        }
        best = max(
            itertools.permutations(range(OBJECTS)), key=lambda order: sum(sum(pairs[n, k]) for k, n in enumerate(order))
        )
        rows += [(annotator, k + 1, *pairs[n, k]) for k, n in enumerate(best)]
    return rows


def test_scores_are_those_of_the_protocol(video, labels):
    found = noisy(labels)
    # swapped objects of one annotator are matched by the protocol
    found["1"], found["5"] = found["5"], found["1"]
    expected = official(labels, found)
    rows = score_annotators(video, reader(found))
    assert [(r.annotator, r.object) for r in rows] == [row[:2] for row in expected]
    np.testing.assert_allclose([(r.J, r.F) for r in rows], [row[2:] for row in expected], rtol=0, atol=1e-12)
    assert 0.2 < np.mean([r.J for r in rows]) < 0.95


def test_contested_pixels_go_to_the_first_object(video, labels):
    found = {str(i): labels == i // 4 + 1 for i in range(4 * OBJECTS)}
    greedy = dict(found, **{"0": labels > 0})  # takes the others' pixels from them
    rows = score_annotators(video, reader(greedy))
    assert [r.J for r in rows if r.annotator == 1] == [1, 1, 1]
    first = [r.J for r in rows if r.annotator == 0]
    assert max(first) < 1
    modest = dict(found, **{"8": labels > 0})  # the last one gets only what is left
    assert all(r.J > 0.5 for r in score_annotators(video, reader(modest)))


def test_truth_and_nothing(video, labels):
    truth = {str(i): labels == i // 4 + 1 for i in range(4 * OBJECTS)}
    assert {(r.J, r.F) for r in score_annotators(video, reader(truth))} == {(1.0, 1.0)}
    nothing = {key: np.zeros_like(mask) for key, mask in truth.items()}
    rows = score_annotators(video, reader(nothing))
    # the third object is away in one of four frames
    assert [(r.J, r.F) for r in rows if r.annotator == 0] == [(0, 0), (0, 0), (0.25, 0.25)]


def test_palette_images_score_the_same(video, labels, tmp_path):
    found = noisy(labels, 1)
    for annotator in range(4):
        stack = np.stack([np.full(labels.shape, 0.1)] + [found[str(4 * n + annotator)] for n in range(OBJECTS)])
        folder = tmp_path / f"anno_{annotator}" / "v"
        folder.mkdir(parents=True)
        for name, frame in zip(NAMES, stack.argmax(0).astype(np.uint8), strict=True):
            image = Image.fromarray(frame)
            image.putpalette(list(range(256)) * 3)
            image.save(folder / f"{name}.png")
    assert score_indexed(video, tmp_path) == score_annotators(video, reader(found))
    (folder / f"{NAMES[0]}.png").unlink()
    with pytest.raises(UserError, match=r"anno_3/v/00000\.png: no such file"):
        score_indexed(video, tmp_path)
    Image.fromarray(np.full(SIZE, 255, np.uint8)).save(folder / f"{NAMES[0]}.png")
    with pytest.raises(UserError, match="anno_3/v: has object 255"):
        score_indexed(video, tmp_path)


def test_a_missing_annotator_is_told(video, labels):
    found = noisy(labels)
    fewer = dataclasses.replace(video, expressions=tuple(e for e in video.expressions if e.id != "7"))
    with pytest.raises(UserError, match="video v: annotator 3 has no expression for object 2"):
        score_annotators(fewer, reader(found))
    named = dataclasses.replace(video, expressions=(Expression("x", "a1"),))
    with pytest.raises(UserError, match="'a1'"):
        score_annotators(named, reader(found))


def test_masks_without_labels_serve_too(video, labels):
    plain = dataclasses.replace(
        video, read_masks=lambda i, frames: (labels == int(video.expressions[i].id) // 4 + 1)[list(frames)]
    )
    found = noisy(labels, 2)
    no_void = labels.copy()
    no_void[no_void == VOID] = 0
    rows = score_annotators(plain, reader(found))
    np.testing.assert_allclose([(r.J, r.F) for r in rows], [row[2:] for row in official(no_void, found)], atol=1e-12)
