"""`virst segment` on many videos: one model, a folder for each, and a table that tells of each."""

import csv
import errno
import functools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import virst_jax
from helpers.network import write_model
from virst_jax import cli
from virst_jax.commands import _common, segment_run, video_list
from virst_jax.commands.progress import Progress, _Lines
from virst_jax.commands.video_list import Item, find_items, folder_names, key
from virst_jax.errors import UserError
from virst_jax.io.video import VideoWriter

FRAMES = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("many") / "model")


@pytest.fixture(autouse=True)
def loads(monkeypatch, tmp_path_factory):
    """The arguments with which models were loaded; each is loaded and compiled once."""
    given = []

    def load(args):
        given.append(args.model)
        return _load(args.model)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr(_common, "load_model", load)
    return given


_load = functools.cache(virst_jax.load)


def write_video(path: Path, size=(20, 32), count: int = FRAMES) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, size, 5) as video:
        for frame in np.random.default_rng(count).integers(0, 256, (count, *size, 3), dtype=np.uint8):
            video.write(frame)


@pytest.fixture
def clips(tmp_path) -> Path:
    """Two videos, and a folder of frames."""
    folder = tmp_path / "clips"
    write_video(folder / "clip2.mp4")
    write_video(folder / "clip10.mp4", (24, 18), 4)
    (folder / "frames").mkdir()
    for name in ("a", "b"):
        Image.fromarray(np.full((20, 31, 3), 7, np.uint8)).save(folder / "frames" / f"{name}.png")
    return folder


def table(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def run(*arguments: object) -> int:
    return cli.main(["segment", *map(str, arguments), "--quiet"])


def test_a_folder(model, clips, tmp_path, loads, capsys):
    out = tmp_path / "out"
    assert run(clips, "the dog", "a cat", "--model", model, "--out", out) == 0
    assert loads == [str(model)]  # once
    rows = table(out)
    assert [row["folder"] for row in rows] == ["clip2", "clip2", "clip10", "clip10", "frames", "frames"]
    assert [row["sentence"] for row in rows[:2]] == ["the dog", "a cat"]
    assert {row["status"] for row in rows} == {"done"}
    assert [row["frames"] for row in rows[::2]] == ["3", "4", "2"]
    for name in ("clip2", "clip10", "frames"):
        result = json.loads((out / name / "result.json").read_text())
        found = [sum(area > 0 for area in record["areas"]) for record in result["objects"]]
        assert [int(row["frames_found"]) for row in rows if row["folder"] == name] == found
        assert (out / name / "overlay.mp4").is_file()
    told = json.loads((out / "results.json").read_text())
    assert [x["folder"] for x in told] == ["clip2", "clip10", "frames"]
    printed = capsys.readouterr().out
    assert "wrote 3 of 3 videos" in printed
    assert printed.count("the dog") == 3


def test_a_video_that_fails_does_not_stop_the_others(model, clips, tmp_path, capsys, monkeypatch):
    (clips / "clip3.mp4").write_bytes(b"no video")
    out = tmp_path / "out"
    pattern = clips / "*.mp4"
    assert run(pattern, "the dog", "--model", model, "--out", out) == 1
    captured = capsys.readouterr()
    assert [row["status"] for row in table(out)] == ["done", "failed", "done"]
    assert "cannot be read as a video" in table(out)[1]["error"]
    lines = captured.err.strip().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"{clips / 'clip3.mp4'}: failed: cannot be read")
    assert "1 failed" in lines[1]
    # it is mended, and the others are not computed again
    write_video(clips / "clip3.mp4")
    before = {path: path.stat().st_mtime_ns for path in out.glob("clip*/*/*.png")}
    assert run(pattern, "the dog", "--model", model, "--out", out) == 2
    assert "--resume" in capsys.readouterr().err
    assert run(pattern, "the dog", "--model", model, "--out", out, "--resume") == 0
    assert [row["status"] for row in table(out)] == ["done"] * 3
    assert before == {path: path.stat().st_mtime_ns for path in before}
    # a fault of the program in one video, too
    monkeypatch.setattr(segment_run.SegmentRun, "run", lambda self: 1 / 0)
    assert run(pattern, "the dog", "--model", model, "--out", tmp_path / "other") == 1
    assert {row["error"] for row in table(tmp_path / "other")} == {
        "a fault of this program: ZeroDivisionError: division by zero"
    }


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_list(model, clips, tmp_path, kind, capsys):
    file = clips / f"list.{kind}"
    rows = [
        ("clip2.mp4", "the dog", ""),
        ("clip2.mp4", "a cat", ""),
        ("gone.mp4", "x", ""),
        ("clip2.mp4", "y", "twice"),
    ]
    if kind == "csv":
        file.write_text("video;sentence;name\n" + "".join(";".join(row) + "\n" for row in rows))
    else:
        keys = ("video", "sentence", "name")
        file.write_text("".join(json.dumps(dict(zip(keys, row))) + "\n" for row in rows))
    out = tmp_path / "out"
    assert run(file, "--model", model, "--out", out) == 1
    assert [(row["folder"], row["sentence"], row["status"]) for row in table(out)] == [
        ("clip2", "the dog", "done"),
        ("clip2", "a cat", "done"),
        ("gone", "", "failed"),
        ("twice", "y", "done"),
    ]
    assert "gone.mp4: no such video" in table(out)[2]["error"]


