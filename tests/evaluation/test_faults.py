"""An evaluation of many videos in which one thing is wrong: it fails by its name, and the rest goes on."""

import contextlib
import dataclasses
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.dataset_layouts import write_layout
from helpers.evaluation_cases import SETTINGS, files_of, predict_truth
from helpers.places import ROOT
from virst_jax.data.datasets.registry import open_dataset
from virst_jax.errors import UserError
from virst_jax.evaluation.benchmarks import VideoScores
from virst_jax.evaluation.offline_scoring import open_predictions, score_existing
from virst_jax.evaluation.predictions import PngReader, folder_of, mask_file
from virst_jax.evaluation.runner import evaluate, read_scores
from virst_jax.evaluation.submission import check_submission, write_pngs, write_submission
from virst_jax.evaluation.workers import Workers


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_layout("mevis", root, num_videos=3, seed=3)
    return root


def run(root, out, predict=predict_truth, **options):
    return evaluate(open_dataset("mevis", root), predict, out, SETTINGS, progress=False, **options)


def png_header(width, height):
    """A PNG of a few bytes that says to be large."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def write_predictions(root, folder):
    source = open_dataset("mevis", root)
    for video in source:
        for position, expression in enumerate(video.expressions):
            for name, mask in zip(video.frame_names, video.read_masks(position, range(video.num_frames))):
                path = folder / video.name / expression.id / f"{name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask.astype(np.uint8) * 255).save(path)
    return source


# a bad item


@pytest.mark.parametrize(
    "error", [ValueError("x\ud800\ny"), MemoryError(), ZeroDivisionError("x"), RecursionError("deep")]
)
def test_what_nobody_foresaw_in_one_video(root, tmp_path, error):
    def predict(video, expressions):
        if video.name.endswith("01"):
            raise error
        yield from predict_truth(video, expressions)

    outcome = run(root, tmp_path, predict)
    assert outcome.finished == 2
    assert list(outcome.errors) == ["valid_u_01"]
    assert type(error).__name__ in outcome.errors["valid_u_01"]
    assert "test_faults.py" in outcome.errors["valid_u_01"]
    assert outcome.summary is not None


def test_half_a_character_in_the_text_of_one_expression(root, tmp_path):
    class Odd:
        def __init__(self, whole):
            self.whole = whole

        def __getattr__(self, name):
            return getattr(self.whole, name)

        def __len__(self):
            return len(self.whole)

        def __getitem__(self, index):
            video = self.whole[index]
            if index != 1:
                return video
            first, *rest = video.expressions
            return dataclasses.replace(video, expressions=(dataclasses.replace(first, text="a\ud800"), *rest))

    outcome = evaluate(Odd(open_dataset("mevis", root)), predict_truth, tmp_path, SETTINGS, progress=False)
    assert (outcome.finished, list(outcome.errors)) == (2, ["valid_u_01"])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [(60000, 60000), (9000, 9000)])
def test_a_huge_header_among_predictions(root, tmp_path, workers, size):
    source = write_predictions(root, tmp_path)
    (tmp_path / "valid_u_01" / "2" / "00005.png").write_bytes(png_header(*size))
    scores, errors = score_existing(source, open_predictions(source, tmp_path), workers=workers, progress=False)
    assert (len(scores), list(errors)) == (2, ["valid_u_01"])
    assert "00005.png" in errors["valid_u_01"]


def test_a_pipe_among_predictions(root, tmp_path):
    source = write_predictions(root, tmp_path)
    path = tmp_path / "valid_u_01" / "2" / "00005.png"
    path.unlink()
    os.mkfifo(path)
    _, errors = score_existing(source, open_predictions(source, tmp_path), progress=False)
    assert list(errors) == ["valid_u_01"]
    assert "pipe" in errors["valid_u_01"]


DAMAGED = [b"", b"{", b"[]", b"null", b"[" * 99999, b'{"fingerprint": 3}', b"\xff\xfe\x00", b"9" * 5000]


@pytest.mark.parametrize("content", DAMAGED, ids=lambda c: str(c[:12]))
def test_damaged_files_of_results(root, tmp_path, content):
    first = run(root, tmp_path)
    names = open_dataset("mevis", root).names
    scores = tmp_path / "scores" / f"{names[0]}.json"
    masks = mask_file(tmp_path / "masks", names[1], "0")
    before = files_of(tmp_path)
    for path in (scores, masks):
        path.write_bytes(content)
    assert read_scores(tmp_path, names[0]) is None
    again = run(root, tmp_path)
    assert again.computed == (names[1],)
    assert files_of(tmp_path) == before
    assert again.summary == first.summary

    # what another process has written: its share is not made again by this one
    (tmp_path / "errors").mkdir(exist_ok=True)
    (tmp_path / "errors" / f"{names[1]}.json").write_bytes(content)
    scores.write_bytes(content)
    outcome = run(root, tmp_path, process_index=2, process_count=3)
    assert (outcome.finished, outcome.pending, outcome.summary) == (1, 1, None)
    assert "the reason is lost" in outcome.errors[names[1]]

    (tmp_path / "settings.json").write_bytes(content)
    with pytest.raises(UserError, match=r"settings\.json.*delete it to go on"):
        run(root, tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"J": "x"}, {"J": None}, {"J": float("nan")}, {"frames": 1.5}, {"video": 3}, {"more": 1}, {"J": 10**400}],
    ids=str,
)
def test_scores_of_another_form_are_made_again(root, tmp_path, change):
    run(root, tmp_path)
    path = tmp_path / "scores" / "valid_u_00.json"
    whole = path.read_bytes()
    data = json.loads(whole)
    data["rows"][0].update(change)
    path.write_text(json.dumps(data))
    assert read_scores(tmp_path, "valid_u_00") is None
    run(root, tmp_path)
    assert path.read_bytes() == whole


# names


@pytest.mark.parametrize("name", ["../x", "/x", "a\\b", "\ud800", "a\x00"], ids=ascii)
def test_names_that_lead_elsewhere_are_not_written(root, tmp_path, name):
    video = open_dataset("mevis", root)[0]

    def read_pred(video, position, frames):
        raise AssertionError

    first, *rest = video.expressions
    odd = [
        dataclasses.replace(video, name=name),
        dataclasses.replace(video, expressions=(dataclasses.replace(first, id=name), *rest)),
        dataclasses.replace(video, frame_names=(name, *video.frame_names[1:])),
    ]
    truth = PngReader(str(tmp_path / "pred"))
    write_predictions(root, tmp_path / "pred")
    for wrong in odd:
        with pytest.raises(UserError):
            write_pngs(wrong, truth, tmp_path / "out" / "deep")
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "out" / "x").exists()
    with pytest.raises(UserError):
        truth(odd[1], 0, [0])


def test_names_in_any_script_have_a_file(tmp_path):
    name = "狗" * 80
    path = mask_file(tmp_path, name, name)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    assert folder_of(tmp_path, name) != folder_of(tmp_path, name[:-1] + "猫")


# archives


@pytest.fixture
def archive(root, tmp_path):
    folder = tmp_path / "pred"
    source = write_predictions(root, folder)
    write_submission(source, PngReader(str(folder)), tmp_path / "good.zip", progress=False)
    return source, tmp_path / "good.zip"


def rewritten(path, name, content, **options):
    """The archive with another content for an entry."""
    other = path.with_name("other.zip")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w") as new:
        for info in old.infolist():
            data = content if info.filename == name else old.read(info)
            new.writestr(info.filename, data, **(options if info.filename == name else {}))
    return other


def test_an_entry_that_inflates_to_gigabytes(archive):
    source, path = archive
    name = "valid_u_00/0/00005.png"
    bomb = rewritten(path, name, bytes(1 << 27), compress_type=zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 1 << 20
    with pytest.raises(UserError, match=rf"{name} unpacks to 134217728 bytes"):
        check_submission(source, bomb, progress=False)


@pytest.mark.parametrize("content", [png_header(60000, 60000), b"", b"\x89PNG\r\n\x1a\n", png_header(64, 48)])
def test_entries_that_are_no_masks(archive, content):
    source, path = archive
    with pytest.raises(UserError, match=r"valid_u_00/0/00005\.png"):
        check_submission(source, rewritten(path, "valid_u_00/0/00005.png", content), progress=False)


def test_an_entry_without_a_name(archive, tmp_path):
    source, path = archive
    other = tmp_path / "other.zip"
    other.write_bytes(path.read_bytes())
    with zipfile.ZipFile(other, "a") as zipped:
        zipped.writestr("x", b"")
        zipped.infolist()[-1].filename = ""
    with pytest.raises(UserError, match="holds an entry without a name, which the server does not expect"):
        check_submission(source, other, progress=False)


def test_archives_that_are_none(archive, tmp_path):
    source, path = archive
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for trial in range(60):
        changed = bytearray(whole)
        for at in rng.integers(0, len(whole), 1 + trial % 5):
            changed[at] = rng.integers(256)
        (tmp_path / "x.zip").write_bytes(changed[: len(whole) - 50 * (trial % 3)])
        with contextlib.suppress(UserError):
            check_submission(source, tmp_path / "x.zip", progress=False)
    os.mkfifo(tmp_path / "pipe.zip")
    with pytest.raises(UserError, match="pipe"):
        check_submission(source, tmp_path / "pipe.zip", progress=False)


def test_a_damaged_entry_is_told_in_a_short_line(archive, tmp_path):
    """Found by the fuzzer: Python's message quotes as many bytes as the header says its name has."""
    source, path = archive
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as good:
        at = good.getinfo("valid_u_00/0/00005.png").header_offset
    content[at + 26 : at + 28] = b"\x00\x08"  # the length of the name
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(UserError, match=r"valid_u_00/0/00005\.png is damaged") as error:
        check_submission(source, tmp_path / "x.zip", progress=False)
    assert len(str(error.value)) < 600


