"""A stream of frames: goes on from its state, reads nothing before it must, and leaves nothing behind."""

import dataclasses
import gc
import os
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.network import CFG
from helpers.segmenting import CAR, CAT, DOG, video
from virst_jax.errors import UserError
from virst_jax.inference import resume, stream
from virst_jax.inference.steps import Network
from virst_jax.io.video import Reader, VideoWriter


def test_stream_goes_on_from_its_state(model, three):
    stream = model.segment_stream(video(11), [DOG, CAT, CAR])
    first = [next(stream) for _ in range(5)]
    state = stream.state()
    stream.close()
    assert [frame.index for frame in first] == [0, 1, 2, 3, 4]
    assert state["next"] == 4
    state = {key: np.array(value) for key, value in state.items()}
    assert {value.dtype.kind for value in state.values()} <= set("iufb")  # what .npz files keep
    rest = list(model.segment_stream(video(11), [DOG, CAT, CAR], state=state))
    assert [frame.index for frame in rest] == list(range(4, 11))
    for frame in [*first, *rest]:
        np.testing.assert_array_equal(frame.masks, three.masks[:, frame.index])
        np.testing.assert_array_equal(frame.scores, three.scores[:, frame.index])


def test_states_of_before_load(model, three):
    stream = model.segment_stream(video(11), [DOG, CAT, CAR])
    for _ in range(5):
        next(stream)
    before = {key.replace(".bank.", ".recent."): value for key, value in stream.state().items()}
    stream.close()
    assert "0.recent.0" in before
    for frame in model.segment_stream(video(11), [DOG, CAT, CAR], state=before):
        np.testing.assert_array_equal(frame.masks, three.masks[:, frame.index])


def test_a_stream_that_did_nothing_has_a_state(model, three):
    stream = model.segment_stream(video(11), [DOG, CAT, CAR])
    state = stream.state()
    assert set(state) == {"next"}
    frame = next(model.segment_stream(video(11), [DOG, CAT, CAR], state=state))
    np.testing.assert_array_equal(frame.masks, three.masks[:, 0])


def test_damaged_states(model):
    stream = model.segment_stream(video(5), [DOG, CAT])
    for _ in range(3):
        next(stream)
    good = stream.state()
    stream.close()
    low = next(key for key in good if key.endswith(".bfloat16"))
    changes: list[dict[str, Any]] = [
        {key: None} for key in good if key != "0.count"
    ]  # without its count a batch is not there
    changes += [
        {"next": np.array(-1)},
        {"next": np.array([3, 4])},
        {"next": np.array(2.5)},
        {"0.count": None},
        {"0.count": np.array(0)},
        {"0.count": np.array(1)},
        {"0.count": np.array(9)},
        {"0.anchors.4": np.zeros(3, np.float32)},
        {"0.anchors.4": good["0.anchors.4"].astype(np.float64)},
        {"0.bank.0": good["0.bank.0"][:-1]},
        {low: good[low].astype(np.float32)},
        {low: good[low][..., :-1]},
    ]
    for change in changes:
        state = {key: value for key, value in {**good, **change}.items() if value is not None}
        with pytest.raises(UserError, match="the saved state of the tracker does not fit"):
            model.segment_stream(video(5), [DOG, CAT], state=state)
    with pytest.raises(UserError, match="does not fit"):
        model.segment_stream(video(5), DOG, state=good)
    with pytest.raises(UserError, match="does not fit"):
        resume.unpack(good, Network(dataclasses.replace(CFG, max_seg_frames=4), None).steps, 2)


def test_a_closed_stream_ends_its_thread(model):
    before = threading.active_count()
    with model.segment_stream(video(200, 8, 8), DOG) as stream:
        next(stream)
    assert threading.active_count() == before


def open_things() -> tuple[int, int]:
    """Threads of this process, also those of FFmpeg, and open files."""
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts in /proc")
def test_a_loop_that_is_left_leaks_nothing(model, tmp_path):
    file = tmp_path / "clip.mp4"
    with VideoWriter(file, (48, 64), 25) as writer:
        for frame in video(40, 48, 64):
            writer.write(frame)
    for _ in range(2):  # what stays for good, such as pools of threads, is there after the first
        for _ in model.segment_stream(file, DOG):
            break
    gc.collect()
    gc.disable()  # at once, not some time later
    try:
        before = open_things()
        for _ in range(3):
            for frame in model.segment_stream(file, DOG):
                if frame.index == 2:
                    break
        stream = model.segment_stream(file, DOG)
        next(stream)
        del stream
        threads, files = open_things()
        assert threads <= before[0]  # a pool of before may have ended meanwhile
        assert files <= before[1]
    finally:
        gc.enable()


def test_making_a_stream_reads_nothing(model):
    class Untouched(Reader):
        name, size = "untouched", (8, 8)

        @property
        def num_frames(self) -> int:
            raise AssertionError("the video was read")

        frame_names = num_frames

        def pick(self, indices: Any) -> Any:
            raise AssertionError("the video was read")

    stream = model.segment_stream(Untouched(), DOG, progress=lambda *call: calls.append(call))
    calls: list[Any] = []
    assert repr(stream) == "SegmentationStream('untouched', expressions=['the dog'])"
    with pytest.raises(UserError, match="the expression is empty"):
        model.segment_stream(Untouched(), "")
    with pytest.raises(AssertionError, match="the video was read"):
        next(stream)
    assert calls == [("decode", 0, 0)]


def test_prepare_does_what_comes_first(model, three):
    stream = model.segment_stream(video(11), [DOG, CAT, CAR])
    stream.prepare()
    assert stream.timings["sample"] > 0
    assert stream.timings["track"] == 0
    np.testing.assert_array_equal(next(stream).masks, three.masks[:, 0])


def test_interleaved_streams(model, three):
    """Each hears of its own progress alone, and none is kept alive by the network."""
    calls: dict[str, set[int]] = {"a": set(), "b": set()}

    def listen(name: str) -> Any:
        return lambda stage, done, total: calls[name].add(total) if stage == "track" else None

    a = model.segment_stream(video(11), [DOG, CAT, CAR], progress=listen("a"))
    b = model.segment_stream(video(6), [DOG], progress=listen("b"))
    for frame in a:
        np.testing.assert_array_equal(frame.masks, three.masks[:, frame.index])
        next(b, None)
    assert calls == {"a": {11}, "b": {6}}
    gone = weakref.ref(a)
    del a
    assert gone() is None


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_not_called_nothing_found(model, monkeypatch, value):
    def propagated(*args, **kwargs):
        scores = np.zeros((1, 2), np.float32)
        yield stream.Chunk(0, np.zeros((1, 2, 40, 56), bool), scores, ())
        yield stream.Chunk(2, np.zeros((1, 2, 40, 56), bool), scores + np.array([0, value], np.float32), ())

    monkeypatch.setattr(stream, "propagate", propagated)
    monkeypatch.setattr(stream.Run, "prepare", lambda self: None)
    found = []
    with pytest.raises(UserError, match="the network gives no numbers for frame 3"):
        found.extend(model.segment_stream(video(4), DOG))
    assert [frame.index for frame in found] == [0, 1]
