"""`virst live`: what it writes, and that files are whole however a stream ends."""

import contextlib
import errno
import io
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest

from virst_jax import cli
from virst_jax.commands import _common
from virst_jax.io.live_source import LiveSource
from virst_jax.io.video import open_video

SIZE = (32, 48)


@pytest.fixture(autouse=True)
def _loaded(model, monkeypatch):
    monkeypatch.setattr(_common, "load_model", lambda args: model)


class Written:
    """A file that is only written; FFmpeg itself would open a named pipe without letting other threads run."""

    def __init__(self, path):
        self.write = open(path, "wb", buffering=0).write  # noqa: SIM115


def feed(path, count: int | None, seconds: float = 0.0) -> threading.Thread:
    """Writes frames to a file or a named pipe; count None: until nobody reads."""

    def work() -> None:
        with (
            contextlib.suppress(Exception),  # nobody reads any more
            av.open(Written(path), "w", format="matroska", options={"flush_packets": "1"}) as container,
        ):
            stream = container.add_stream("mjpeg", rate=30)
            stream.height, stream.width, stream.pix_fmt = *SIZE, "yuvj420p"
            number = 0
            while count is None or number < count:
                image = np.full((*SIZE, 3), number % 250, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
                number += 1
                time.sleep(seconds)
            container.mux(stream.encode(None))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def pipe(tmp_path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def run(*arguments: object) -> int:
    return cli.main(["live", *map(str, arguments)])


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "boxes.ndjson").read_text().splitlines()]


def test_a_pipe(pipe, tmp_path, capsys):
    out = tmp_path / "out"
    feed(pipe, 12)
    assert run(pipe, "the dog", "A Cat", "--model", "none", "--out", out, "--every", 5, "--stdout", "boxes") == 0
    captured = capsys.readouterr()
    lines = lines_of(out)
    assert [json.loads(line) for line in captured.out.splitlines()] == lines
    assert [line["frame"] for line in lines] == list(range(12))
    assert [line["frame"] for line in lines if line["read"]] == [0, 5, 10]
    assert [x["expression"] for x in lines[0]["objects"]] == ["the dog", "a cat"]
    assert lines[3]["time"] == pytest.approx(0.1, abs=0.002)
    assert all((x["box"] is None) == (x["area"] == 0) for line in lines for x in line["objects"])
    result = json.loads((out / "result.json").read_text())
    assert (result["frames"], result["dropped"], result["ended_by"]) == (12, 0, None)
    assert result["latency"]["median"] <= result["latency"]["95%"] <= result["latency"]["longest"]
    video = open_video(out / "overlay.mp4")
    assert video.num_frames == 12
    assert video.fps == pytest.approx(30)
    assert "12 frames" in captured.err
    assert f"wrote {out}" in captured.err
    # once more only over it
    feed(pipe, 2)
    assert run("none", "x", "--model", "none", "--out", out) == 2
    assert "exists already" in capsys.readouterr().err
    assert run(pipe, "x", "--model", "none", "--out", out, "--overwrite", "--quiet") == 0
    assert len(lines_of(out)) == 2
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_with_whole_files(pipe, tmp_path, capsys, number, status):
    out = tmp_path / "out"
    feed(pipe, None, 0.02)

    def stop() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            time.sleep(0.05)
            if (out / "boxes.ndjson").is_file() and len((out / "boxes.ndjson").read_text().splitlines()) > 4:
                os.kill(os.getpid(), number)
                return

    threading.Thread(target=stop, daemon=True).start()
    assert run(pipe, "the dog", "--model", "none", "--out", out) == status
    count = len(lines_of(out))
    assert count > 4
    assert open_video(out / "overlay.mp4").num_frames == count
    assert json.loads((out / "result.json").read_text())["frames"] == count
    assert not list(out.rglob("*.part"))
    assert "finished parts are kept" in capsys.readouterr().err.splitlines()[-1]


