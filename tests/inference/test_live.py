"""Frames that come one by one: what is computed, what is dropped, and how a stream ends."""

import functools
import http.server
import math
import threading
import time

import numpy as np
import pytest

from helpers.segmenting import CAT, DOG, video
from virst_jax.errors import UserError
from virst_jax.inference.live import Latencies, LiveOptions, window_plan
from virst_jax.inference.plan import Options
from virst_jax.inference.reading import anchor_positions, read_expressions
from virst_jax.inference.survey import say_nothing
from virst_jax.io.live_source import FrameQueue, LiveSource

COUNT = 9


@pytest.fixture(scope="module")
def frames():
    return video(COUNT)


@pytest.fixture(scope="module")
def live(model, frames):
    with model.live(iter(frames), [DOG, CAT], every=4, window=8) as stream:
        return list(stream), stream.stats


def test_every_frame_comes_in_order(live, frames):
    found, stats = live
    assert [frame.index for frame in found] == list(range(COUNT))
    assert [frame.is_reading for frame in found] == [i % 4 == 0 for i in range(COUNT)]
    assert all(np.array_equal(frame.image, image) for frame, image in zip(found, frames))
    assert all(frame.masks.shape == (2, *frames.shape[1:3]) and frame.masks.dtype == bool for frame in found)
    assert (stats.frames, stats.dropped, stats.readings) == (COUNT, 0, 3)
    assert 0 < stats.p50 <= stats.p95 <= stats.longest
    assert "9 frames" in str(stats)
    assert "latency" in repr(found[0])


def test_it_computes_what_the_steps_compute(model, live, frames):
    """The frames before the second reading, by hand: one reading of frame 0, then tracking."""
    network, cfg, found = model.network, model.cfg, live[0]
    from virst_jax.data.transforms import resize_frames

    plan, chosen = window_plan(cfg, [0])
    assert set(chosen) == {0}
    seen = resize_frames(frames[:1], cfg.vision.image_size, "bicubic")
    clips = np.repeat(seen, cfg.max_video_frames, 0)
    clips = clips.reshape(-1, cfg.vision.clip_frames, *clips.shape[1:])
    features = [network.encode_batch(resize_frames(f[None], cfg.sam2.image_size, "bicubic"), 1)[0] for f in frames[:4]]
    visual, maps = network.encode_visual(clips, len(clips)), [features[0].top] * len(plan.segmentation)
    options = Options(group_size=2)
    texts = tuple(text.lower() for text in (DOG, " ".join(CAT.split())))
    ((count, prompt),) = read_expressions(
        network, model.tokenizer, texts, options, visual, len(clips), maps, anchor_positions(cfg, plan), say_nothing
    )
    anchors = plan.anchor_frames
    batch = network.start([features[0]] * len(anchors), anchors, prompt, cfg.max_anchors, count)
    out = network.advance(batch, features, 0, 1 << 20, 4)
    scores = np.asarray(out.prediction.object_score)
    for i in range(4):
        # other chunks, the same sums
        np.testing.assert_allclose(found[i].scores, scores[i], rtol=0, atol=1e-5)


def test_a_window():
    from helpers.network import CFG

    plan, chosen = window_plan(CFG, [0])
    assert plan.sampled == (0,) * 8
    plan, chosen = window_plan(CFG, [0, 3, 6])
    assert plan.sampled == (0, 0, 3, 3, 3, 6, 6, 6)
    plan, chosen = window_plan(CFG, list(range(10, 18)))
    assert plan.sampled == plan.segmentation == tuple(range(10, 18))
    assert plan.anchor_frames[-1] == 17  # the newest
    assert chosen == list(range(8))


def test_nothing_is_compiled_for_another_window_size_or_length(model, frames):
    with model.live(list(frames)[:3], [DOG, CAT], every=2) as stream:
        assert len(list(stream)) == 3
    before = model.network.num_compiled
    for count, size, every in ((5, (30, 70), 1), (12, (64, 33), 3), (4, (40, 56), 7)):
        with model.live(list(video(count, *size)), [CAT, DOG], every=every, window=9) as stream:
            assert len(list(stream)) == count
    assert model.network.num_compiled == before


class Slow:
    """Takes the place of what is computed."""

    def __init__(self, seconds):
        self.seconds, self.readings, self.network = seconds, 0, None

    def advance(self, image):
        time.sleep(self.seconds)
        return np.zeros((1, *image.shape[:2]), bool), np.zeros(1, np.float32), False


def timed(frames, seconds):
    for frame in frames:
        time.sleep(seconds)
        yield frame


@pytest.mark.parametrize("late", ["drop", "block"])
def test_frames_that_come_too_fast(model, late):
    with model.live(timed(video(40), 0.005), DOG, late=late, room=2) as stream:
        stream._tracking = Slow(0.02)
        found = list(stream)
    stats = stream.stats
    assert stats.frames == len(found)
    assert stats.frames + stats.dropped == 40
    assert sum(frame.dropped for frame in found) == stats.dropped
    assert [frame.index for frame in found] == sorted({frame.index for frame in found})
    assert found[-1].index == 39  # the newest is never left out
    if late == "block":
        assert stats.dropped == 0
    else:
        assert stats.dropped > 10
        # two wait while one is computed
        assert max(frame.latency for frame in found) < 0.3