def test_it_is_interrupted_and_goes_on(model, clips, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    write = segment_run.write_mask
    count = 0

    def stops(path, mask):
        nonlocal count
        count += 1
        if count > FRAMES + 1:
            raise KeyboardInterrupt
        write(path, mask)

    arguments = (clips, "the dog", "--model", model, "--out", out)
    with monkeypatch.context() as patch:
        patch.setattr(segment_run, "write_mask", stops)
        assert run(*arguments) == 130
    assert [row["status"] for row in table(out)] == ["done", "interrupted", "waiting"]
    assert "finished parts are kept" in capsys.readouterr().err
    assert not list(out.rglob("*.part"))
    first = (out / "clip2" / "result.json").stat().st_mtime_ns
    assert run(*arguments, "--resume") == 0
    assert [row["status"] for row in table(out)] == ["done"] * 3
    assert (out / "clip2" / "result.json").stat().st_mtime_ns == first
    # alone, the video gives the same
    assert run(clips / "clip10.mp4", "the dog", "--model", model, "--out", tmp_path / "alone") == 0
    for path in (out / "clip10").glob("0*/*.png"):
        assert (tmp_path / "alone" / path.relative_to(out / "clip10")).read_bytes() == path.read_bytes()


def test_no_folder_is_shared(tmp_path):
    paths = ["a/clip.mp4", "b/clip.mov", "b/clip.mp4", "b/Clip.mp4", "results.csv.mp4", "c/other.mp4"]
    items = [Item(str(tmp_path / path), ("x",)) for path in paths]
    names = folder_names(items, {})
    assert names == ["a-clip", "b-clip", "b-clip-2", "b-clip-3", "results-csv", "other"]
    # a later run with one more video keeps them
    known = {key(item): name for item, name in zip(items, names)}
    more = [Item(str(tmp_path / "c/clip.mp4"), ("x",)), Item(str(tmp_path / "d/other.mp4"), ("x",)), *items]
    assert folder_names(more, known) == ["c-clip", "d-other", *names]
    assert folder_names([Item("x.mp4", ("x",), "one"), Item("x.mp4", ("x",), "one/two")], {}) == ["one", "one-two"]


@pytest.mark.parametrize(
    ("given", "sentences", "message"),
    [
        ("none*.mp4", ["x"], "no file has such a name"),
        ("empty", ["x"], "holds neither frames nor videos"),
        ("clip.mp4", [], "no sentence was given"),
        ("list.csv", ["x"], "a list has a sentence for each video"),
        ("none.csv", [], "no such file"),
        ("other.csv", [], "the first line has video, text; it must name the columns video, sentence"),
        ("empty.csv", [], "lists no video"),
        ("blank.csv", [], "blank.csv, line 2: the expression is empty"),
        ("broken.jsonl", [], "broken.jsonl, line 2"),
        ("lacks.jsonl", [], "lacks.jsonl, line 1: has no 'sentence'"),
    ],
)
def test_bad_lists_take_one_line(tmp_path, monkeypatch, capsys, given, sentences, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("list.csv").write_text("video,sentence\na.mp4,x\n")
    Path("other.csv").write_text("video,text\na.mp4,x\n")
    Path("empty.csv").write_text("video,sentence\n")
    Path("blank.csv").write_text("video,sentence\na.mp4, \n")
    Path("broken.jsonl").write_text('{"video": "a", "sentence": "x"}\n{"video"\n')
    Path("lacks.jsonl").write_text('{"video": "a"}\n')
    assert run(given, *sentences, "--out", "out") == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert message in error
    assert not Path("out").exists()


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    def refused(folder):
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "iterdir", refused)  # root reads every folder
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\)"):
        find_items(str(tmp_path), ["x"])


