"""Image files with changed bytes: frames, masks, label maps."""

import functools
import io
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from fuzz.mutate import byte_edits, edit_bytes
from fuzz.target import Target
from virst_jax.io import images, mask_images

_rng = np.random.default_rng(0)
_GREY = (_rng.random((20, 30)) < 0.3).astype(np.uint8)
_COLOR = _rng.integers(0, 256, (20, 30, 3), np.uint8)


def _saved(array: np.ndarray, kind: str, mode: str | None = None, **options: Any) -> bytes:
    content = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(content, kind, **options)
    return content.getvalue()


@functools.cache
def files() -> list[bytes]:
    """Good images of all kinds."""
    made = [_saved(_COLOR, kind) for kind in ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF")]
    made += [_saved(_GREY * value, "PNG") for value in (1, 38, 255)]
    made += [_saved(_GREY * 3, "PNG", "P"), _saved(_COLOR, "PNG", "RGBA"), _saved(_GREY * 255, "PNG", "LA")]
    made += [_saved(_GREY.astype(np.uint16) * 65535, "PNG"), _saved(_GREY.astype(np.float32), "TIFF")]
    made += [_saved(_GREY.astype(bool), "PNG"), _saved(_GREY.astype(np.int32), "TIFF"), _saved(_COLOR, "JPEG", "CMYK")]
    frames = [Image.fromarray(np.roll(_COLOR, i, 0)) for i in range(3)]
    for kind in ("WEBP", "GIF", "PNG", "TIFF"):
        content = io.BytesIO()
        frames[0].save(content, kind, save_all=True, append_images=frames[1:])
        made.append(content.getvalue())
    return made


def changed(case: tuple[int, Any]) -> bytes:
    content = files()[case[0] % len(files())]
    return edit_bytes(content, case[1]) if case[1] else content


def read_frame(case: Any) -> None:
    frame = images.read_image(changed(case), name="x")
    assert frame.dtype == np.uint8
    assert frame.shape[2:] == (3,)
    images.read_size(changed(case), name="x")


def read_mask(case: Any) -> None:
    mask = mask_images.read_binary(changed(case), name="x")
    assert mask.dtype == bool
    assert mask.ndim == 2


def read_labels(case: Any) -> None:
    assert mask_images.read_labels(changed(case), name="x").dtype == np.int32
    assert mask_images.read_index(changed(case), name="x").ndim == 2


CASES = st.tuples(st.integers(0, 40), st.one_of(st.none(), byte_edits))
TARGETS = [
    Target("image_frame", CASES, read_frame),
    Target("image_mask", CASES, read_mask),
    Target("image_labels", CASES, read_labels),
]
