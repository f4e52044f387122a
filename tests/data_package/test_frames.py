"""Choice of frames and anchors against the release's."""

import json
import random

import numpy as np
import pytest

from helpers.places import PARITY
from virst_jax.data import frames
from virst_jax.errors import UserError

ROWS = json.loads((PARITY / "frame_indices.json").read_text())
ANCHORS = json.loads((PARITY / "anchors.json").read_text())["eval_anchors"]


@pytest.mark.parametrize("sample", ["middle", "dynamic_fps1", "fps0.5"])
def test_frame_indices_are_those_of_the_release(sample):
    rows = [row for row in ROWS if row["sample"] == sample]
    assert len(rows) == 35
    for row in rows:
        options = {k: v for k, v in row.items() if k != "indices"}
        assert frames.get_frame_indices(**options) == row["indices"], options


def test_random_frames_stay_in_their_intervals():
    rng = np.random.default_rng(0)
    drawn = np.array([frames.get_frame_indices(8, 80, "rand", rng=rng) for _ in range(200)])
    first = np.arange(8) * 10
    assert (drawn.min(0) == first).all()
    assert (drawn.max(0) == first + 8).all()  # never an interval's last frame
    short = frames.get_frame_indices(8, 10, "rand", rng=rng)  # intervals of one frame: drawn from the whole video
    assert len(short) == len(set(short)) == 8
    assert short == sorted(short)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((8, 0), "has 0 frames"),
        ((0, 8, "middle", {"min_num_frames": 0}), "at least 1, not 0"),
        ((8, 8, "centre"), "unknown frame sampling 'centre'"),
        ((8, 8, "fpsx"), "'fps' and a positive number"),
        ((8, 8, "fps0"), "'fps' and a positive number"),
        ((8, 8, "rand"), "needs a random generator"),
        ((8, 8, "middle", {"fps": 0.0}), "frame rate must be positive"),
    ],
)
def test_bad_sampling_is_refused(arguments, says):
    options = arguments[-1] if isinstance(arguments[-1], dict) else {}
    with pytest.raises(UserError, match=says):
        frames.get_frame_indices(*[a for a in arguments if not isinstance(a, dict)], **options)


@pytest.mark.parametrize("num_frames", [9, 11, 12, 63, 64, 65, 300])
def test_flex_frames_take_one_of_every_interval(num_frames):
    count = min(64, num_frames) // 4 * 4
    edges = np.linspace(0, num_frames, num=count + 1, dtype=int)
    draws = np.array([frames.flex_frames(num_frames, seed=s) for s in range(300)])
    assert draws.shape == (300, count)
    assert (draws >= edges[:-1]).all()
    assert (draws < edges[1:]).all()
    wide = edges[1:] - edges[:-1] > 1
    assert all(len(set(column)) > 1 for column in draws.T[wide])
    assert frames.flex_frames(num_frames, seed=[7, 1]) == frames.flex_frames(num_frames, seed=[7, 1])


@pytest.mark.parametrize(("num_frames", "expected"), [(1, [0] * 8), (3, [0, 1, 2, *[2] * 5]), (8, list(range(8)))])
def test_flex_frames_of_short_videos_are_filled_up(num_frames, expected):
    assert frames.flex_frames(num_frames) == expected


def test_flex_frames_follow_the_release_draw_by_draw():
    """numpy.random.seed(3), then numpy.random.randint(low, high) for each interval of each video in turn."""
    release = np.random.RandomState(3)
    generator = np.random.RandomState(3)
    for num_frames in (100, 70, 5, 9, 300):
        count = min(64, num_frames) // 4 * 4
        edges = np.linspace(0, num_frames, num=count + 1, dtype=int)
        drawn = frames.flex_frames(num_frames, release_random=generator)
        if num_frames > 8:
            release.randint(8, 9)  # the release draws how many frames it wants first: it takes nothing of the stream
            assert drawn == [release.randint(edges[i], edges[i + 1]) for i in range(count)]


def test_flex_limits_are_checked():
    with pytest.raises(UserError, match="multiples of a clip's 4 frames"):
        frames.flex_frames(20, max_frames=30)
    with pytest.raises(UserError, match="multiples of a clip's 4 frames"):
        frames.flex_frames(20, min_frames=6)
    with pytest.raises(UserError, match="has 0 frames"):
        frames.flex_frames(0)


def test_segmentation_frames():
    assert frames.segmentation_frames(8) == list(range(8))
    assert frames.segmentation_frames(6, 3) == [1, 3, 5]
    spread = np.diff(frames.segmentation_frames(44))
    assert len(spread) == 31
    assert set(spread) == {1, 2}
    drawn = frames.segmentation_frames(64, rng=np.random.default_rng(1))
    assert drawn == frames.segmentation_frames(64, rng=np.random.default_rng(1))
    assert drawn != frames.segmentation_frames(64, rng=np.random.default_rng(2))
    assert len(set(drawn)) == 32
    assert drawn == sorted(drawn)
    with pytest.raises(UserError, match="at least 1, not 0"):
        frames.segmentation_frames(8, 0)


def test_segmentation_frames_follow_the_release_draw_by_draw():
    release, generator = random.Random(5), random.Random(5)
    for num_sampled in (64, 8, 40):
        listed = list(range(num_sampled))
        expected = sorted(release.sample(listed, min(32, num_sampled)), key=listed.index)
        assert frames.segmentation_frames(num_sampled, release_random=generator) == expected


def test_eval_anchors_are_those_of_the_release():
    assert [row["T"] for row in ANCHORS] == list(range(1, 66))
    for row in ANCHORS:
        assert frames.eval_anchors(row["T"]) == row["anchors"], row["T"]


@pytest.mark.torch
def test_eval_anchors_are_those_of_torch():
    torch = pytest.importorskip("torch")
    for num_frames in range(2, 400):
        for each in (1, 2, 3, 4, 7):
            expected = torch.linspace(0, num_frames - 1, steps=max(1, num_frames // each)).round().long().tolist()
            assert frames.eval_anchors(num_frames, each) == expected, (num_frames, each)


def test_training_anchors():
    rng = np.random.default_rng(0)
    draws = [frames.training_anchors(rng, 12) for _ in range(500)]
    assert all(anchors == used for anchors, used in draws)
    assert all(len(set(anchors)) == 3 and anchors == sorted(anchors) for anchors, _ in draws)
    counts = np.bincount(np.concatenate([anchors for anchors, _ in draws]), minlength=12)
    assert counts.min() > 0.7 * counts.mean()  # every frame may be drawn
    assert frames.training_anchors(rng, 1, propagate=True) == ([0], [0])
    assert frames.training_anchors(rng, 2) == ([0, 1], [0, 1])


def test_training_anchors_with_their_neighbours():
    rng = np.random.default_rng(0)
    for _ in range(50):
        anchors, used = frames.training_anchors(rng, 40, count=2, propagate=True)
        expected = {f for f in range(40) if any(-2 <= f - a <= 5 for a in anchors)}
        assert used == sorted(expected)
        assert set(anchors) <= set(used)


def test_bad_anchor_counts_are_refused():
    with pytest.raises(UserError, match="frames per anchor"):
        frames.eval_anchors(8, 0)
    with pytest.raises(UserError, match="number of anchors"):
        frames.training_anchors(np.random.default_rng(0), 8, count=0)
    with pytest.raises(UserError, match="has 0 frames"):
        frames.eval_anchors(0)
