"""`virst segment --concurrency`: several videos at the same time, whose frames share the encoder's batches."""

import csv
import errno
import functools
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import virst_jax
from helpers.network import write_model
from virst_jax import cli
from virst_jax.commands import _common, segment_run
from virst_jax.commands.progress import Progress, _Lines
from virst_jax.io.npz import read_npz
from virst_jax.io.video import VideoWriter

BATCH = 4
LENGTHS = {"a": 5, "b": 1, "c": 2}  # alone, they take 2 + 1 + 1 batches
LONG = {"a": 41, "b": 30, "c": 35}
SIZES = {"a": (20, 32), "b": (24, 18), "c": (40, 56)}
# as `virst`, with batches of an accelerator, and a disk that takes no frame above 11 until a file is there
HELD = """
import sys, time
from virst_jax import cli
from virst_jax.commands import _common, interrupt, segment_run

load, write = _common.load_model, segment_run.write_mask

def load_model(args):
    model = load(args)
    model.batch = 4
    return model

def write_mask(path, mask):
    while int(path.stem) > 11 and not interrupt._asked:  # a file that the test makes might be seen before its signal
        time.sleep(0.05)
    write(path, mask)

_common.load_model, segment_run.write_mask = load_model, write_mask
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.setattr(_common, "load_model", _load)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("concurrency") / "model")


@functools.cache
def _loaded(path: str) -> virst_jax.Model:
    model = virst_jax.load(path)
    model.batch = BATCH
    return model


def _load(args: Any) -> virst_jax.Model:
    return _loaded(args.model)


def write_clips(folder: Path, lengths: dict[str, int]) -> Path:
    folder.mkdir()
    for name, count in lengths.items():
        shape = (count, *SIZES[name], 3)
        with VideoWriter(folder / f"{name}.mp4", SIZES[name], 5) as video:
            for frame in np.random.default_rng(count).integers(0, 256, shape, dtype=np.uint8):
                video.write(frame)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return write_clips(tmp_path_factory.mktemp("concurrency") / "clips", LENGTHS)


def arguments(clips: Path, model: Path, out: Path, concurrency: int, *more: str) -> list[str]:
    given = ["segment", clips, "the dog", "a cat", "--model", model, "--out", out, "--concurrency", concurrency]
    return [*map(str, given), "--quiet", *more]


def table(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def masks(out: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(out)): path.read_bytes() for path in out.glob("*/0*/*.png")}
    assert found
    return found


@pytest.fixture
def calls(model, monkeypatch) -> list[int]:
    """How many frames each call of the image encoder had."""
    seen: list[int] = []
    network = _loaded(str(model)).network
    encode = network.encode_batch
    monkeypatch.setattr(
        network, "encode_batch", lambda frames, *rest: seen.append(len(frames)) or encode(frames, *rest)
    )
    return seen


@pytest.fixture(scope="module")
def in_turn(model, clips, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("concurrency") / "in_turn"
    assert cli.main(arguments(clips, model, out, 1)) == 0
    return out


@pytest.mark.parametrize("more", [[], ["--exact"]])
def test_masks_are_those_of_one_after_the_other(model, clips, tmp_path, in_turn, calls, more, capsys):
    alone, shared = in_turn, tmp_path / "shared"
    if more:
        alone = tmp_path / "alone"
        assert cli.main(arguments(clips, model, alone, 1, *more)) == 0
        calls.clear()
    assert cli.main(arguments(clips, model, shared, 3, *more)) == 0
    assert masks(shared) == masks(alone)
    # each frame once; with --exact, those that the fusion reads twice
    assert sum(calls) == (2 if more else 1) * sum(LENGTHS.values())
    if not more:
        assert len(calls) < sum(-(-count // BATCH) for count in LENGTHS.values())
    rows, before = table(shared), table(alone)
    assert [{**row, "seconds": ""} for row in rows] == [{**row, "seconds": ""} for row in before]
    assert "wrote 3 of 3 videos" in capsys.readouterr().out


def test_a_broken_video_among_others(model, clips, tmp_path, in_turn, monkeypatch, capsys):
    broken = tmp_path / "clips"
    broken.mkdir()
    for name in LENGTHS:
        (broken / f"{name}.mp4").write_bytes((clips / f"{name}.mp4").read_bytes())
    (broken / "a.mp4").write_bytes(b"no video")
    out = tmp_path / "out"
    assert cli.main(arguments(broken, model, out, 2)) == 1
    assert [row["status"] for row in table(out)] == ["failed", "done", "done", "done", "done"]
    assert "cannot be read as a video" in table(out)[0]["error"]
    expected = masks(in_turn)
    assert masks(out) == {path: content for path, content in expected.items() if not path.startswith("a")}
    # it is mended, but fails in the middle of its frames, which the others wait for
    (broken / "a.mp4").write_bytes((clips / "a.mp4").read_bytes())
    pixels = virst_jax.inference.stream.Run.pixels

    def stops(self):
        for number, frame in pixels(self):
            if self.num_frames == LENGTHS["a"] and number == 3:
                raise ValueError("a fault")
            yield number, frame

    with monkeypatch.context() as patch:
        patch.setattr(virst_jax.inference.stream.Run, "pixels", stops)
        assert cli.main(arguments(broken, model, tmp_path / "other", 3)) == 1
    assert [row["status"] for row in table(tmp_path / "other")] == ["failed", "done", "done", "done", "done"]
    assert "a fault of this program: ValueError: a fault" in capsys.readouterr().err
    assert cli.main(arguments(broken, model, out, 3, "--resume")) == 0
    assert masks(out) == expected


def test_a_full_disk_stops_all(model, clips, tmp_path, in_turn, monkeypatch, capsys):
    write, out = segment_run.write_mask, tmp_path / "out"

    def full(path: Path, mask: np.ndarray) -> None:
        if path.parent.parent.name == "b":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, mask)

    with monkeypatch.context() as patch:
        patch.setattr(segment_run, "write_mask", full)
        assert cli.main(arguments(clips, model, out, 2)) == 2
    assert "no space left" in capsys.readouterr().err
    statuses = {row["folder"]: row["status"] for row in table(out)}
    assert statuses["b"] == "failed"
    assert cli.main(arguments(clips, model, out, 2, "--resume")) == 0
    assert masks(out) == masks(in_turn)


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    """The masks of long videos, one video after the other."""
    folder = tmp_path_factory.mktemp("alone")
    assert cli.main(arguments(write_clips(folder / "clips", LONG), model, folder / "out", 1)) == 0
    return masks(folder / "out")


@pytest.mark.parametrize(
    ("number", "status", "told"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_stops_all_and_all_go_on(model, alone, tmp_path, number, status, told):
    clips, out = write_clips(tmp_path / "clips", LONG), tmp_path / "out"
    command = [sys.executable, "-c", HELD, *arguments(clips, model, out, 3)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            # all are within their second chunk or later
            deadline = time.monotonic() + 900
            while any(not list(out.glob(f"{name}/01*/00005.png")) for name in LONG):
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(number)
            _, error = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == status, error
    assert error.strip().splitlines()[-1] == f"{told}; finished parts are kept"
    assert [row["status"] for row in table(out)] == ["interrupted"] * 3
    saved = {name: int(read_npz(out / name / ".virst" / "tracker.npz", "")["next"]) for name in LONG}
    assert all(0 < saved[name] < count for name, count in LONG.items())
    assert not list(out.rglob("*.part"))
    first = {path: path.stat().st_mtime_ns for path in out.glob("*/01*/00000.png")}
    assert cli.main(arguments(clips, model, out, 3, "--resume")) == 0
    assert {row["status"] for row in table(out)} == {"done"}
    assert all(path.stat().st_mtime_ns == when for path, when in first.items())
    assert masks(out) == alone


def test_bad_numbers_take_one_line(clips, tmp_path, capsys):
    assert cli.main(["segment", str(clips), "x", "--out", str(tmp_path / "out"), "--concurrency", "0"]) == 2
    assert capsys.readouterr().err == "error: --concurrency 0: give 1 video or more\n"


def test_progress_tells_of_all_videos(capsys):
    with Progress(quiet=True) as shown:
        shown._lines = lines = _Lines()
        shown.finished(2, 9)
        with shown.beside("dog") as dog, shown.beside("cat") as cat:
            dog("track", 3, 40)
            cat("decode", 0, 0)
            lines.tick(lines._begin + 20)
            bars = [(bar.description, bar.completed, bar.total) for bar in shown._bars.tasks]
            assert bars == [("videos", 2, 9), ("dog: track", 3, 40), ("cat: decode", 0, 0)]
        with shown.beside("cow") as cow:
            cow("encode", 1, 8)
            shown.finished(4, 9)
            lines.tick(lines._begin + 21)
        assert [bar.description for bar in shown._bars.tasks] == ["videos"]
        shown._lines = None
    told = capsys.readouterr().err.splitlines()
    assert [re.sub(r"^\[\d+:\d+\] ", "", line) for line in told] == [
        "2 of 9 videos done, cat: decode, dog: track 3 of 40",
        "4 of 9 videos done, cow: encode 1 of 8",
    ]
