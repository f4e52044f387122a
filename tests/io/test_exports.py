"""Masks in the forms that other programs read, read back by others."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from virst_jax.errors import UserError
from virst_jax.inference.plan import Plan
from virst_jax.inference.results import Segmentation
from virst_jax.io import exports
from virst_jax.io.video import open_video

HEIGHT, WIDTH, FRAMES = 24, 32, 3
IDS = (2, 7)


def masks() -> np.ndarray:
    """A box that moves, and a ring, which is gone from the last frame; they overlap on the first."""
    out = np.zeros((2, FRAMES, HEIGHT, WIDTH), bool)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    radius = (y - 12) ** 2 + (x - 20) ** 2
    for t in range(FRAMES):
        out[0, t, 4:14, 2 + 5 * t : 18 + 5 * t] = True
    out[1, :2] = (radius < 81) & (radius >= 16)
    return out


def mask_set() -> exports.MaskSet:
    given = masks()
    names = [f"frame{t}" for t in range(FRAMES)]
    scores = [[1.5, 2.0, None], [3.0, 0.5, -4.0]]
    sentences = ["the box", 'a "ring", round']
    return exports.MaskSet(
        "dog", sentences, IDS, names, (HEIGHT, WIDTH), 10, [0, 0.1, 0.2], scores, lambda t: given[:, t]
    )


def test_coco_is_read_by_pycocotools(tmp_path: Path) -> None:
    from pycocotools.coco import COCO

    folder = exports.export("coco", mask_set(), tmp_path / "out")
    read = COCO(str(folder / "annotations.json"))
    assert [read.cats[i]["name"] for i in sorted(read.cats)] == ["the box", 'a "ring", round']
    seen = np.zeros_like(masks())
    for item in read.anns.values():
        mask = read.annToMask(item).astype(bool)
        seen[IDS.index(item["track_id"]), read.imgs[item["image_id"]]["frame"]] = mask
        left, top, width, height = item["bbox"]
        assert mask[top : top + height, left : left + width].sum() == mask.sum() == item["area"]
    assert (seen == masks()).all()


def test_coco_of_a_video(tmp_path: Path) -> None:
    from pycocotools import mask as codes

    data = json.loads((exports.export("coco-video", mask_set(), tmp_path / "out") / "annotations.json").read_text())
    assert data["videos"][0]["length"] == FRAMES
    for item, given in zip(data["annotations"], masks(), strict=True):
        for code, area, box, mask in zip(item["segmentations"], item["areas"], item["bboxes"], given, strict=True):
            assert (code is None) == (area is None) == (box is None) == (not mask.any())
            if code is not None:
                assert (codes.decode(code).astype(bool) == mask).all()


def test_yolo_outlines_give_the_masks_back(tmp_path: Path) -> None:
    """A line for each object, which two programs fill by different rules; corners are cut by half a pixel."""
    from matplotlib.path import Path as Outline

    folder = exports.export("yolo", mask_set(), tmp_path / "out")
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    centres = np.stack([x, y], -1).reshape(-1, 2) + 0.5
    for t in range(FRAMES):
        lines = (folder / "labels" / f"frame{t}.txt").read_text().splitlines()
        assert [int(line.split()[0]) for line in lines] == [0, 1][: masks()[:, t].any((1, 2)).sum()]
        for line, given in zip(lines, masks()[:, t]):
            points = np.array(line.split()[1:], float).reshape(-1, 2) * (WIDTH, HEIGHT)
            image = Image.new("1", (WIDTH, HEIGHT))
            ImageDraw.Draw(image).polygon([(x, y) for x, y in points - 0.5], fill=1, outline=0)
            inside = Outline(np.concatenate([points, points[:1]])).contains_points(centres).reshape(HEIGHT, WIDTH)
            for drawn in (np.asarray(image), inside):
                assert (drawn & given).sum() / (drawn | given).sum() > 0.75
            assert not inside[12, 20] or given[12, 20]  # the hole of the ring
    assert '  1: "a \\"ring\\", round"' in (folder / "data.yaml").read_text()


def test_parts_of_an_object_are_one_outline() -> None:
    from matplotlib.path import Path as Outline

    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[2:9, 3:9] = mask[12:20, 15:30] = mask[3:5, 20:22] = True
    mask[14:17, 18:22] = False
    points = exports.joined_outline(mask)
    assert points is not None
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    near_centres = np.stack([x + 0.513, y + 0.507], -1).reshape(-1, 2)  # none lies on a bridge, which has no width
    inside = Outline(np.concatenate([points, points[:1]])).contains_points(near_centres).reshape(HEIGHT, WIDTH)
    assert (inside == mask).all()
    assert exports.joined_outline(np.zeros_like(mask)) is None


def test_images_of_numbers(tmp_path: Path) -> None:
    expected = np.zeros((FRAMES, HEIGHT, WIDTH), int)
    for object_id, given in zip(IDS, masks()):
        expected[given] = object_id
    davis = exports.export("davis", mask_set(), tmp_path / "davis")
    ids = exports.export("png-ids", mask_set(), tmp_path / "ids")
    alpha = exports.export("alpha", mask_set(), tmp_path / "alpha")
    for t in range(FRAMES):
        with Image.open(davis / "Annotations" / "dog" / f"frame{t}.png") as image:
            assert image.mode == "P"
            assert (np.asarray(image) == expected[t]).all()
            # DAVIS' colours
            assert image.getpalette()[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
        assert (np.asarray(Image.open(ids / f"frame{t}.png")) == expected[t]).all()
        assert (np.asarray(Image.open(alpha / "dog" / f"frame{t}.png")) == 255 * (expected[t] > 0)).all()
    assert exports.label_map(masks()[:, 0], (1, 300)).dtype == np.uint16


def test_a_table(tmp_path: Path) -> None:
    file = exports.export("csv", mask_set(), tmp_path / "out") / "boxes.csv"
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 2 * FRAMES
    assert rows[1]["label"] == 'a "ring", round'
    assert [int(row["area"]) for row in rows if row["object"] == "2"] == masks()[0].sum((1, 2)).tolist()
    assert (rows[0]["x"], rows[0]["y"], rows[0]["width"], rows[0]["height"]) == ("2", "4", "16", "10")
    assert (rows[-1]["x"], rows[-1]["score"], rows[-2]["score"]) == ("", "-4.0", "")


def test_a_transparent_video(tmp_path: Path) -> None:
    import av

    pixels = np.random.default_rng(0).integers(60, 200, (FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8)
    folder = exports.export("webm-alpha", mask_set(), tmp_path / "out", open_video(pixels))
    with av.open(str(folder / "dog.webm")) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height) == (WIDTH, HEIGHT)
        # FFmpeg's own VP9 decoder leaves the transparency out
        decoder = av.CodecContext.create("libvpx-vp9", "r")
        shown = [frame for packet in container.demux(stream) for frame in decoder.decode(packet)]
    assert len(shown) == FRAMES
    for frame, given in zip(shown, masks().any(0)):
        assert "a" in frame.format.name
        alpha = frame.to_ndarray(format="rgba")[..., 3]
        assert ((alpha > 127) == given).mean() > 0.97


def test_a_transparent_prores(tmp_path: Path) -> None:
    import av

    pixels = np.random.default_rng(0).integers(60, 200, (FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8)
    folder = exports.export("prores", mask_set(), tmp_path / "out", open_video(pixels))
    with av.open(str(folder / "dog.mov")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "prores"
        assert stream.codec_context.codec_tag == "ap4h"  # 4444
        shown = list(container.decode(stream))
    assert len(shown) == FRAMES
    for frame, given in zip(shown, masks().any(0)):
        assert frame.format.name.startswith("yuva444")
        alpha = frame.to_ndarray(format="rgba")[..., 3]
        assert ((alpha > 127) == given).all()  # it is kept without loss


@pytest.mark.parametrize(
    ("kind", "message"),
    [("gif", "unknown format 'gif': choose coco"), ("webm-alpha", "say where it is with --video")],
)
def test_bad_input(tmp_path: Path, kind: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        exports.export(kind, mask_set(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_and_another_video(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        exports.export("csv", mask_set(), tmp_path)
    other = open_video(np.zeros((FRAMES + 1, HEIGHT, WIDTH, 3), np.uint8))
    with pytest.raises(UserError, match="other frames"):
        exports.export("webm-alpha", mask_set(), tmp_path / "out", other)


def test_a_result_in_python(tmp_path: Path) -> None:
    plan = Plan((0, 1, 2), (0, 1, 2), (1,))
    result = Segmentation(("the box", "the ring"), masks(), np.ones((2, FRAMES), np.float32), plan, 10.0, {})
    assert repr(result).endswith("frames in which each is found: 'the box': 3, 'the ring': 2)")
    assert len(result.to_coco()["annotations"]) == 5
    assert (result.save(tmp_path / "out", "csv") / "boxes.csv").is_file()
    image = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    cut = result.crop(image, 0, 1)
    assert cut is not None
    assert cut.size == (16, 10)
    assert (np.asarray(cut) == [90, 90, 90, 255]).all()
    assert result.crop(image, 1, 2) is None
    painted = np.asarray(result.plot(2, image, legend=False))
    assert ((painted != image).any(-1) == masks()[0, 2]).all()
    assert result.plot().size[1] > HEIGHT
    still = Segmentation(("the box",), masks()[:1, 0], np.ones(1, np.float32), plan, 0.0, {})
    assert len(still.to_coco()["images"]) == 1
    for call in (lambda: result.plot(3), lambda: result.crop(image, 2), lambda: result.plot(0, image[1:])):
        with pytest.raises(UserError):
            call()
