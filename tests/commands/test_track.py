"""`virst track` with a small tracker."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from helpers.network import CFG, params
from virst_jax import cli, load_tracker
from virst_jax.commands import segment_results, track
from virst_jax.errors import UserError
from virst_jax.inference.automatic import AutomaticOptions
from virst_jax.io import model_folder, tracker_folder

FRAMES, HEIGHT, WIDTH = 5, 24, 32
THRESHOLDS = {"iou_threshold": 0.0, "stability_threshold": 0.0, "overlap_threshold": 1.0}


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


def test_everything_in_an_image(
    tracker: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask for each of what `find_masks` finds, its figures beside it, and an export of it."""
    found = load_tracker(tracker).find_masks(video / "00000.png", AutomaticOptions(points_per_side=2, **THRESHOLDS))
    assert len(found) > 1
    out = tmp_path / "out"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in THRESHOLDS.items()]
    arguments = ["track", str(video / "00000.png"), "--model", str(tracker), "--everything", "--points-per-side", "2"]
    assert cli.main([*arguments, *options, "--out", str(out), "--quiet"]) == 0
    assert f"'object {len(found)}': found in 1 of 1 frames" in capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    assert result["prompts"] == [["everything", ""]]
    assert [x["object_id"] for x in result["objects"]] == list(range(1, len(found) + 1))
    for record, mask in zip(result["objects"], found):
        assert (read(out / record["folder"] / f"{result['frame_names'][0]}.png") == mask.mask).all()
        assert record["areas"] == [mask.area]
        assert record["predicted_iou"] == pytest.approx(mask.predicted_iou, abs=1e-4)
        assert record["point"] == pytest.approx(mask.point, abs=1e-2)
    coco = tmp_path / "coco"
    assert cli.main(["export", str(out), "--format", "coco", "--out", str(coco)]) == 0
    assert len(json.loads((coco / "annotations.json").read_text())["annotations"]) == len(found)
    # without names, where there are too many of them
    with Image.open(out / "preview.png") as before:
        height = before.height
    monkeypatch.setattr(segment_results, "MOST_NAMED", 1)
    assert cli.main([*arguments, *options, "--out", str(out), "--overwrite", "--quiet"]) == 0
    with Image.open(out / "preview.png") as after:
        assert after.height < height


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
        (["--everything"], "has 5 frames; --everything looks at one image"),
        (["--everything", "--point", "1,1"], "--everything needs no prompt; leave out --point"),
        (["--point", "1,1", "--crop-layers", "1"], "--crop-layers belongs to --everything"),
        (["--everything", "--iou-threshold", "1.5"], "iou_threshold is 1.5"),
        (["--point", "1,-1"], "outside of the frame"),
        (["--negative", "nan,1"], "finite numbers"),
        (["--box=-1,2,30,20"], "leaves the frame"),
        (["--mask", "MASK"], "the mask is 8x8 pixels, the video 32x24"),
        (["--frame", "-1", "--point", "1,1"], "no frame -1"),
        (["--point", "1,1", "--first", "3", "--last", "2"], "frame"),
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
    """And an earlier result stays as it is."""
    out, other = tmp_path / "out", tmp_path / "other.png"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(other)
    arguments = [str(other) if x == "MASK" else x for x in arguments]
    (out / "01-object-1").mkdir(parents=True)
    for file in (out / "result.json", out / "01-object-1" / "00000.png"):
        file.write_text("{}")
    arguments = [*arguments, "--overwrite"]
    assert cli.main(["track", str(video), "--model", str(tracker), *arguments, "--out", str(out), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert (out / "result.json").read_text() == (out / "01-object-1" / "00000.png").read_text() == "{}"