def test_a_source_that_breaks_off(pipe, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    decoded = LiveSource._decoded

    class Gone:
        """A camera that is pulled out."""

        def __init__(self, container):
            self._container, self._left = container, 4

        def demux(self, stream):
            for packet in self._container.demux(stream):
                if not self._left:
                    raise OSError(errno.ENODEV, "No such device")
                self._left -= 1
                yield packet

        def close(self):
            self._container.close()

    def gone(self):
        self._container = Gone(self._container)
        return decoded(self)

    monkeypatch.setattr(LiveSource, "_decoded", gone)
    feed(pipe, 9)
    assert run(pipe, "the dog", "--model", "none", "--out", out, "--quiet") == 2
    count = len(lines_of(out))
    assert count == 4
    assert open_video(out / "overlay.mp4").num_frames == count
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert errors == [f"error: {pipe}: broke off after 4 frames (No such device)"]
    assert "broke off" in json.loads((out / "result.json").read_text())["ended_by"]


def test_a_pipe_that_is_cut_in_a_frame(tmp_path, capsys):
    whole = tmp_path / "whole.mkv"
    feed(whole, 6).join()
    content = whole.read_bytes()
    (tmp_path / "cut.mkv").write_bytes(content[: len(content) - 700])
    assert run(tmp_path / "cut.mkv", "the dog", "--model", "none", "--out", tmp_path / "out") in (0, 2)
    count = len(lines_of(tmp_path / "out"))
    assert 3 <= count <= 6
    assert open_video(tmp_path / "out" / "overlay.mp4").num_frames == count


def test_nobody_reads_the_output(pipe, tmp_path, monkeypatch, capsys):
    class Closed(io.StringIO):
        def write(self, text):
            if self.tell() > 300:
                raise BrokenPipeError(errno.EPIPE, "Broken pipe")
            return super().write(text)

    out = tmp_path / "out"
    monkeypatch.setattr(sys, "stdout", Closed())
    feed(pipe, 50)
    assert run(pipe, "the dog", "--model", "none", "--out", out, "--stdout", "boxes", "--quiet") == 1
    count = len(lines_of(out))
    assert 1 < count < 50
    assert open_video(out / "overlay.mp4").num_frames == count
    assert "nobody reads the output any more" in capsys.readouterr().err


def test_an_overlay_on_the_output(pipe, capfdbinary):
    feed(pipe, 5)
    assert run(pipe, "the dog", "--model", "none", "--stdout", "overlay", "--quiet") == 0
    with av.open(io.BytesIO(capfdbinary.readouterr().out), format="mpegts") as container:
        frames = list(container.decode(video=0))
    assert len(frames) == 5
    assert frames[0].width == SIZE[1]
    assert float(frames[4].time - frames[0].time) == pytest.approx(4 / 30, abs=0.002)


def test_the_first_frames(pipe, capsys):
    feed(pipe, None, 0.01)
    assert run(pipe, "the dog", "--model", "none", "--max-frames", 3, "--quiet") == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/dev/video77", "x"], "/dev/video77: no such camera"),
        (["none.mp4", "x"], "none.mp4: no such file"),
        (["none.mp4", "x", "--every", "0"], "every is 0"),
        (["none.mp4", "x", "--option", "size"], "--option size: give KEY=VALUE"),
        (["none.mp4", "x", "--max-frames", "0"], "leave nothing"),
        (["none.mp4", " "], "the expression is empty"),
        (["none.mp4", "x", "--instances"], "live streams have no instances"),
        (["none.mp4", "x", "--soft"], "take virst segment --soft"),
        (["TEXT", "x"], "cannot be opened"),
    ],
)
def test_bad_input_takes_one_line(tmp_path, capsys, arguments, message):
    (tmp_path / "text.mp4").write_text("no video")
    given = [str(tmp_path / "text.mp4") if argument == "TEXT" else argument for argument in arguments]
    assert run(*given, "--model", "none", "--out", tmp_path / "out", "--quiet") == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert message in error
    assert not (tmp_path / "out").exists()
