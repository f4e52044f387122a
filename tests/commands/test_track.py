"""`virst track` with a small tracker."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from helpers.network import CFG, params
from virst_jax import cli
from virst_jax.commands import track
from virst_jax.errors import UserError
from virst_jax.io import model_folder, tracker_folder

FRAMES, HEIGHT, WIDTH = 5, 24, 32


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("track") / "tracker"
    folder.mkdir()
    given = jax.tree.map(np.asarray, params()["sam2"])
    model_folder.write_parameters(folder / model_folder.PARAMS, given)
    tracker_folder.write_description(folder, CFG.sam2, given)
    return folder


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("video")
    pixels = np.random.default_rng(0).integers(0, 256, (FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8)
    for t, frame in enumerate(pixels):
        Image.fromarray(frame).save(folder / f"{t:05d}.png")
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[5:15, 10:20] = 255
    Image.fromarray(mask).save(folder.parent / "mask.png")
    return folder


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)) > 0


def test_a_point_and_a_mask(tracker: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two objects, one from a mask on a later frame; every frame of both has an image of its mask."""
    out = tmp_path / "out"
    prompts = ["--point", "12,10", "--negative", "30,2", "--object", "4", "--frame", "2"]
    prompts += ["--mask", str(video.parent / "mask.png")]
    arguments = ["track", str(video), "--model", str(tracker), *prompts, "--out", str(out), "--quiet"]
    assert cli.main(arguments) == 0
    assert "'object 4': found" in capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    assert [x["object_id"] for x in result["objects"]] == [1, 4]
    assert [x["anchors"] for x in result["objects"]] == [[0], [2]]
    for record in result["objects"]:
        areas = [read(out / record["folder"] / f"{t:05d}.png").sum() for t in range(FRAMES)]
        assert areas == record["areas"]
        assert len(record["scores"]) == FRAMES
    # the mask that was given is that of its frame, but for what the tracker's quarter-size grid rounds
    given, kept = read(video.parent / "mask.png"), read(out / "04-object-4" / "00002.png")
    assert (given & kept).sum() / (given | kept).sum() > 0.7
    assert (out / "overlay.mp4").stat().st_size > 0
    assert cli.main(arguments) == 2
    assert "exists already" in capsys.readouterr().err


def test_prompts_hold_for_what_follows() -> None:
    texts, given = track.read_prompts(
        [
            ("point", "1,2"),
            ("negative", "3,4.5"),
            ("frame", 7),
            ("box", "1,2,3,4"),
            ("object", 2),
            ("point", "5,6"),
            ("text", "the dog"),
        ]
    )
    assert texts == {2: "the dog"}
    assert list(given) == [(1, 0), (1, 7), (2, 7)]
    assert given[1, 0].points == [(1, 2), (3, 4.5)]
    assert given[1, 0].labels == [1, 0]
    assert given[1, 7].box == (1, 2, 3, 4)
    assert given[2, 7].points == [(5, 6)]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompt"),
        ([("frame", 3)], "no prompt"),
        ([("point", "1;2")], "--point 1;2: give 2 numbers"),
        ([("box", "1,2,3")], "--box 1,2,3: give 4 numbers"),
        ([("box", "1,2,3,4"), ("box", "1,2,3,4")], "object 1, frame 0: two boxes"),
        ([("text", "a"), ("text", "b")], "two sentences"),
    ],
)
def test_prompts_that_are_none(prompts: list[tuple[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        track.read_prompts(prompts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--point", "32,3"], "outside of the frame of 32x24"),
        (["--frame", "5", "--point", "1,1"], "no frame 5"),
        (["--object", "0", "--point", "1,1"], "numbered from 1"),
        (["--box", "9,9,3,3"], "has no area"),
        (["--text", "the dog"], "reads no sentences"),
        (["--point", "1,1", "--start", "9"], "no frame 9"),
    ],
)
def test_bad_input_takes_one_line(
    tracker: Path,
    video: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    out = tmp_path / "out"
    assert cli.main(["track", str(video), "--model", str(tracker), *arguments, "--out", str(out), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