def test_a_source_that_breaks_off_gives_what_came_before(model, frames):
    def source():
        yield from frames[:3]
        raise UserError("the camera is gone")

    with model.live(source(), DOG) as stream:
        assert [next(stream).index for _ in range(3)] == [0, 1, 2]
        with pytest.raises(UserError, match="the camera is gone"):
            next(stream)


def test_it_can_be_stopped_while_it_waits(model):
    release = threading.Event()

    def silent():
        yield video(1)[0]
        release.wait(30)

    with model.live(silent(), DOG) as stream:
        assert next(stream).index == 0
        threading.Timer(0.3, stream.stop).start()
        begin = time.monotonic()
        assert list(stream) == []
        assert time.monotonic() - begin < 10
        release.set()
    assert list(stream) == []


def test_frames_of_another_size_are_resized(model):
    source = [video(1, 40, 56)[0], video(1, 20, 28)[0]]
    with model.live(source, DOG) as stream:
        assert [frame.image.shape for frame in stream] == [(40, 56, 3)] * 2


def test_memory_is_flat(model):
    """Nothing that a stream holds grows with the frames that have passed."""
    with model.live(iter(video(200, 16, 16)), DOG, every=50, window=8) as stream:
        sizes = []
        for frame in stream:
            if frame.index in (60, 199):
                sizes.append(held(stream._tracking))
    assert sizes[0] == sizes[1]


def held(tracking) -> int:
    import jax

    kept = [(x.pixels, x.features) for x in tracking._window]
    return sum(leaf.nbytes for leaf in jax.tree.leaves([kept, [(b.anchors, b.bank) for b in tracking._batches]]))


def test_percentiles():
    latencies = Latencies()
    assert math.isnan(latencies.percentile(0.5))
    values = np.random.default_rng(0).lognormal(-3, 1, 5000)
    for value in values:
        latencies.add(float(value))
    for share in (0.05, 0.5, 0.95):
        # bins are 1 % wide
        assert latencies.percentile(share) == pytest.approx(np.quantile(values, share), rel=0.02)
    assert latencies.percentile(1) == pytest.approx(values.max())
    latencies.add(1e9)
    latencies.add(0.0)


@pytest.mark.parametrize(
    "bad", [{"every": 0}, {"room": True}, {"window": -1}, {"late": "sometimes"}, {"every": 1.5}, {"seed": -1}]
)
def test_bad_settings(model, bad):
    with pytest.raises(UserError):
        model.live([], DOG, **bad)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/dev/video77", "no such camera; there is none"),
        ("none.mp4", "no such file"),
        (5, "frames cannot be read from int"),
        ("rtsp://127.0.0.1:9/x", "cannot be opened .*Connection refused"),
        (["none.png"], "none.png: no such file"),
    ],
)
def test_bad_sources_take_one_line(source, message, monkeypatch):
    monkeypatch.setattr("glob.glob", lambda pattern: [])
    with pytest.raises(UserError, match=message) as error:
        list(LiveSource(source))
    assert len(str(error.value).splitlines()) == 1


def test_the_options_default_by_the_source():
    assert LiveOptions().late is None
    queue = FrameQueue(LiveSource(list(video(6, 16, 16))), 2, drop=False)
    assert [queue.get().index for _ in range(6)] == list(range(6))
    assert queue.get() is None
    queue.close()


def write_film(path, count: int) -> None:
    import av

    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuvj420p"
        for number in range(count):
            image = np.full((32, 48, 3), 20 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def test_an_address_is_read_without_a_file(tmp_path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *given):
            pass

    write_film(tmp_path / "film.mkv", 9)
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            source = LiveSource(f"{address}/film.mkv")
            assert source.is_paced  # it would drop frames, not wait
            assert source.fps == pytest.approx(25)
            frames = list(source)
            source.close()
            with pytest.raises(UserError, match=r"none\.mkv: cannot be opened") as error:
                LiveSource(f"{address}/none.mkv")
        finally:
            server.shutdown()
    assert len(str(error.value).splitlines()) == 1
    assert [frame.index for frame in frames] == list(range(9))
    assert [frame.time for frame in frames] == pytest.approx([i / 25 for i in range(9)], abs=1e-3)
    # JPEG of one colour, in limited chroma
    assert all(abs(frame.image.astype(int) - 20 * frame.index).max() < 4 for frame in frames)


def test_an_open_file_is_read(tmp_path):
    write_film(tmp_path / "film.mkv", 5)
    with (tmp_path / "film.mkv").open("rb") as file:
        source = LiveSource(file)
        assert not source.is_paced
        assert len(list(source)) == 5
        source.close()
