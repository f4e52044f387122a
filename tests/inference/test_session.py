"""Sessions: sentences, clicks and masks on the small network; what they compute is compared in tests/torch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from helpers.segmenting import CAT, DOG, video
from virst_jax.api import Model, Segmentation
from virst_jax.errors import UserError
from virst_jax.inference.prompts import Clicks, check_clicks, mask_for_network
from virst_jax.inference.text_session import TextSession

COUNT, HEIGHT, WIDTH = 11, 40, 56


@pytest.fixture(scope="module")
def told(model: Model) -> TextSession:
    """Two sentences, tracked through the video that `three` has segmented."""
    session = model.session(video(COUNT))
    assert session.add_text([DOG, CAT]) == (1, 2)
    list(session.propagate())
    return session


def shown(session: TextSession) -> np.ndarray:
    """All masks, bool[N, T, H, W]."""
    return np.stack([session.masks(frame).masks for frame in range(session.num_frames)], axis=1)


def test_a_sentence_gives_the_masks_of_segment(told: TextSession, three: Segmentation) -> None:
    assert told.object_ids == (1, 2)
    assert told.labels == {1: three.expressions[0], 2: three.expressions[1]}
    assert set(told.anchors[1]) == set(three.plan.anchor_frames)
    assert 0.01 < three.masks[:2].mean() < 0.99
    # the values are sums in another order, and a pixel at the edge may fall on either side
    assert (shown(told) != three.masks[:2]).mean() < 1e-3
    scores = np.stack([told.masks(frame).scores for frame in range(COUNT)], axis=1)
    np.testing.assert_allclose(scores, three.scores[:2], rtol=1e-3, atol=1e-3)


def test_frames_are_encoded_once(told: TextSession) -> None:
    # the sampled ones when the sentences were read, the others while tracking
    assert sorted(told.features.kept) == list(range(COUNT))
    assert told.features.num_encoded < COUNT
    states = told._objects.values()
    kept = {id(x): x.num_bytes for state in states for x in (*state.anchors.values(), *state.tracked.values())}
    assert told.num_bytes == sum(kept.values()) > 0
    assert told.num_bytes_on_disk == 0


def test_a_correction_and_undo(told: TextSession) -> None:
    before, anchors = shown(told), told.anchors[2]
    frame = next(i for i in range(COUNT) if i not in anchors)
    corrected = told.add_points(2, frame, [(20, 30), (3, 3)], [1, 0])
    assert told.anchors[2] == tuple(sorted((*anchors, frame)))  # those of the sentence stay
    assert (corrected.of(2) != before[1, frame]).any()
    assert (corrected.of(1) == before[0, frame]).all()
    refined = told.add_points(2, frame, [(50, 5)], [0], replace=False)
    prompt = told.prompts(2)[frame]
    assert isinstance(prompt, Clicks)
    assert prompt.labels.tolist() == [1, 0, 0]
    assert (refined.of(2) != corrected.of(2)).any()
    told.undo()
    told.undo()
    assert told.anchors[2] == anchors
    assert (shown(told) == before).all()


def test_what_a_correction_sees(told: TextSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """The anchors there were when tracking began last, and the mask so far: no earlier try on its own frame."""
    frame = next(i for i in range(COUNT) if i not in told.anchors[1])
    kept, seen = told.network.prompt_objects, []

    def spy(features: Any, tokens: Any, mask: Any, has_mask: bool, past: Any = None) -> Any:
        frames = set() if past is None else set(np.asarray(past[0].frames)[np.asarray(past[0].valid)].tolist())
        seen.append((frames, np.array(mask), has_mask))
        return kept(features, tokens, mask, has_mask, past)

    monkeypatch.setattr(told.network, "prompt_objects", spy)
    before = told.logits(1, frame)
    told.add_points(1, frame, [(20, 30)])
    first = told.logits(1, frame)
    told.add_points(1, frame, [(3, 3)], [0], replace=False)
    assert [frames for frames, _, _ in seen] == [set(told.anchors[1]) - {frame}] * 2
    assert all(has_mask for _, _, has_mask in seen)
    assert (seen[0][1] == before).all()
    assert (seen[1][1] == first).all()
    # before tracking has passed it, the anchor can be taken back without a trace
    told.clear(1, frame)
    assert (told.logits(1, frame) == before).all()
    for _ in range(3):
        told.undo()


def test_objects_are_removed_cleared_and_brought_back(told: TextSession) -> None:
    before, frame = shown(told), told.anchors[1][0]
    told.clear(1, frame)
    assert frame not in told.anchors[1]
    assert (told.masks(frame).of(1) == before[0, frame]).all()
    told.undo()
    told.remove(1)
    assert told.object_ids == (2,)
    assert told.masks(0).masks.shape == (1, HEIGHT, WIDTH)
    told.reset()
    assert told.object_ids == ()
    assert told.masks(0).masks.shape == (0, HEIGHT, WIDTH)
    told.undo()
    told.undo()
    assert told.object_ids == (1, 2)
    assert (shown(told) == before).all()


def test_what_was_tracked_is_kept_when_a_loop_is_left(told: TextSession) -> None:
    before, undo = shown(told), told.num_undo
    frames = told.propagate(4, direction="backward", first=1)
    assert next(frames).index == 4
    with pytest.raises(UserError, match="being tracked"):
        told.add_points(1, 0, [(1, 1)])
    with pytest.raises(UserError, match="being tracked"):
        told.undo()
    frames.close()
    assert told.num_undo == undo + 1
    told.undo()
    assert (shown(told) == before).all()


def test_order_of_frames(told: TextSession) -> None:
    for arguments, expected in (
        ({"start": 9}, [9, 10, 8]),
        ({"start": 9, "direction": "forward"}, [9, 10]),
        ({"start": 9, "direction": "backward"}, [9, 8]),
    ):
        assert [out.index for out in told.propagate(**arguments, first=8)] == expected  # type: ignore[arg-type]
        told.undo()


def test_exclusive_masks_do_not_overlap(model: Model, told: TextSession) -> None:
    assert told.masks(3).masks.all(0).any()
    told.exclusive = True
    parts = told.masks(3).masks
    told.exclusive = False
    assert not parts.all(0).any()
    assert (parts.any(0) == told.masks(3).masks.any(0)).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.add_points(1, 11, [(1, 1)]), "no frame 11; the video has frames 0 to 10"),
        (lambda s: s.add_points(1, -1, [(1, 1)]), "no frame -1"),
        (lambda s: s.add_points(1, 1.5, [(1, 1)]), "frame is 1.5"),
        (lambda s: s.add_points(0, 0, [(1, 1)]), "numbered from 1"),
        (lambda s: s.add_points(1, 0, [(56, 1)]), r"\(56, 1\) lies outside of the frame of 56x40"),
        (lambda s: s.add_points(1, 0, [(3, -1)]), "outside"),
        (lambda s: s.add_points(1, 0, [(3, float("nan"))]), "finite"),
        (lambda s: s.add_points(1, 0, [1, 2, 3]), "shape"),
        (lambda s: s.add_points(1, 0, "here"), "points are here"),
        (lambda s: s.add_points(1, 0, [(1, 1)], [2]), "labels are"),
        (lambda s: s.add_points(1, 0, [(1, 1)], [1, 0]), "2 labels were given for 1 points"),
        (lambda s: s.add_points(1, 0), "no prompt"),
        (lambda s: s.add_points(1, 0, []), "no point"),
        (lambda s: s.add_points(1, 0, box=(30, 5, 20, 10)), "has no area"),
        (lambda s: s.add_points(1, 0, box=(30, 5, 57, 10)), "leaves the frame"),
        (lambda s: s.add_points(1, 0, box=(30, 5)), "a box has the shape"),
        (lambda s: s.add_mask(1, 0, np.zeros((56, 40), bool)), "40x56 pixels, the video 56x40"),
        (lambda s: s.add_mask(1, 0, np.zeros((40, 56, 3))), "give bool"),
        (lambda s: s.clear(1, 1), "no prompt on frame 1"),
        (lambda s: s.remove(9), "no object 9; there are 1, 2"),
        (lambda s: s.prompts(9), "no object 9"),
        (lambda s: s.add_text("a dog", object_ids=[2]), "object 2 is there already"),
        (lambda s: s.add_text(["a dog", "a cat"], object_ids=[7, 7]), "2 different numbers"),
        (lambda s: s.add_text(""), "empty"),
        (lambda s: s.propagate(direction="up"), "direction"),
        (lambda s: s.propagate(4, first=5), "not among frames 5 to 10"),
        (lambda s: s.propagate(last=11), "no frame 11"),
    ],
)
def test_bad_input_changes_nothing(told: TextSession, call: Callable[[Any], Any], message: str) -> None:
    before, undo = {k: (dict(v.prompts), dict(v.tracked)) for k, v in told._objects.items()}, told.num_undo
    with pytest.raises(UserError, match=message):
        call(told)
    assert {k: (v.prompts, v.tracked) for k, v in told._objects.items()} == before
    assert told.num_undo == undo


def test_nothing_to_track(model: Model) -> None:
    session = model.session(video(3))
    with pytest.raises(UserError, match="no object to track"):
        session.propagate()
    with pytest.raises(UserError, match="nothing to undo"):
        session.undo()


def test_clicks_as_the_network_reads_them() -> None:
    """A box comes first as its corners; coordinates are scaled to the network's square; what is behind is padding."""
    clicks = check_clicks((40, 80), [(10, 20), (40, 10)], [1, 0], (20, 10, 40, 30))
    tokens = clicks.tokens((40, 80), 128)
    assert tokens.coords.shape == (1, 4, 2)
    assert tokens.count.tolist() == [4]
    assert tokens.coords[0].tolist() == [[32, 32], [64, 96], [16, 64], [64, 32]]
    assert tokens.labels[0].tolist() == [2, 3, 1, 0]
    more = check_clicks((40, 80), [(1, 1)], None, None).after(clicks).tokens((40, 80), 128)
    assert more.labels.shape == (1, 8)
    assert more.count.tolist() == [5]


