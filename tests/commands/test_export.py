"""`virst export` of a result on the disk."""

import json
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
