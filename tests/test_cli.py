"""The command line: what it writes, what it goes on with, what it refuses."""

import argparse
import errno
import functools
import json
import os
import shutil
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
from virst_jax.api import EMBEDDED
from virst_jax.commands import _common, demo, progress, segment_run
from virst_jax.commands.progress import Progress
from virst_jax.errors import UserError
from virst_jax.io import atomic
from virst_jax.io.npz import read_npz
from virst_jax.io.video import VideoWriter, open_video

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
        patch.setattr(_common, "load_model", lambda args: loaded(args.model, dtype=args.dtype))
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
    assert "exists already; choose another folder, --resume" in capsys.readouterr().err
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
    write = segment_run.write_mask

    def stops(path: Path, mask: np.ndarray) -> None:
        if path.name == "img005.png":
            raise stop
        written.append(path)
        write(path, mask)

    monkeypatch.setattr(segment_run, "write_mask", stops)
    monkeypatch.setattr(segment_run, "SAVE_SECONDS", 0.0)
    assert cli.main(arguments) == (130 if isinstance(stop, KeyboardInterrupt) else 2)
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert "interrupted; finished parts are kept" in error or "x.png: no space left on the disk" in error
    assert not (out / "result.json").exists()
    assert not list(out.rglob("*.part"))
    first = {path: path.stat().st_mtime_ns for path in written}

    written.clear()
    stop = None
    monkeypatch.setattr(segment_run, "write_mask", lambda path, mask: (written.append(path), write(path, mask)))
    assert cli.main([*arguments, "--resume"]) == 0
    # the first chunk was there: its frames are not computed again
    assert {path.name for path in written} == {f"img{t:03d}.png" for t in range(4, FRAMES)}
    assert all(path.stat().st_mtime_ns == when for path, when in first.items() if path.name < "img004.png")
    assert without_times(out) == without_times(finished)
    for path in finished.glob("0*/*.png"):
        assert (out / path.relative_to(finished)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("number", "status", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_signals_from_outside(model, frames, tmp_path, number, status, said):
    """A real signal to a real process, before anything is compiled."""
    process = subprocess.Popen(
        [sys.executable, "-m", "virst_jax.cli", "segment", frames, "x", "--model", model, "--out", tmp_path / "out"],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / ".virst" / "settings.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == status
    assert error.strip().splitlines()[-1] == f"{said}; finished parts are kept"


def test_thinned(model, frames, tmp_path):
    out = tmp_path / "out"
    options = ["--model", str(model), "--every", "3", "--max-frames", "2", "--quiet"]
    assert cli.main(["segment", str(frames), "the dog", "x", "--out", str(out), *options]) == 0
    assert [path.name for path in sorted((out / "01-the-dog").iterdir())] == ["img000.png", "img003.png"]
    assert json.loads((out / "result.json").read_text())["frames"] == [0, 3]


def test_an_image(model, frames, tmp_path):
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
        (
            ["segment", "FRAMES", "x", "--out", "FRAMES", "--resume", "--model", "MODEL"],
            "holds files that virst segment",
        ),
        (["chat", "FRAMES", "", "--model", "MODEL"], "the question is empty"),
        (["info", "--model", "none"], "none: no model there"),
        (["dance"], "unknown command 'dance': choose one of segment, "),
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
        ("élan vital", "élan-vital"),
        ("e\u0301lan", "élan"),
        ("猫 和 狗", "猫-和-狗"),
        ("बिल्ली", "बिल्ली"),
        ("?!", "expression"),
        ("猫" * 90, "猫" * 40),
        ("a" * 90, "a" * 40),
    ],
)
def test_slug(text, expected):
    assert segment_run.slug(text) == expected


def test_quick_work_is_silent_off_a_terminal(capsys):
    with Progress() as shown:
        for stage, done, total in (("decode", 0, 0), ("compile track", 0, 0), ("encode", 1, 2), ("track", 3, 3)):
            shown(stage, done, total)
    captured = capsys.readouterr()
    assert not captured.out.strip()
    assert not captured.err.strip()


def test_long_work_says_where_it_stands_off_a_terminal(capsys):
    lines = progress._Lines()
    lines._begin = begin = 1000.0  # whole: what is added to a clock's fraction may come back a bit smaller
    lines.tick(begin + 100)  # nothing has begun
    lines.set("encode", 1, 8)
    lines.tick(begin + 5)
    assert capsys.readouterr().err == ""
    for second in range(11, 200):
        if second == 80:
            lines.set("track", 3, 960)
        lines.tick(begin + second)
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "[00:11] encode: 1 of 8",
        "[01:11] encode: 1 of 8",
        "[01:20] track: 3 of 960",
        "[02:20] track: 3 of 960",
    ]


def segmented(video, model, out, *more):
    return cli.main(["segment", str(video), "the dog", "--model", str(model), "--out", str(out), *more])