# processes


class Deadly:
    """Scores that kill their process for one video."""

    def __init__(self, doomed):
        self.doomed = doomed

    def __call__(self, source, index):
        if index in self.doomed:
            os.kill(os.getpid(), signal.SIGKILL)
        return VideoScores(())


def test_a_worker_that_is_killed_fails_its_own_video(root):
    pool = Workers(open_dataset("mevis", root), Deadly({1}), 2)
    for index in range(5):
        pool.submit(f"v{index}", index)
    outcome = {}
    for name, result in pool.results(wait=True):
        try:
            outcome[name] = result()
        except UserError as error:
            outcome[name] = str(error)
    pool.close()
    assert {name for name, value in outcome.items() if value == VideoScores(())} == {"v0", "v2", "v3", "v4"}
    assert "video v1: the process that scored it was killed" in outcome["v1"]


SLEEPER = """
import sys, time
sys.path[:0] = {paths!r}
from evaluation.test_faults import Sleep
from virst_jax.data.datasets.registry import open_dataset
from virst_jax.evaluation.workers import Workers
if __name__ == "__main__":
    pool = Workers(open_dataset("mevis", {root!r}), Sleep({marker!r}), 2)
    for index in range(2):
        pool.submit(str(index), index)
    time.sleep(600)
"""


