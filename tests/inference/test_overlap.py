"""The device has work while the host decodes and writes; a timeline shows it. The device is a thread that sleeps."""

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from virst_jax.inference.shared_batches import SharedBatches
from virst_jax.inference.stream import ahead, encode_in_order, propagate
from virst_jax.io import timeline
from virst_jax.io.shared_pass import SharedPass
from virst_jax.io.video import ArrayReader

CHUNK, CHUNKS = 4, 12
ENCODING, TRACKING = 0.02, 0.12  # seconds of the device, a frame and a chunk
DECODING, WRITING = 0.03, 0.03  # seconds of the host, a frame


class Device:
    """Runs what it is given in order, each piece for so long, and notes when."""

    def __init__(self) -> None:
        self.queue = ThreadPoolExecutor(max_workers=1)
        self.spans: list[tuple[float, float]] = []

    def give(self, seconds: float) -> Future[None]:
        return self.queue.submit(self._work, seconds)

    def _work(self, seconds: float) -> None:
        start = time.perf_counter()
        time.sleep(seconds)
        self.spans.append((start, time.perf_counter()))

    def share_busy(self) -> float:
        """From the first piece's start to the last one's end."""
        return sum(end - start for start, end in self.spans) / (self.spans[-1][1] - self.spans[0][0])


class Pending:
    """An array that is there when the device has got so far."""

    def __init__(self, work: Future[None], array: np.ndarray):
        self.work, self.array = work, array

    def copy_to_host_async(self) -> None:
        pass

    def block_until_ready(self) -> "Pending":
        self.work.result()
        return self

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        self.work.result()
        return self.array


class SleepingNetwork:
    """Gives its device the steps of a network."""

    cfg = SimpleNamespace(sam2=SimpleNamespace(low_res_size=64))

    def __init__(self) -> None:
        self.device = Device()

    def encode_batch(self, frames: np.ndarray, batch: int) -> list[Future[None]]:
        return [self.device.give(ENCODING) for _ in frames]

    def advance(self, batch: Any, features: Any, first: int, num_frames: int, chunk: int, keep_memory: bool) -> Any:
        work = self.device.give(TRACKING)
        prediction = SimpleNamespace(low_res=work, object_score=Pending(work, np.zeros((chunk, 1), np.float32)))
        return SimpleNamespace(prediction=prediction)

    def resize_masks(self, low_res: Future[None], rows: jax.Array, columns: jax.Array) -> Pending:
        return Pending(low_res, np.zeros((CHUNK, 1, 256, 32), np.uint8))


def pixels() -> Iterator[tuple[int, np.ndarray]]:
    for number in range(CHUNK * CHUNKS):
        with timeline.span("decode"):
            time.sleep(DECODING)
        yield number, np.zeros((8, 8, 3), np.uint8)


def stream(network: SleepingNetwork, write: Callable[[], None]) -> int:
    """Frames that came out."""
    batch, count = SimpleNamespace(count=1, bank=None), 0
    with ahead(pixels()) as ready:
        features: Any = encode_in_order(SharedBatches(network, 1).join(), ready, {})  # type: ignore[arg-type]
        for chunk in propagate(network, [batch], features, CHUNK * CHUNKS, (100, 120), chunk=CHUNK):  # type: ignore[arg-type,list-item]
            for _ in range(chunk.masks.shape[1]):
                write()
                count += 1
    return count


def test_the_device_is_busy_in_a_steady_stream(tmp_path: Path) -> None:
    """Decoding and writing a chunk take 0.12 s each, the device 0.2 s."""
    network, path = SleepingNetwork(), tmp_path / "trace.json"
    with timeline.recorded(path):
        assert stream(network, lambda: time.sleep(WRITING)) == CHUNK * CHUNKS
    assert network.device.share_busy() >= 0.95
    content = json.loads(path.read_text())
    events = [event for event in content["traceEvents"] if event["ph"] == "X"]
    rows = {event["tid"]: event["args"]["name"] for event in content["traceEvents"] if event["ph"] == "M"}
    by_name: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        by_name.setdefault(event["name"], []).append(event)
    assert len(by_name["decode"]) == CHUNK * CHUNKS
    assert {rows[event["tid"]] for event in by_name["decode"]} == {"read ahead"}
    assert all(event["dur"] >= 1e6 * DECODING for event in by_name["decode"])
    assert len(by_name["start tracking"]) == len(by_name["wait for masks"]) == CHUNKS
    flights = [event for event in events if rows[event["tid"]] == timeline.DEVICE]
    assert [event["name"] for event in flights][:2] == ["frames 0 to 3", "frames 4 to 7"]
    # the next chunk is given before the one before has come back
    assert all(b["ts"] < a["ts"] + a["dur"] for a, b in itertools.pairwise(flights))


def test_a_slow_host_shows() -> None:
    """The measure sees it when the host takes longer than the device."""
    network = SleepingNetwork()
    stream(network, lambda: time.sleep(3 * WRITING))
    assert network.device.share_busy() < 0.8


def test_a_frame_is_taken_while_another_is_decoded() -> None:
    decoding, go_on = threading.Event(), threading.Event()

    class Slow(ArrayReader):
        def __iter__(self) -> Iterator[np.ndarray]:
            for number, frame in enumerate(super().__iter__()):
                if number == 3:
                    decoding.set()
                    assert go_on.wait(30)
                yield frame

    frames = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    shared = SharedPass(Slow(frames))
    assert len(list(shared.pick([0, 1, 2]))) == 3
    with ThreadPoolExecutor(max_workers=2) as pool:
        fourth = pool.submit(lambda: next(iter(shared.pick([3]))))
        assert decoding.wait(30)
        taken = pool.submit(shared.take, 1)
        try:
            assert (taken.result(timeout=20) == 1).all()
        finally:
            go_on.set()
        assert (fourth.result() == 3).all()
    assert (shared.take(4) == 4).all()
    assert (shared.take(3) == 3).all()


def test_nothing_is_recorded_unless_asked_for(tmp_path: Path) -> None:
    with timeline.recorded(None), timeline.span("decode"):
        timeline.flight("frames", 0.0)
    assert list(tmp_path.iterdir()) == []


def test_a_timeline_is_written_when_work_fails(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with pytest.raises(ZeroDivisionError), timeline.recorded(path), timeline.span("track"):
        _ = 1 / 0
    assert [event["name"] for event in json.loads(path.read_text())["traceEvents"]] == ["thread_name", "track"]