@pytest.mark.parametrize("content", ["", "{", '{"objects": []}', "[1]"])
def test_an_empty_or_cut_result_is_no_result(finished, model, frames, tmp_path, content):
    out = tmp_path / "masks"
    shutil.copytree(finished, out)
    (out / "result.json").write_text(content)
    (out / "02-what-a-cat" / "img003.png").unlink()
    arguments = ["segment", str(frames), "the dog", "what? a cat!", "--model", str(model), "--out", str(out)]
    assert cli.main([*arguments, "--resume"]) == 0
    assert without_times(out) == without_times(finished)
    assert (out / "02-what-a-cat" / "img003.png").is_file()


def test_masks_that_are_gone_are_computed_again(finished, model, frames, tmp_path):
    out = tmp_path / "masks"
    shutil.copytree(finished, out)
    (out / "02-what-a-cat" / "img003.png").unlink()
    arguments = ["segment", str(frames), "the dog", "what? a cat!", "--model", str(model), "--out", str(out)]
    assert cli.main([*arguments, "--resume"]) == 0
    assert (out / "02-what-a-cat" / "img003.png").read_bytes() == (
        finished / "02-what-a-cat" / "img003.png"
    ).read_bytes()


@pytest.mark.parametrize("name", ["result.json", "overlay.mp4", "preview.png"])
def test_a_place_that_is_taken_is_known_before_tracking(finished, model, frames, tmp_path, monkeypatch, capsys, name):
    out = tmp_path / "masks"
    shutil.copytree(finished, out)
    (out / "result.json").unlink()
    (out / name).unlink(missing_ok=True)
    (out / name).mkdir()
    monkeypatch.setattr(segment_run, "_MaskFiles", None)  # nothing is tracked
    arguments = ["segment", str(frames), "the dog", "what? a cat!", "--model", str(model), "--out", str(out)]
    assert cli.main([*arguments, "--resume"]) == 2
    assert f"{name}: cannot be written (Is a directory)" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["cut", "scores", "fit"])
def test_a_damaged_state_is_told_and_tracking_begins_again(
    finished, model, frames, tmp_path, monkeypatch, capsys, damage
):
    out = tmp_path / "masks"
    arguments = ["segment", str(frames), "the dog", "what? a cat!", "--model", str(model), "--out", str(out)]
    write = segment_run._MaskFiles.write
    with monkeypatch.context() as patch:
        patch.setattr(segment_run._MaskFiles, "write", lambda self, state: _interrupted(write(self, state)))
        assert cli.main(arguments) == 130
    file = out / ".virst" / "tracker.npz"
    state = read_npz(file, "")
    assert set(state) > {"next", "scores"}
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-900])
    else:
        key, value = ("scores", state["scores"][:, :-1]) if damage == "scores" else ("0.count", np.array(77))
        atomic.write_npz(file, {**state, key: value})
    capsys.readouterr()
    assert cli.main([*arguments, "--resume"]) == 0
    assert "tracking begins again" in capsys.readouterr().err
    assert without_times(out) == without_times(finished)


def _interrupted(*args, **kwargs):
    raise KeyboardInterrupt


def test_a_second_run_into_a_folder_says_so(model, frames, tmp_path, capsys):
    out = tmp_path / "masks"
    with segment_run.claimed(out):
        for more in ([], ["--resume"], ["--overwrite"]):
            assert segmented(frames, model, out, *more) == 2
            assert f"{out}: another run is at work here" in capsys.readouterr().err
    assert not out.exists()  # nothing was written
    assert segmented(frames, model, out) == 0


def test_overwriting(model, frames, tmp_path, capsys):
    out = tmp_path / "masks"
    assert segmented(frames, model, out, "--max-frames", "3") == 0
    (out / "notes.txt").write_text("")
    assert segmented(frames, model, out, "--overwrite") == 0
    assert len(list((out / "01-the-dog").iterdir())) == FRAMES
    assert not (out / "notes.txt").exists()
    capsys.readouterr()
    assert segmented(frames, "none", out, "--overwrite") == 2  # before anything is removed
    assert (out / "result.json").is_file()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("")
    for more in ([], ["--resume"], ["--overwrite"]):
        assert segmented(frames, "none", tmp_path / "photos", *more) == 2  # before the model is loaded
        error = capsys.readouterr().err
        assert "photos: holds files that virst segment has not written" in error
        assert "--resume" not in error
    (out / ".virst" / "settings.json").unlink()
    assert segmented(frames, "none", out, "--resume") == 2
    assert "holds no run to go on with" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["a.jpg"]