def test_a_mask_at_the_networks_size() -> None:
    mask = np.zeros((40, 80), bool)
    mask[10:20, 20:60] = True
    scaled = mask_for_network(mask, 160)
    assert scaled.shape == (1, 160, 160)
    assert set(np.unique(scaled)) == {0, 1}
    # twice as wide, four times as high; half of a pixel's edge may fall on either side
    assert abs(scaled.mean() - mask.mean()) < 0.01
    assert (mask_for_network(mask[:, :40], 40)[0] == mask[:, :40]).all()


def test_nothing_is_compiled_for_another_video_or_number(model: Model, told: TextSession) -> None:
    """Buckets of clicks, objects and anchors that were there before; `told` has had those of its first prompts."""

    def use(count: int, height: int, width: int, clicks: int, objects: int) -> None:
        session = model.session(video(count, height, width))
        for object_id in range(1, objects + 1):
            points = [(3 + i, 5) for i in range(clicks)]
            session.add_points(object_id, min(object_id, count - 1), points)
        assert len(list(session.propagate())) == count

    for objects in (1, 2):
        use(4, 40, 56, 1, objects)
    before = model.network.num_compiled
    for seed in range(6):
        rng = np.random.default_rng(seed)
        height, width = (int(x) for x in rng.integers(16, 300, 2))
        use(int(rng.integers(2, 9)), height, width, int(rng.integers(1, 5)), int(rng.integers(1, 3)))
    assert model.network.num_compiled == before
