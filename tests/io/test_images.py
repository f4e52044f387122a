import contextlib
import os
import shutil
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.places import DATA
from virst_jax.errors import UserError
from virst_jax.io import images

CASES = DATA / "cases"


def animation(path, count=3, **options):
    shown = [Image.new("RGB", (40, 20), (40 * i, 0, 200)) for i in range(count)]
    shown[0].save(path, save_all=True, append_images=shown[1:], duration=120, **options)
    return path


def test_sixteen_bits_and_floats_are_scaled():
    values = np.asarray(Image.open(CASES / "sixteen_bit.png")).astype(np.float64)
    found = images.read_image(CASES / "sixteen_bit.png")
    assert found.shape == (64, 96, 3)
    assert values.max() > 255  # what was clipped to white
    np.testing.assert_array_equal(found[..., 0], np.round(values / 257))
    values = np.asarray(Image.open(CASES / "float.tif"))
    np.testing.assert_array_equal(images.read_image(CASES / "float.tif")[..., 1], np.round(values * 255))


@pytest.mark.parametrize(
    "values",
    [np.float32([[0, 200]]), np.float32([[np.nan, 0.5]]), np.float32([[-0.5, 0.5]]), np.int32([[0, 70_000]])],
    ids=["0-255", "nan", "negative", "32 bits"],
)
def test_values_of_unknown_scale_are_refused_by_name(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "depth.tif")
    with pytest.raises(UserError, match=r"depth\.tif: (floats|integers) "):
        images.read_image(tmp_path / "depth.tif")
    found, mode = images.read_values(tmp_path / "depth.tif")
    np.testing.assert_array_equal(found, values)
    assert mode in ("F", "I")


def test_images_are_turned_upright_where_asked():
    path = CASES / "orientation_6.jpg"
    stored = images.read_image(path, upright=False)
    assert stored.shape == (64, 96, 3)
    assert images.read_size(path, upright=False) == (64, 96)
    turned = images.read_image(path)
    assert turned.shape == (96, 64, 3)
    assert images.read_size(path) == (96, 64)
    np.testing.assert_array_equal(turned, np.rot90(stored, -1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "1", "CMYK", "RGB"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    drawn = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB").convert(mode)
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    drawn.save(path)
    np.testing.assert_array_equal(images.read_image(path), np.asarray(drawn.convert("RGB")))
    np.testing.assert_array_equal(images.read_image(path.read_bytes(), name="x"), np.asarray(drawn.convert("RGB")))


@pytest.mark.parametrize("suffix", [".webp", ".png", ".gif", ".tif"])
def test_animations_are_no_stills(tmp_path, suffix):
    path = animation(tmp_path / f"moving{suffix}", **({"lossless": True} if suffix == ".webp" else {}))
    assert images.num_frames(path) == 3
    with pytest.raises(UserError, match=r"moving.*(animation of 3 frames|3 pages)"):
        images.read_image(path)
    found = list(images.frames(path))
    assert [int(frame[0, 0, 0]) for frame, _ in found] == [0, 40, 80]
    if suffix != ".tif":
        assert [seconds for _, seconds in found] == [0.12] * 3


def test_an_image_for_programs_without_animations_is_no_frame(tmp_path):
    path = animation(tmp_path / "a.png", count=4, default_image=True)
    assert images.num_frames(path) == 3
    assert [int(frame[0, 0, 0]) for frame, _ in images.frames(path)] == [40, 80, 120]


def test_a_cameras_preview_is_no_frame(tmp_path):
    path = animation(tmp_path / "photo.jpg", count=2, format="MPO")
    assert images.num_frames(path) == 1
    assert images.read_image(path).shape == (20, 40, 3)


def bomb(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_of_every_format(tmp_path, kind, orientation):
    shown = np.random.default_rng(0).integers(0, 255, (4, 6, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    # stored so that it is shown so: turned and mirrored the other way
    swapped = np.swapaxes(shown, 0, 1)
    stored = {1: shown, 2: shown[:, ::-1], 3: shown[::-1, ::-1], 4: shown[::-1], 5: swapped, 6: swapped[::-1]}
    stored |= {7: swapped[::-1, ::-1], 8: swapped[:, ::-1]}
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    options: dict[str, Any] = {"exif": exif if kind == "tiff" else exif.tobytes()}
    options |= {"quality": 97} if kind == "jpeg" else {"lossless": True} if kind == "webp" else {}
    path = tmp_path / f"a.{kind}"
    Image.fromarray(np.ascontiguousarray(stored[orientation])).save(path, kind.upper(), **options)
    found = images.read_image(path)
    assert found.shape == shown.shape
    assert np.abs(found.astype(int) - shown).mean() < 15  # another orientation: 80 and more
    assert images.read_size(path) == found.shape[:2]
    assert images.read_size(path, upright=False) == images.read_image(path, upright=False).shape[:2]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(60_000, 60_000), (10_000, 10_000)])
def test_huge_headers_are_refused_before_decoding(tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(bomb(*size))
    for read in (images.read_image, images.read_size, images.read_values, images.num_frames):
        with pytest.raises(UserError, match=r"bomb\.png: .*pixels"):
            read(tmp_path / "bomb.png")


def test_what_is_no_file_is_refused_by_name(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    shutil.copy(CASES / "orientation_6.jpg", tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    for name, match in {
        "pipe.png": "is a pipe, a socket or a device",
        "folder.png": "is a folder",
        "text.png": "cannot be read as an image",
        "empty.png": "cannot be read as an image",
        "cut.jpg": "truncated",
        "gone.png": "no such file",
        "nul\0.png": "not readable",
    }.items():
        with pytest.raises(UserError, match=match) as info:
            images.read_image(tmp_path / name)
        assert str(tmp_path) in str(info.value)
        assert "\n" not in str(info.value)


def test_damaged_files_end_in_one_line(tmp_path):
    for kind in ("png", "jpg", "webp", "tif", "gif", "bmp"):
        path = tmp_path / f"a.{kind}"
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)).save(path)
        content, rng = path.read_bytes(), np.random.default_rng(1)
        for _ in range(60):
            changed = bytearray(content)
            for place in rng.integers(0, len(content), 5):
                changed[place] = rng.integers(256)
            for read in (images.read_image, images.read_values, images.read_size):
                with contextlib.suppress(UserError):
                    read(bytes(changed), name="a")