class Sleep:
    def __init__(self, marker):
        self.marker = marker

    def __call__(self, source, index):
        Path(f"{self.marker}.{os.getpid()}").touch()
        time.sleep(600)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_a_killed_evaluation(root, tmp_path, how):
    program = tmp_path / "program.py"
    paths = [str(ROOT), str(ROOT / "tests")]
    program.write_text(SLEEPER.format(paths=paths, root=str(root), marker=str(tmp_path / "worker")))
    process = subprocess.Popen([sys.executable, str(program)])
    try:
        wait_for(lambda: len(list(tmp_path.glob("worker.*"))) == 2)
        workers = [int(path.suffix[1:]) for path in tmp_path.glob("worker.*")]
        process.send_signal(how)
        process.wait(timeout=30)
        wait_for(lambda: not any(map(alive, workers)))
    finally:
        process.kill()


def wait_for(happened, seconds=90):
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.05)


def alive(process):
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_leftovers_of_killed_runs_are_removed(root, tmp_path):
    run(root, tmp_path)
    before = files_of(tmp_path)
    for place in ("masks/valid_u_00/.0.json.part", "scores/.valid_u_02.json.part", ".settings.json.part"):
        (tmp_path / place).write_bytes(b"half")
    run(root, tmp_path)
    assert files_of(tmp_path) == before
