import numpy as np
import pytest
from PIL import Image

from virst_jax.errors import UserError
from virst_jax.io.mask_images import read_binary, read_index, read_labels

MASK = np.zeros((12, 16), bool)
MASK[3:9, 5:12] = True
ONE, FULL = MASK.astype(np.uint8), MASK.astype(np.uint8) * 255


def save(tmp_path, image, name="m.png", **options):
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(tmp_path / name, **options)
    return tmp_path / name


def palette():
    image = Image.fromarray(ONE * 3, "P")
    image.putpalette([0, 0, 0, 9, 9, 9, 5, 5, 5, 128, 0, 0])
    return image


def stacked(*channels):
    return np.stack([np.broadcast_to(np.uint8(c), MASK.shape) for c in channels], -1)


GOOD = {
    "255": FULL,
    "1": ONE,
    "gray of a palette": ONE * 38,
    "bits": MASK,
    "16 bits": MASK.astype(np.uint16) * 65535,
    "16 bits, 1": MASK.astype(np.uint16),
    "16 bits, 256": MASK.astype(np.uint16) * 256,
    "palette": palette(),
    "rgb": stacked(FULL, FULL, FULL),
    "red": stacked(ONE * 128, 0, 0),
    "opaque": stacked(FULL, FULL, FULL, 255),
    "grey, opaque": stacked(FULL, 255),
    "in alpha, on black": stacked(0, 0, 0, FULL),
    "in alpha, on white": stacked(255, 255, 255, FULL),
    "red on nothing": stacked(FULL, 0, 0, FULL),
    "grey in alpha": stacked(0, FULL),
}


@pytest.mark.parametrize("name", GOOD)
def test_masks(tmp_path, name):
    np.testing.assert_array_equal(read_binary(save(tmp_path, GOOD[name])), MASK)


def test_masks_with_smooth_edges(tmp_path):
    path = save(tmp_path, np.kron(FULL, np.ones((8, 8), np.uint8)), "m.jpg", quality=60)
    np.testing.assert_array_equal(read_binary(path), np.kron(MASK, np.ones((8, 8), bool)))


def test_empty_and_full(tmp_path):
    for value in (0, 1, 255):
        mask = read_binary(save(tmp_path, np.full((4, 5), value, np.uint8)))
        assert mask.all() if value else not mask.any()


@pytest.mark.parametrize(
    ("image", "what"),
    [
        (ONE * 3 + (np.arange(16) == 2), "several values up to 3"),
        (ONE + 1, "1 and 2"),
        (stacked(FULL, 0, np.arange(16), FULL), "both its colours and its alpha"),
        (Image.fromarray(stacked(FULL, 0, 0, 0), "CMYK"), "mode CMYK"),
        (np.where(MASK, np.nan, 0).astype(np.float32), "no numbers"),
    ],
    ids=["objects", "1 and 2", "alpha", "cmyk", "nan"],
)
def test_what_cannot_be_told(tmp_path, image, what):
    with pytest.raises(UserError, match=what) as error:
        read_binary(save(tmp_path, image, "m.tif"))
    assert "m.tif" in str(error.value)


def test_labels(tmp_path):
    labels = ONE * 3
    for image in (labels, palette(), labels.astype(np.uint16), stacked(labels, labels, labels), stacked(labels, 255)):
        found = read_labels(save(tmp_path, image))
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, labels)
    wide = labels.astype(np.uint16) * 300
    np.testing.assert_array_equal(read_labels(save(tmp_path, wide)), wide)
    with pytest.raises(UserError, match="in colour"):
        read_labels(save(tmp_path, stacked(FULL, 0, 0)))


def test_values(tmp_path):
    np.testing.assert_array_equal(read_index(save(tmp_path, palette())), ONE * 3)
    np.testing.assert_array_equal(read_index(save(tmp_path, MASK)), ONE)
    np.testing.assert_array_equal(read_index(save(tmp_path, MASK.astype(np.uint16) * 65535)), MASK * 65535)
    np.testing.assert_array_equal(read_index(save(tmp_path, stacked(0, 0, 0, FULL))), FULL)
