"""Streams of several threads share batches: which frames go together, who gets what, and that nobody waits forever."""

import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from virst_jax.inference.compiled import Compiled, CompileWatch, watch_compiling
from virst_jax.inference.shared_batches import SharedBatches, StreamEncoder
from virst_jax.io import timeline

BATCH, SECONDS = 4, 60.0  # a thread that takes longer than this hangs


class CountingNetwork:
    """Gives back the frames as their features, and notes the batches."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.error: Exception | None = None

    def encode_batch(self, frames: Sequence[Any], batch: int) -> list[Any]:
        assert 0 < len(frames) <= batch
        self.batches.append(list(frames))
        if self.error is not None:
            raise self.error
        return list(frames)


@pytest.fixture
def network() -> CountingNetwork:
    return CountingNetwork()


@pytest.fixture
def batches(network) -> SharedBatches:
    return SharedBatches(network, BATCH)


def numbered(name: str, count: int) -> Iterator[tuple[str, str]]:
    return ((f"{name}{i}", f"{name}{i}") for i in range(count))


def encode_all(encoder: StreamEncoder, name: str, count: int) -> list[tuple[str, Any]]:
    with encoder:
        return list(encoder.encode(numbered(name, count)))


def at_once(*works: Callable[[], Any]) -> list[Any]:
    """The works' results, or what they have raised, each of a thread of its own."""
    results: list[Any] = [None] * len(works)

    def run(i: int, work: Callable[[], Any]) -> None:
        try:
            results[i] = work()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive(), "a stream waits forever"
    return results


def test_a_stream_alone(network, batches):
    frames = [(0, "a"), (1, None), (2, "b"), (3, "c"), (4, None), (5, "d"), (6, "e"), (7, None)]
    with batches.join() as encoder:
        assert list(encoder.encode(frames)) == frames
    assert network.batches == [["a", "b", "c", "d"], ["e"]]


def test_frames_of_several_streams_fill_a_batch(network, batches):
    lengths = {"a": 5, "b": 1, "c": 2, "d": 7}
    encoders = {name: batches.join() for name in lengths}
    results = at_once(*(lambda n=name: encode_all(encoders[n], n, lengths[n]) for name in lengths))
    for (name, count), result in zip(lengths.items(), results):
        assert result == list(numbered(name, count))
    # 15 frames: alone, they take 2 + 1 + 1 + 2 batches
    assert sorted(map(len, network.batches)) == [3, 4, 4, 4]


def test_a_stream_reads_on_only_until_its_next_frame_is_there(network, batches):
    """Frames that others have left come first, and nothing waits for the others."""
    first, second = batches.join(), batches.join()
    assert [batches.add(first, f"a{i}").is_done for i in range(3)] == [False] * 3
    read: list[str] = []
    source = ((x, read.append(x) or x) for x in ("b0", "b1", "b2", "b3", "b4"))
    found = second.encode(source)
    assert next(found) == ("b0", "b0")
    assert read == ["b0"]
    assert network.batches == [["a0", "a1", "a2", "b0"]]
    assert [key for key, _ in (next(found) for _ in range(4))] == ["b1", "b2", "b3", "b4"]


@pytest.mark.parametrize("how", ["ends", "fails", "is interrupted"])
def test_a_stream_that_goes_does_not_hang_the_others(network, batches, how):
    staying, going, waiting = batches.join(), batches.join(), threading.Event()

    def before_going() -> None:
        assert waiting.wait(SECONDS)
        time.sleep(0.05)

    def broken() -> Iterator[tuple[str, str]]:
        yield "b0", "b0"  # is left behind
        before_going()
        raise ValueError("broken") if how == "fails" else KeyboardInterrupt

    def go() -> None:
        with going:
            if how == "ends":
                before_going()
            else:
                list(going.encode(broken()))

    def stay() -> list[tuple[str, Any]]:
        def frames() -> Iterator[tuple[str, str]]:
            yield from numbered("a", 2)
            waiting.set()

        with staying:
            return list(staying.encode(frames()))

    result, error = at_once(stay, go)
    assert result == list(numbered("a", 2))
    assert isinstance(error, {"ends": type(None), "fails": ValueError, "is interrupted": KeyboardInterrupt}[how])
    assert network.batches == [["a0", "a1"]]


def test_what_encoding_raises_reaches_all_whose_frames_it_was(network, batches):
    encoders = [batches.join() for _ in range(3)]
    network.error = MemoryError("no room")
    results = at_once(*(lambda i=i: encode_all(encoders[i], "abc"[i], 1) for i in range(3)))
    assert all(isinstance(result, MemoryError) for result in results)
    network.error = None
    assert encode_all(batches.join(), "d", 2) == list(numbered("d", 2))


@pytest.mark.parametrize("seed", range(5))
def test_any_streams_in_any_order(network, batches, seed):
    rng = random.Random(seed)
    plans = [(f"s{i}-", rng.randrange(12), rng.random() < 0.3) for i in range(12)]

    def work(name: str, count: int, breaks: bool) -> list[tuple[str, Any]]:
        pauses = random.Random(name)
        with batches.join() as encoder:
            found = []
            for item in encoder.encode(numbered(name, count)):
                time.sleep(pauses.random() * 0.003)
                found.append(item)
                if breaks and len(found) > count // 2:
                    raise ValueError(name)
            return found

    with ThreadPoolExecutor(max_workers=3) as pool:
        futures = [pool.submit(work, *plan) for plan in plans]
        for (name, count, breaks), future in zip(plans, futures):
            if breaks and count:
                assert isinstance(future.exception(SECONDS), ValueError)
            else:
                assert future.result(SECONDS) == list(numbered(name, count))
    seen = [x for batch in network.batches for x in batch]
    assert len(seen) == len(set(seen))


def test_a_step_is_compiled_once_for_several_threads():
    traced: list[str] = []

    def double(params: None, x: Any) -> Any:
        traced.append(threading.current_thread().name)
        time.sleep(0.1)
        return 2 * x

    network, told = Compiled(), []

    def call() -> Any:
        with watch_compiling(CompileWatch(told.append)):
            return network._run(double, None, jnp.arange(3))

    for result in at_once(*[call] * 6):
        np.testing.assert_array_equal(result, [0, 2, 4])
    assert (len(traced), told, network.num_compiled) == (1, ["double"], 1)


def test_threads_of_one_name_have_rows_of_their_own(tmp_path: Path):
    def work() -> None:
        threading.current_thread().name = "png_0"
        with timeline.span("write"):
            meet.wait(SECONDS)  # both are at work at the same time
        timeline.flight("frames 0 to 3", time.perf_counter())

    meet, path = threading.Barrier(2), tmp_path / "trace.json"
    with timeline.recorded(path):
        assert at_once(work, work) == [None, None]
    events = json.loads(path.read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert sorted(names.values()) == [timeline.DEVICE] * 2 + ["png_0"] * 2
    assert len({(event["tid"], event["name"]) for event in events if event["ph"] == "X"}) == 4