def test_a_shells_pattern_is_told(clips, tmp_path, capsys):
    assert run(clips / "clip2.mp4", clips / "clip10.mp4", "the dog", "--out", tmp_path / "out") == 2
    assert "for many videos give their folder, a pattern in quotes" in capsys.readouterr().err


def test_frames_of_one_video_are_one_video(clips):
    assert find_items(str(clips / "frames"), ["x"]) is None
    assert find_items(str(clips / "frames" / "a.png"), ["x"]) is None
    assert [Path(item.video).name for item in find_items(str(clips), ["x"])] == ["clip2.mp4", "clip10.mp4", "frames"]
    assert not video_list.looks_like_video("the dog")


def test_progress_tells_of_videos_not_of_stages(capsys):
    lines = _Lines()
    lines.title = "video 2 of 9 (dog), "
    for second, stage in ((20, "track"), (30, "overlay"), (90, "track")):
        lines.set(stage, 1, 4)
        lines.tick(lines._begin + second)
    assert capsys.readouterr().err.splitlines() == [
        "[00:20] video 2 of 9 (dog), track: 1 of 4",
        "[01:30] video 2 of 9 (dog), track: 1 of 4",
    ]
    with Progress(quiet=True) as shown:
        for number in (1, 2):
            shown.begin("dog", number, 2)
            shown("track", 1, 2)
        assert sorted(shown._tasks) == ["track", "videos"]


def test_timeline(clips, model, tmp_path, capsys):
    """Of one video: what was done, in which thread, within the time that it took."""
    trace, clip = tmp_path / "trace.json", clips / "clip2.mp4"
    arguments = ["segment", str(clip), "the dog", "--model", str(model), "--out", str(tmp_path / "out")]
    assert cli.main([*arguments, "--trace", str(tmp_path / "nowhere" / "trace.json")]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert cli.main([*arguments, "--trace", str(trace)]) == 0
    events = json.loads(trace.read_text())["traceEvents"]
    rows = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = {(event["name"], rows[event["tid"]].split("_")[0]) for event in events if event["ph"] == "X"}
    for name, row in (
        ("sample", "MainThread"),
        ("read", "MainThread"),
        ("anchors", "MainThread"),
        ("start tracking", "MainThread"),
        ("wait for masks", "MainThread"),
        ("download masks", "MainThread"),
        ("frames 0 to 2", "given to the device"),
        ("overlay", "overlay"),
        ("write PNG", "png"),
    ):
        assert (name, row) in spans, name
    assert sum(event["name"] == "write PNG" for event in events) == FRAMES