def test_a_place_that_cannot_be_written_is_known_before_the_model_is_loaded(frames, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_common, "load_model", lambda args: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("")
    assert segmented(frames, "none", tmp_path / "file" / "masks") == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert "cannot be written" in error


def test_the_small_model_says_what_it_is(model, frames, tmp_path, monkeypatch, capsys):
    tiny = virst_jax.load(model)
    monkeypatch.setattr(_common, "load_model", lambda args: tiny)
    monkeypatch.setattr(virst_jax.api, "find_model", lambda path: model)
    assert cli.main(["segment", str(frames), "the dog", "the cat", "--out", str(tmp_path / "a")]) == 0
    captured = capsys.readouterr()
    assert "knows nothing of the real world" in captured.err
    assert "--model" in captured.err
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert "knows nothing of the real world" in result["notes"][0]
    for text, record in zip(("the dog", "the cat"), result["objects"]):
        count = sum(area > 0 for area in record["areas"])
        assert (f"'{text}': found in {count} of {FRAMES} frames" if count else f"'{text}': not found") in captured.out
    assert segmented(frames, model, tmp_path / "b") == 0
    assert "real world" not in capsys.readouterr().err
    assert cli.main(["chat", str(frames), "what is it?"]) == 2
    copied = shutil.copytree(EMBEDDED["tiny"], tmp_path / "copied")
    assert cli.main(["chat", str(frames), "what is it?", "--model", str(copied)]) == 2
    assert "it cannot answer questions" in capsys.readouterr().err


def test_results_as_json(model, frames, tmp_path, capsys):
    assert segmented(frames, model, tmp_path / "a", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["objects"][0]["expression"] == "the dog"
    assert told["objects"][0]["frames"] == FRAMES
    assert cli.main(["info", "--json", "--model", str(model), "--check"]) == 0
    assert "no digests" in json.loads(capsys.readouterr().out)["digests"]
    assert cli.main(["info", "--json", "--model", "tiny", "--check"]) == 0
    assert "are as they were saved" in json.loads(capsys.readouterr().out)["digests"]
    assert cli.main(["chat", str(frames), "what?", "--model", str(model), "--max-new-tokens", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["question"] == "what?"


def test_a_second_video_is_no_sentence(model, frames, tmp_path, capsys):
    for second in ("other.mp4", str(frames / "img001.png"), "b.JPG"):
        assert cli.main(["segment", str(frames), second, "x", "--model", str(model), "--out", str(tmp_path / "o")]) == 2
        assert "looks like a second video" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_times_and_the_legend(model, frames, tmp_path):
    out = tmp_path / "out"
    assert segmented(frames, model, out, "--fps", "4", "--no-legend", "--every", "2") == 0
    result = json.loads((out / "result.json").read_text())
    assert result["times"] == [0.0, 0.5, 1.0, 1.5]
    overlay = open_video(out / "overlay.mp4")
    assert overlay.size == (20, 32)  # even, and nothing below
    np.testing.assert_allclose(overlay.times_of(range(4)), result["times"])
    assert segmented(frames, model, tmp_path / "b") == 0
    assert json.loads((tmp_path / "b" / "result.json").read_text())["times"] is None


def test_damaged_videos(model, tmp_path, capsys):
    path = tmp_path / "a.mp4"
    with VideoWriter(path, (64, 64), 10) as video:
        for frame in np.random.default_rng(0).integers(0, 255, (12, 64, 64, 3), np.uint8):
            video.write(frame)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4])
    assert segmented(path, model, tmp_path / "out") == 2
    assert "cut short" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert segmented(path, model, tmp_path / "few", "--max-frames", "2") == 0
    assert segmented(path, model, tmp_path / "out", "--allow-damaged") == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["cut"]
    assert 2 < len(result["frames"]) < 12
    assert "the file is cut short" in capsys.readouterr().err


def test_a_device_that_is_not_there_takes_one_line(tmp_path):
    for arguments in (["info"], ["info", "--device", "cuda"], ["segment", "VIDEO", "x", "--out", "OUT"]):
        known = {"VIDEO": str(demo.CLIP), "OUT": str(tmp_path / "out")}
        run = subprocess.run(
            [sys.executable, "-m", "virst_jax.cli", *(known.get(a, a) for a in arguments)],
            env={**os.environ, "JAX_PLATFORMS": "cpu" if "--device" in arguments else "cuda"},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 2, run.stderr
        lines = [line for line in run.stderr.strip().splitlines() if not line.startswith("note: ")]
        assert len(lines) == 1
        assert "'cuda'" in lines[0]


def test_the_demo_runs_with_any_model(model, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "EXPRESSIONS", demo.EXPRESSIONS[:2])
    assert cli.main(["demo", "--out", str(tmp_path / "out"), "--model", str(model), "--quiet"]) == 0
    assert len(list((tmp_path / "out").glob("0*/*.png"))) == 64
    monkeypatch.setattr(demo, "CLIP", tmp_path / "none.mp4")
    with pytest.raises(UserError, match="the sample clip is missing"):
        demo.run(argparse.Namespace())
