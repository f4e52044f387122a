"""The command line: what it writes, what it goes on with, what it refuses."""

import argparse
import errno
import functools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

import virst_jax
from helpers.network import CFG, write_model
from virst_jax import cli
from virst_jax.commands import chat, demo, segment
from virst_jax.commands.progress import Progress
from virst_jax.errors import UserError
from virst_jax.io.video import open_video

FRAMES = 7


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture(scope="module", autouse=True)
def _shared(tmp_path_factory):
    """Every model is loaded and compiled once; nothing is written elsewhere."""
    loaded = functools.cache(virst_jax.load)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        for module in (segment, chat):
            patch.setattr(module, "load_model", lambda name, dtype=None: loaded(name, dtype=dtype))
        yield


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("frames")
    video = np.random.default_rng(0).integers(0, 256, (FRAMES, 20, 31, 3), dtype=np.uint8)
    for t, frame in enumerate(video):
        Image.fromarray(frame).save(folder / f"img{t:03d}.png")
    return folder


@pytest.fixture(scope="module")
def finished(model, frames, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "masks"
    assert cli.main(["segment", str(frames), "the dog", "What? A cat!", "--model", str(model), "--out", str(out)]) == 0
    return out


def test_segment_writes(finished, capsys):
    assert sorted(path.name for path in finished.iterdir()) == [
        ".virst",
        "01-the-dog",
        "02-what-a-cat",
        "overlay.mp4",
        "preview.png",
        "result.json",
    ]
    result = json.loads((finished / "result.json").read_text())
    assert result["expressions"] == ["the dog", "what? a cat!"]
    assert result["size"] == {"height": 20, "width": 31}
    assert result["frames"] == list(range(FRAMES))
    assert set(result["anchors"]) <= set(result["segmentation_frames"]) <= set(result["sampled_frames"])
    assert {"sample", "read", "anchors", "track", "compile", "overlay", "total"} == set(result["timings"])
    assert {"virst-jax", "jax", "python", "device"} <= set(result["versions"])
    for record in result["objects"]:
        names = sorted(path.name for path in (finished / record["folder"]).iterdir())
        assert names == [f"img{t:03d}.png" for t in range(FRAMES)]
        assert len(record["scores"]) == FRAMES
        for t, name in enumerate(names):
            with Image.open(finished / record["folder"] / name) as image:
                assert image.mode == "L"
                pixels = np.asarray(image)
            assert pixels.shape == (20, 31)
            assert set(np.unique(pixels)) <= {0, 255}
            code = {**record["rle"][t], "counts": record["rle"][t]["counts"].encode()}
            np.testing.assert_array_equal(coco.decode(code), pixels > 0)
            assert record["areas"][t] == (pixels > 0).sum()
            rows, columns = np.nonzero(pixels)
            if not len(rows):
                assert record["boxes"][t] is None
                continue
            x, y, width, height = record["boxes"][t]
            assert (x, y, width, height) == (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1)
    overlay = open_video(finished / "overlay.mp4")
    assert overlay.num_frames == FRAMES
    assert overlay.size[0] > 20  # a legend below
    with Image.open(finished / "preview.png") as image:
        assert image.width > 100


def test_a_second_run_needs_resume(finished, model, frames, capsys):
    arguments = ["segment", str(frames), "the dog", "what? a cat!", "--model", str(model), "--out", str(finished)]
    before = (finished / "result.json").stat().st_mtime_ns
    assert cli.main(arguments) == 2
    assert "exists already; choose another folder, or --resume" in capsys.readouterr().err
    assert cli.main([*arguments, "--resume"]) == 0
    assert (finished / "result.json").stat().st_mtime_ns == before
    assert cli.main([*arguments, "--resume", "--seed", "3"]) == 2
    assert "holds another run (seed differ)" in capsys.readouterr().err


def without_times(path: Path) -> dict:
    result = json.loads((path / "result.json").read_text())
    return {key: value for key, value in result.items() if key != "timings"}


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device", "x.png")])
def test_an_interrupted_run_goes_on(finished, model, frames, tmp_path, monkeypatch, capsys, stop):
    out = tmp_path / "masks"
    arguments = ["segment", str(frames), "the dog", "what? a cat!", "--model", str(model), "--out", str(out)]
    written: list[Path] = []
    write = segment.write_mask

    def stops(path: Path, mask: np.ndarray) -> None:
        if path.name == "img005.png":
            raise stop
        written.append(path)
        write(path, mask)

    monkeypatch.setattr(segment, "write_mask", stops)
    monkeypatch.setattr(segment, "SAVE_SECONDS", 0.0)
    assert cli.main(arguments) == (130 if isinstance(stop, KeyboardInterrupt) else 2)
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert "interrupted; finished parts are kept" in error or "x.png: no space left on the disk" in error
    assert not (out / "result.json").exists()
    assert not list(out.rglob("*.part"))
    first = {path: path.stat().st_mtime_ns for path in written}

    written.clear()
    stop = None
    monkeypatch.setattr(segment, "write_mask", lambda path, mask: (written.append(path), write(path, mask)))
    assert cli.main([*arguments, "--resume"]) == 0
    # the first chunk was there: its frames are not computed again
    assert {path.name for path in written} == {f"img{t:03d}.png" for t in range(4, FRAMES)}
    assert all(path.stat().st_mtime_ns == when for path, when in first.items() if path.name < "img004.png")
    assert without_times(out) == without_times(finished)
    for path in finished.glob("0*/*.png"):
        assert (out / path.relative_to(finished)).read_bytes() == path.read_bytes()


def test_control_c_from_outside(model, frames, tmp_path):
    """A real signal to a real process, before anything is compiled."""
    process = subprocess.Popen(
        [sys.executable, "-m", "virst_jax.cli", "segment", frames, "x", "--model", model, "--out", tmp_path / "out"],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / ".virst").is_dir() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert error.strip().splitlines()[-1] == "interrupted; finished parts are kept"


def test_thinned(model, frames, tmp_path):
    out = tmp_path / "out"
    options = ["--model", str(model), "--every", "3", "--max-frames", "2", "--quiet"]
    assert cli.main(["segment", str(frames), "the dog", "x", "--out", str(out), *options]) == 0
    assert [path.name for path in sorted((out / "01-the-dog").iterdir())] == ["img000.png", "img003.png"]
    assert json.loads((out / "result.json").read_text())["frames"] == [0, 3]


def test_a_picture(model, frames, tmp_path):
    out = tmp_path / "out"
    assert cli.main(["segment", str(frames / "img004.png"), "x", "y", "--model", str(model), "--out", str(out)]) == 0
    assert [path.name for path in (out / "01-x").iterdir()] == ["img004.png"]
    assert json.loads((out / "result.json").read_text())["sampled_frames"] == [0]


def test_chat_and_info(model, frames, capsys):
    assert cli.main(["chat", str(frames), "what is it?", "--model", str(model), "--max-new-tokens", "3"]) == 0
    capsys.readouterr()
    assert cli.main(["info", "--model", str(model)]) == 0
    shown = capsys.readouterr().out
    for text in ("cpu", "jax", str(CFG.llm.vocab_size), f"{CFG.sam2.image_size} px", str(CFG.seg_token_id)):
        assert text in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["segment", "none.mp4", "x", "--out", "OUT"], "none.mp4: no such video"),
        (["segment", "FRAMES", "x", "--out", "OUT", "--model", "none"], "none: no model there"),
        (["segment", "FRAMES", " ", "--out", "OUT", "--model", "MODEL"], "the expression is empty"),
        (["segment", "FRAMES", "a [SEG]", "--out", "OUT", "--model", "MODEL"], "contains the control token [SEG]"),
        (["segment", "FRAMES", "x", "--out", "OUT", "--every", "0"], "give 1 or more"),
        (["segment", "FRAMES", "x"], "the following arguments are required: --out"),
        (["segment", "FRAMES", "x", "--out", "FRAMES", "--resume", "--model", "MODEL"], "holds no run to go on with"),
        (["chat", "FRAMES", "", "--model", "MODEL"], "the question is empty"),
        (["info", "--model", "none"], "none: no model there"),
        (["dance"], "unknown command 'dance': choose one of segment, chat,"),
    ],
)
def test_bad_input_takes_one_line(model, frames, tmp_path, capsys, arguments, message):
    places = {"OUT": str(tmp_path / "out"), "FRAMES": str(frames), "MODEL": str(model)}
    try:
        status = cli.main([places.get(argument, argument) for argument in arguments])
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_help(capsys):
    assert cli.main([]) == 2
    shown = capsys.readouterr().out
    assert "examples:" in shown
    assert all(name in shown for name in cli.COMMANDS)
    with pytest.raises(SystemExit) as exit:
        cli.main(["--help"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name, capsys):
    command = cli.command_module(name)
    assert command.HELP
    with pytest.raises(SystemExit) as exit:
        cli.main([name, "--help"])
    assert exit.value.code == 0
    assert f"virst {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Dog", "the-dog"),
        ("what?!  ../../etc", "what-etc"),
        ("élan vital", "elan-vital"),
        ("猫", "expression"),
        ("a" * 90, "a" * 40),
    ],
)
def test_slug(text, expected):
    assert segment.slug(text) == expected


def test_progress_is_silent_where_nobody_looks(capsys):
    with Progress() as progress:
        for stage, done, total in (("decode", 0, 0), ("compile track", 0, 0), ("encode", 1, 2), ("track", 3, 3)):
            progress(stage, done, total)
    captured = capsys.readouterr()
    assert not captured.out.strip()
    assert not captured.err.strip()


def test_the_sample_clip():
    clip = open_video(demo.CLIP)
    assert (clip.num_frames, clip.size, clip.fps) == (32, (256, 256), 8.0)
    assert demo.CLIP.stat().st_size < 100_000
    assert len(set(demo.EXPRESSIONS)) >= 4


def test_the_demo_runs_with_any_model(model, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "EXPRESSIONS", demo.EXPRESSIONS[:2])
    assert cli.main(["demo", "--out", str(tmp_path / "out"), "--model", str(model), "--quiet"]) == 0
    assert len(list((tmp_path / "out").glob("0*/*.png"))) == 64
    monkeypatch.setattr(demo, "CLIP", tmp_path / "none.mp4")
    with pytest.raises(UserError, match="the sample clip is missing"):
        demo.run(argparse.Namespace())
