"""Instances: parts of masks, which of them belong together, and objects with numbers of their own."""

import json

import numpy as np
import pytest

import virst_jax
from helpers.segmenting import CAT, DOG, video
from virst_jax.commands.progress import Progress
from virst_jax.commands.segment import report
from virst_jax.commands.segment_run import SegmentRun, claimed
from virst_jax.data.synthetic.videos import SyntheticVideos
from virst_jax.errors import UserError
from virst_jax.inference import instances as finding
from virst_jax.inference.instances import assign, components, merge
from virst_jax.inference.objects import ObjectState, groups_of
from virst_jax.io.video import open_video


def box(x0, y0, x1, y1, size=(40, 60)):
    mask = np.zeros(size, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def test_components():
    a, b, corner, speck = box(2, 2, 12, 12), box(30, 5, 36, 9), box(12, 12, 14, 14), box(50, 30, 51, 31)
    parts = components(a | b | corner | speck)  # a corner connects, a speck is none
    np.testing.assert_array_equal(parts, np.stack([a | corner, b]))
    assert components(np.zeros((40, 60), bool)).shape == (0, 40, 60)
    crowd = np.ones((90, 90), bool)
    crowd[5::6] = crowd[:, 5::6] = False  # 225 boxes
    assert len(components(crowd)) == finding.MOST


def test_components_find_their_instances():
    left, right = box(0, 0, 10, 10), box(30, 0, 40, 10)
    moved = np.stack([box(31, 1, 41, 11), box(1, 0, 11, 10), box(20, 30, 30, 40)])
    assert assign(np.stack([left, right]), moved) == [1, 0, -1]
    assert assign(np.zeros((0, 40, 60), bool), moved) == [-1] * 3
    # two that touch now: their component belongs to neither, and is no new one
    touching = box(0, 0, 20, 10)
    assert assign(np.stack([left, box(10, 0, 20, 10)]), touching[None]) in ([None], [0], [1])
    assert assign(np.stack([left, box(10, 0, 20, 10), right]), box(0, 0, 40, 12)[None]) == [None]
    assert assign(np.zeros((2, 40, 60), bool), touching[None]) == [-1]  # both are hidden here


def test_instances_in_one_place_become_one():
    def state(*frames):
        return ObjectState(0, "", anchors=dict.fromkeys(frames))

    place, other = box(0, 0, 10, 10), box(30, 0, 40, 10)
    states, known = merge([state(3), state(9), state(5)], np.stack([place, place, other]))
    assert [sorted(s.anchors) for s in states] == [[3, 9], [5]]
    np.testing.assert_array_equal(known, np.stack([place, other]))
    # seen apart on frame 3: they stay two, whatever is predicted
    states, _ = merge([state(3), state(3, 9)], np.stack([place, place]))
    assert len(states) == 2
    # hidden ones are not in one place
    assert len(merge([state(3), state(9)], np.zeros((2, 40, 60), bool))[0]) == 2


def test_groups():
    states = [ObjectState(i, "") for i in range(1, 12)]
    groups = groups_of(states, 4)
    assert [len(group) for group, _ in groups] == [4, 4, 4]
    assert [count for _, count in groups] == [4, 4, 3]


@pytest.fixture
def everything(monkeypatch):
    """Random networks give masks in many pieces; these are two boxes on every anchor."""
    monkeypatch.setattr(
        finding, "components", lambda mask: np.stack([box(2, 2, 20, 30, mask.shape), box(40, 5, 50, 20, mask.shape)])
    )
    monkeypatch.setattr(finding, "assign", lambda known, parts: [0, 1] if len(known) else [-1, -1])


def test_each_instance_is_an_object(model, everything):
    frames = video(11)
    result = model.segment(frames, [DOG, CAT], instances=True)
    assert result.ids == (1, 2, 3, 4)
    assert result.expressions == (DOG, DOG, "a red cat that runs", "a red cat that runs")
    assert result.masks.shape == (4, 11, *frames.shape[1:3])
    assert result.scores.shape == (4, 11)
    plain = model.segment(frames, [DOG, CAT])
    assert result.plan == plain.plan
    for frame in plain.anchors:
        # the masks that were given, as far as the side of the tracker's masks (32) shows them
        for mask, given in zip(result.masks[:2, frame], (box(2, 2, 20, 30, (40, 56)), box(40, 5, 50, 20, (40, 56)))):
            assert (mask & given).sum() / (mask | given).sum() > 0.75
    assert [x["track_id"] for x in result.to_coco()["annotations"] if x["image_id"] == plain.anchors[0] + 1] == [
        1,
        2,
        3,
        4,
    ]
    stream = model.segment_stream(frames, DOG, instances=True)
    stream.prepare()
    assert stream.anchors_of == {1: plain.anchors, 2: plain.anchors}
    stream.close()
    # chunks do not matter
    model.chunk, chunk = 3, model.chunk
    try:
        np.testing.assert_array_equal(model.segment(frames, [DOG, CAT], instances=True).masks, result.masks)
    finally:
        model.chunk = chunk


def test_nothing_is_found(model, monkeypatch):
    monkeypatch.setattr(finding, "components", lambda mask: np.zeros((0, *mask.shape), bool))
    result = model.segment(video(5), [DOG, CAT], instances=True)
    assert result.ids == ()
    assert result.masks.shape == (0, 5, 40, 56)
    assert result.to_coco()["annotations"] == []
    assert "masks=bool[0, 5, 40, 56]" in repr(result)
    with pytest.raises(UserError, match="cannot be tracked on from a saved state"):
        model.segment_stream(video(5), DOG, instances=True, state={})


@pytest.mark.parametrize("found", [True, False])
def test_a_run_writes_a_folder_for_each(model, everything, monkeypatch, tmp_path, capsys, found):
    import argparse

    if not found:
        monkeypatch.setattr(finding, "components", lambda mask: np.zeros((0, *mask.shape), bool))
    out = tmp_path / "out"
    with claimed(out):
        job = SegmentRun(
            model, open_video(video(6)), [DOG, CAT], out, source={}, progress=Progress(quiet=True), instances=True
        )
        result = job.run()
    folders = sorted(path.name for path in out.iterdir() if path.is_dir() and path.name != ".virst")
    told = json.loads((out / "result.json").read_text())
    assert told["sentences"] == [DOG, "a red cat that runs"]
    report(argparse.Namespace(out=out, json=False, quiet=True), result)
    printed = capsys.readouterr().out
    if not found:
        assert folders == told["objects"] == told["expressions"] == []
        assert f"'{DOG}': not found" in printed
    else:
        assert folders == ["01-the-dog", "02-the-dog", "03-a-red-cat-that-runs", "04-a-red-cat-that-runs"]
        assert [x["object_id"] for x in told["objects"]] == [1, 2, 3, 4]
        assert f"'{DOG}' (2): found in" in printed
        from virst_jax.io.result_folder import mask_set, read_result

        masks = mask_set(read_result(out))
        assert masks.object_ids == [1, 2, 3, 4]
        assert masks.labels[0] == DOG
    assert open_video(out / "overlay.mp4").num_frames == 6


@pytest.mark.heavy
def test_the_small_model_tells_squares_apart():
    """Three squares of a synthetic video: each is one object through all frames."""
    source = SyntheticVideos(40, 10**6, expressions=4, num_frames=24)
    sample = source[12]
    (position,) = (i for i, expression in enumerate(sample.expressions) if expression.text == "the squares")
    labels, meant = sample.read_objects(range(24)), sample.read_masks(position, range(24))
    squares = sorted(set(np.unique(labels[meant])) - {0})
    result = virst_jax.load("tiny").segment(sample.read_frames(range(24)), "the squares", instances=True)
    assert len(result.ids) == len(squares) == 3
    ious = [[(m & (labels == k)).sum() / (m | (labels == k)).sum() for k in squares] for m in result.masks]
    assert sorted(int(np.argmax(row)) for row in ious) == [0, 1, 2]
    assert min(max(row) for row in ious) > 0.8
