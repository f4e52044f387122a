"""`virst export` of a result on the disk."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from virst_jax import cli
from virst_jax.io.masks import encode_mask


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """As `virst segment` writes it: two frames, an object that is seen on one."""
    folder = tmp_path / "masks"
    folder.mkdir()
    seen, nothing = np.zeros((8, 12), bool), np.zeros((8, 12), bool)
    seen[2:5, 3:9] = True
    record: dict[str, Any] = {
        "expression": "the dog",
        "folder": "01-the-dog",
        "areas": [18, 0],
        "boxes": [[3, 2, 6, 3], None],
        "rle": [{"size": [8, 12], "counts": encode_mask(mask)} for mask in (seen, nothing)],
        "scores": [2.5, -1.0],
    }
    data = {
        "video": {"path": "films/dog.mp4"},
        "expressions": ["the dog"],
        "size": {"height": 8, "width": 12},
        "fps": 5.0,
        "frames": [0, 1],
        "frame_names": ["a", "b"],
        "times": [0.0, 0.2],
        "objects": [record],
    }
    (folder / "result.json").write_text(json.dumps(data))
    return folder


def test_formats(result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(result), "--format", "csv", "--out", str(tmp_path / "csv")]) == 0
    assert (tmp_path / "csv" / "boxes.csv").read_text().splitlines()[1:] == [
        "1,the dog,0,a,0.000000,2.5,18,3,2,6,3",
        "1,the dog,1,b,0.200000,-1.0,0,,,,",
    ]
    assert cli.main(["export", str(result), "--format", "davis", "--out", str(tmp_path / "davis")]) == 0
    with Image.open(tmp_path / "davis" / "Annotations" / "dog" / "a.png") as image:
        assert np.asarray(image).sum() == 18
    assert capsys.readouterr().out.count("wrote") == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(frame_names=["../../a", "b"]), "the frame's name '../../a' holds a slash"),
        (lambda r: r.update(frame_names=["/a", "b"]), "holds a slash"),
        (lambda r: r.update(frame_names=["..", "b"]), "leads out of its folder"),
        (lambda r: r.update(frame_names=["a", "a"]), "two frames are named 'a'"),
        (lambda r: r.update(frame_names=["a", 7]), "frame_names[1]: expected text"),
        (lambda r: r.update(size={"height": "8", "width": 12}), "size.height: expected a whole number"),
        (lambda r: r.update(size=[8, 12]), "size: expected an object"),
        (lambda r: r.update(size={"height": 1 << 40, "width": 12}), "from 1 to 65536"),
        (lambda r: r.update(fps="5"), "fps: expected a number"),
        (lambda r: r.update(times=[0.0]), "times: expected 2 numbers"),
        (lambda r: r.update(video="dog.mp4"), "video: expected an object"),
        (lambda r: r["objects"][0].update(object_id=0), "object_id: expected a whole number of 1 or more"),
        (lambda r: r["objects"][0].update(object_id=1 << 20), "numbers from 1 to 65535 can be written"),
        (lambda r: r["objects"][0].update(scores=[2.5, "x"]), "scores[1]: expected a number"),
        (lambda r: r["objects"][0].update(rle=[None, 3]), "result.json, 'the dog'"),
    ],
)
def test_a_result_of_others_leads_nowhere_else(
    result: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    file = result / "result.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["export", str(result), "--format", "png-ids", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_video_of_a_name_that_makes_no_file(result: Path, tmp_path: Path) -> None:
    file = result / "result.json"
    file.write_text(file.read_text().replace("films/dog.mp4", "films/aux.mp4"))
    assert cli.main(["export", str(result), "--format", "davis", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "Annotations" / "video" / "a.png").is_file()


@pytest.mark.parametrize(
    ("kind", "spoiled", "message"),
    [
        ("csv", '{"frames"', "holds no whole result.json"),
        ("webm-alpha", None, "films/dog.mp4: no such video"),
        ("coco", "damaged", "result.json, 'the dog'"),
    ],
)
def test_bad_input(
    result: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    spoiled: str | None,
    message: str,
) -> None:
    file = result / "result.json"
    if spoiled == "damaged":
        data = json.loads(file.read_text())
        data["objects"][0]["rle"][0]["counts"] = "0"
        file.write_text(json.dumps(data))
    elif spoiled is not None:
        file.write_text(spoiled)
    assert cli.main(["export", str(result), "--format", kind, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
