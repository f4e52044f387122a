"""Masks on disk: what is written is read, and what is damaged, missing or of another kind is told."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from virst_jax.data.samples import Expression, Video
from virst_jax.errors import UserError
from virst_jax.evaluation import bitmask, predictions
from virst_jax.evaluation.predictions import PngReader, StoredMasks, StoredReader
from virst_jax.io.masks import encode_mask

SIZE = (30, 70)


def make_video(name="a/b c", num_frames=3, ids=("0", "x/y"), frame_names=("7", "8", "9")):
    return Video(name, num_frames, SIZE, tuple(Expression(f"say {i}", i) for i in ids), None, None, frame_names)


def random_masks(num_frames=3, size=SIZE, seed=0):
    masks = np.random.default_rng(seed).random((num_frames, *size)) > 0.7
    masks[1] = False
    return masks


def stored(video, position, masks, fingerprint="f"):
    expression = video.expressions[position]
    counts = tuple(encode_mask(mask) for mask in masks)
    return StoredMasks(video.name, expression.id, expression.text, fingerprint, SIZE, counts, (0.5,) * len(masks))


def test_written_masks_are_read(tmp_path):
    video, masks = make_video(), random_masks()
    for position in range(2):
        path = predictions.write_masks(tmp_path, stored(video, position, masks))
        assert predictions.read_masks(path) == stored(video, position, masks)
        np.testing.assert_array_equal(StoredReader(str(tmp_path))(video, position, [2, 0]), bitmask.pack(masks[[2, 0]]))
    assert path.parent == tmp_path / "a" / "b c"
    assert path.name == "x%2Fy.json"  # a slash of an id leads nowhere
    assert [f.name for f in path.parent.iterdir() if f.suffix != ".json"] == []


@pytest.mark.parametrize("name", ["../up", "a//b", "", "/abs", "a/./b"])
def test_names_that_lead_elsewhere_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="cannot be named"):
        predictions.folder_of(tmp_path, name)


def test_masks_that_are_not_those_of_the_video_are_told():
    video, masks = make_video(), random_masks()
    good = stored(video, 0, masks)
    assert predictions.check_masks(good, video, 0, "f") == ""
    cases = {
        "other settings": dataclasses.replace(good, fingerprint="g"),
        "expression x/y": stored(video, 1, masks),
        "for the text": dataclasses.replace(good, text="other"),
        "30x71": dataclasses.replace(good, size=(30, 71)),
        "2 frames": dataclasses.replace(good, counts=good.counts[:2]),
    }
    for message, wrong in cases.items():
        assert message in predictions.check_masks(wrong, video, 0, "f")


def test_damaged_files_are_told(tmp_path):
    video = make_video()
    path = predictions.write_masks(tmp_path, stored(video, 0, random_masks()))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a file of masks"):
        predictions.read_masks(path)
    content = json.loads(whole)
    content["counts"][0] = content["counts"][1]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="checksum"):
        predictions.read_masks(path)
    path.unlink()
    with pytest.raises(UserError, match=f"{path}: no such file"):
        StoredReader(str(tmp_path))(video, 0, [0])


def save(folder, masks, value=255, mode="L"):
    folder.mkdir(parents=True, exist_ok=True)
    for name, mask in zip(("7", "8", "9"), masks, strict=True):
        image = Image.fromarray(np.where(mask, np.uint8(value), np.uint8(0)))
        if mode == "P":
            image = Image.fromarray(mask.astype(np.uint8), "L").convert("P")
            image.putpalette([0, 0, 0, 128, 0, 0])
            image = Image.frombytes("P", image.size, mask.astype(np.uint8).tobytes())
            image.putpalette([0, 0, 0, 128, 0, 0])
        image.convert(mode).save(folder / f"{name}.png")


@pytest.mark.parametrize("root", ["", "Annotations"])
@pytest.mark.parametrize("folder", ["a/b c", "b c"])
@pytest.mark.parametrize(("value", "mode"), [(255, "L"), (1, "L"), (255, "1"), (255, "RGB"), (1, "P")])
def test_pngs_of_other_systems(tmp_path, root, folder, value, mode):
    masks = random_masks()
    save(tmp_path / root / folder / "0", masks, value, mode)
    got = PngReader(str(tmp_path))(make_video(), 0, [1, 2])
    np.testing.assert_array_equal(got, bitmask.pack(masks[1:]))


def test_bad_pngs_are_named(tmp_path):
    video, masks, folder = make_video(), random_masks(), tmp_path / "a/b c/0"
    read = PngReader(str(tmp_path))
    with pytest.raises(UserError, match=r"a/b c/0: no such folder; .* expression 0 of video a/b c are missing"):
        read(video, 0, [0])
    save(folder, masks)
    (folder / "8.png").unlink()
    with pytest.raises(UserError, match=r"8\.png: no such file"):
        read(video, 0, [0, 1])
    whole = (folder / "7.png").read_bytes()
    (folder / "7.png").write_bytes(whole[:60])
    with pytest.raises(UserError, match=r"7\.png: truncated"):
        read(video, 0, [0])
    Image.fromarray(np.full(SIZE, 128, np.uint8)).save(folder / "7.png")
    with pytest.raises(UserError, match=r"7\.png: holds the values \[128\]"):
        read(video, 0, [0])
    Image.fromarray(np.zeros((30, 71), np.uint8)).save(folder / "7.png")
    with pytest.raises(UserError, match=r"7\.png: a mask of 30x71 pixels, the video has 30x70"):
        read(video, 0, [0])
