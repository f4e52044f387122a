"""Fifty videos of other lengths and sizes, with changing numbers of objects and clicks: XLA compiles nothing."""

from collections.abc import Iterable, Iterator

import jax
import numpy as np
import pytest

from helpers.network import CFG, params
from helpers.places import TOKENIZER
from helpers.segmenting import CAR, CAT, DOG, video
from virst_jax.api import Model
from virst_jax.data.prompts import load_tokenizer
from virst_jax.tracking import TrackerModel

VIDEOS = 50
MOST_CLICKS, MOST_OBJECTS = 8, 4


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """What XLA is asked to compile: the steps, and whatever is computed outside of them."""
    seen: list[str] = []

    def listen(event: str, duration: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def use(
    tracker: TrackerModel, size: tuple[int, int, int], prompts: list[int], corrected: Iterable[int], seed: int
) -> None:
    """One session: objects with so many clicks (0: a box, -1: a mask) on frame 1, tracked both ways, then corrected on
    the frames `corrected`, and tracked again."""
    count, height, width = size
    rng = np.random.default_rng(seed)
    session = tracker.session(video(count, height, width))

    def points(clicks: int) -> np.ndarray:
        return rng.random((clicks, 2)) * (width - 1, height - 1)

    for object_id, clicks in enumerate(prompts, 1):
        if clicks < 0:
            session.add_mask(object_id, 1, rng.random((height, width)) > 0.5)
        elif clicks:
            session.add_points(object_id, 1, points(clicks), rng.integers(0, 2, clicks))
        else:
            session.add_points(object_id, 1, points(2), box=(1, 1, width - 1, height - 1))
    assert len(list(session.propagate())) == count
    for frame in corrected:
        for object_id in range(1, len(prompts) + 1):
            session.add_points(object_id, frame, points(1), [0])
    assert len(list(session.propagate(0, direction="forward"))) == count
    session.undo()
    session.masks(0)


@pytest.mark.heavy
def test_fifty_videos_compile_nothing(compilations: list[str]) -> None:
    tracker = TrackerModel(CFG.sam2, params()["sam2"], group_size=8)
    # once each: buckets of 4 and 8 clicks, with and without memory; 1, 2 and 4 objects with 1 and 2 anchors each
    for prompts in ([8], [1, 0], [1, -1, 8]):
        use(tracker, (6, 40, 56), prompts, [0], 0)
    used, warm = tracker.network.num_compiled, len(compilations)
    assert warm >= used > 10
    rng = np.random.default_rng(1)
    for seed in range(VIDEOS):
        size = (int(rng.integers(2, 12)), int(rng.integers(16, 500)), int(rng.integers(16, 500)))
        prompts = rng.integers(-1, MOST_CLICKS + 1, rng.integers(1, MOST_OBJECTS + 1)).tolist()
        use(tracker, size, prompts, rng.integers(0, size[0], 1).tolist(), seed)
    assert tracker.network.num_compiled == used
    assert len(compilations) == warm


def test_more_sentences_compile_nothing_on_a_cpu(compilations: list[str]) -> None:
    """They run through what one sentence compiles; in groups, every power of two would be compiled."""
    model = Model(CFG, params(), load_tokenizer(TOKENIZER, CFG.seg_token_id))
    alone = [model.segment(video(5), sentence) for sentence in (DOG, CAT, CAR)]
    warm = len(compilations)
    together = model.segment(video(5), [DOG, CAT, CAR])
    assert 0 < warm == len(compilations)
    assert (together.masks == np.concatenate([one.masks for one in alone])).all()
    np.testing.assert_array_equal(together.scores, np.concatenate([one.scores for one in alone]))
