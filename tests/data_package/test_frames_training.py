import numpy as np
import pytest

from virst_jax.data.frames import TRAINING_POLICIES, training_frames
from virst_jax.errors import UserError

# policy, frames of the video, seed, and what sample_data of the release draws from a legacy generator so seeded
RELEASE = [
    ("uniform", 5, 0, [0, 1, 2, 3, 4]),
    ("uniform", 9, 7, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
    ("uniform", 13, 7, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12]),
    ("uniform", 37, 7, [1, 5, 6, 10, 14, 15, 19, 23, 26, 29, 30, 36]),
    ("random", 13, 7, [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12]),
    ("random", 37, 7, [1, 2, 5, 9, 13, 15, 17, 18, 20, 21, 24, 26]),
    ("all", 13, 7, list(range(13))),
    ("flex", 9, 7, list(range(9))),
    ("flex", 13, 7, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12]),
    ("flex", 37, 7, [*range(35), 36]),
]


@pytest.mark.parametrize(("policy", "num_frames", "seed", "expected"), RELEASE)
def test_draws_of_the_release(policy, num_frames, seed, expected):
    assert training_frames(policy, num_frames, release_random=np.random.RandomState(seed)) == expected[:num_frames]


@pytest.mark.parametrize("policy", TRAINING_POLICIES)
@pytest.mark.parametrize("num_frames", [1, 3, 8, 12, 13, 50, 200])
def test_frames_are_sorted_distinct_and_follow_the_generator(policy, num_frames):
    chosen = [training_frames(policy, num_frames, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1]
    for frames in chosen:
        assert frames == sorted(set(frames))
        assert frames[0] >= 0
        assert frames[-1] < num_frames
    if num_frames >= 50 and policy != "all":
        assert chosen[0] != chosen[2]


@pytest.mark.parametrize(("policy", "counts"), [("uniform", {8, 9, 10, 11, 12}), ("random", {8, 9, 10, 11, 12})])
def test_how_many(policy, counts):
    rng = np.random.default_rng(0)
    assert {len(training_frames(policy, 40, rng)) for _ in range(100)} == counts
    assert len(training_frames(policy, 40, rng, sample_range=(5, 5))) == 5


def test_flex_takes_whole_clips():
    rng = np.random.default_rng(0)
    assert len(training_frames("flex", 150, rng)) == 64
    assert len(training_frames("flex", 150, rng, max_frames=32)) == 32
    assert len(training_frames("flex", 39, rng)) == 36
    assert training_frames("flex", 3, rng, sample_range=(1, 1)) == [0, 1, 2]


def test_uniform_takes_one_of_each_interval():
    for seed in range(20):
        frames = training_frames("uniform", 40, np.random.default_rng(seed), sample_range=(8, 8))
        assert [frame // 5 for frame in frames] == list(range(8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("some", 10), "unknown frame policy"),
        (("uniform", 0), "at least one"),
        (("uniform", 10), "random generator"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        training_frames(*arguments)


@pytest.mark.parametrize("options", [{"sample_range": (0, 3)}, {"sample_range": (9, 8)}, {"max_frames": 3}])
def test_bad_limits(options):
    with pytest.raises(UserError):
        training_frames("flex", 10, np.random.default_rng(0), **options)
