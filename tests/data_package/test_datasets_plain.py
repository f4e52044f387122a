"""One's own videos without JSON."""

import argparse
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from virst_jax.commands import data
from virst_jax.data.datasets.registry import guess_name, open_dataset
from virst_jax.data.datasets.validate import check
from virst_jax.data.samples import Video
from virst_jax.errors import UserError
from virst_jax.io.video_writer import VideoWriter

HEIGHT, WIDTH, FRAMES = 32, 48, 3
TABLE = """video,sentence,object
dogs,The  red dog,1
dogs,"both dogs, running",1 2
cat,what moves?,
"""


def masks(seed: int) -> np.ndarray:
    """Object numbers uint8[T, H, W]: two boxes that move."""
    out = np.zeros((FRAMES, HEIGHT, WIDTH), np.uint8)
    for t in range(FRAMES):
        out[t, 4:12, 4 + 3 * t : 14 + 3 * t] = 1
        out[t, 18:28, 30 - 2 * t - seed : 40 - 2 * t - seed] = 2
    return out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Frames with masks of numbers, and a video file with masks of 0 and 255."""
    root = tmp_path / "mine"
    pixels = np.random.default_rng(0).integers(0, 256, (FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8)
    for name, label in (("dogs", masks(0)), ("cat", (masks(1) > 0) * np.uint8(255))):
        (root / "masks" / name).mkdir(parents=True)
        names = [f"img{t}" for t in (8, 9, 10)] if name == "dogs" else [f"{t:05d}" for t in range(FRAMES)]
        for frame, mask in zip(names, label):
            Image.fromarray(mask).save(root / "masks" / name / f"{frame}.png")
    (root / "frames" / "dogs").mkdir(parents=True)
    for t, image in zip((8, 9, 10), pixels):
        Image.fromarray(image).save(root / "frames" / "dogs" / f"img{t}.png")
    (root / "videos").mkdir()
    with VideoWriter(root / "videos" / "cat.mp4", (HEIGHT, WIDTH), 5) as writer:
        for image in pixels:
            writer.write(image)
    (root / "sentences.csv").write_text(TABLE)
    return root


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_samples(folder: Path, delimiter: str) -> None:
    """Frames in the order that people count, a video file beside them; numbers of objects, and all that is not 0."""
    lines = [["video", "sentence", "object"], ["dogs", "The red dog", "1"], ["dogs", "both dogs", "1 2"]]
    lines.append(["cat", "what moves?", ""])
    text = "\ufeff" + "".join(delimiter.join(line) + "\n" for line in lines)
    (folder / "sentences.csv").write_text(text, encoding="utf-8")
    assert guess_name(folder) == "custom"
    source = pickle.loads(pickle.dumps(open_dataset("custom", folder)))
    assert source.names == ["dogs", "cat"]
    assert source.problems == ()
    dogs, cat = source
    assert isinstance(dogs, Video)
    assert dogs.frame_names == ("img8", "img9", "img10")
    assert [e.text for e in dogs.expressions] == ["The red dog", "both dogs"]
    assert dogs.read_masks is not None
    assert (dogs.read_masks(0, [0, 2]) == (masks(0)[[0, 2]] == 1)).all()
    assert (dogs.read_masks(1, range(FRAMES)) == (masks(0) > 0)).all()
    assert (cat.num_frames, cat.size, cat.frame_names) == (FRAMES, (HEIGHT, WIDTH), ("00000", "00001", "00002"))
    assert cat.read_frames([2, 0]).shape == (2, HEIGHT, WIDTH, 3)
    assert (cat.read_masks(0, range(FRAMES)) == (masks(1) > 0)).all()


def test_a_folder_without_splits_is_for_training(folder: Path) -> None:
    assert open_dataset("custom", folder, "train").names == open_dataset("custom", folder).names
    args = argparse.Namespace(dataset="custom", folder=folder, split=None)
    assert [source.split for source in data._sources(args)] == [""]  # it is checked once
    with pytest.raises(UserError, match="mine/valid: holds no"):
        open_dataset("custom", folder, "valid")
    (folder / "train").mkdir()
    with pytest.raises(UserError, match="mine/train: holds no"):
        open_dataset("custom", folder, "train")


def test_a_folder_that_is_right_has_no_problems(folder: Path) -> None:
    report = check(open_dataset("custom", folder))
    assert report.problems == ()
    assert (report.kept_samples, report.kept_expressions) == (2, 3)


def test_a_split(folder: Path) -> None:
    folder.rename(folder.parent / "train")
    assert len(open_dataset("custom", folder.parent, "train")) == 2


def test_what_is_wrong_is_told(folder: Path) -> None:
    (folder / "masks" / "dogs" / "img9.png").unlink()
    lines = ["dogs,the blue dog,two", "../x,the dog,1", "dogs,,1", "bird,the bird,1", "cat,the second,2"]
    (folder / "sentences.csv").write_text(TABLE + "\n".join(lines) + "\n")
    source = open_dataset("custom", folder)
    assert [problem.where.rpartition(", ")[2] for problem in source.problems] == ["line 5", "line 6", "line 7"]
    told = "\n".join(map(str, check(source).problems))
    assert "img9.png" in told
    assert "there is no such video" in told
    assert "holds 0 and 255 as the mask of one object does" in told


@pytest.mark.parametrize(
    ("content", "message"),
    [("name,text\na,b\n", "has name, text; it must name the columns video, sentence, object"), ("", "has nothing")],
)
def test_a_table_that_is_none(folder: Path, content: str, message: str) -> None:
    (folder / "sentences.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        open_dataset("custom", folder)


def test_two_videos_of_one_name(folder: Path) -> None:
    (folder / "videos" / "cat.avi").write_bytes(b"")
    with pytest.raises(UserError, match=r"cat\.avi and cat\.mp4"):
        open_dataset("custom", folder)[1]


def test_numbers_and_cells_of_any_length(folder: Path) -> None:
    line = f'dogs,the dog,{"9" * 5000}\ndogs,"the dog\nthat runs",1\ndogs,the\u2028cat\x0bnear it,2\n'
    (folder / "sentences.csv").write_text(TABLE + line, encoding="utf-8")
    source = open_dataset("custom", folder)
    (problem,) = source.problems
    assert "line 5" in problem.where
    assert "give numbers from 1 to 254" in str(problem)
    assert [len(video.expressions) for video in source] == [4, 1]


def test_a_table_that_is_no_text(folder: Path) -> None:
    table = folder / "sentences.csv"
    table.write_bytes(TABLE.encode() + b"dogs,caf\xe9,1\n")
    with pytest.raises(UserError, match=r"no text in UTF-8.*save it as CSV in UTF-8"):
        open_dataset("custom", folder)
