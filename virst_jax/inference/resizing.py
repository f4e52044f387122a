"""Frames stretched to the square images that the networks read, by the host or by the device.

The device gets a frame as it is and computes what PIL computes, byte for byte. Frames are padded to a few sizes, so
that videos of many sizes run through the same few compiled programs.

Axes: H, W size of the frame, S side of the square image.
"""

import contextlib
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from virst_jax.data.transforms import check_frames, height_comes_first, resize_frames
from virst_jax.errors import UserError
from virst_jax.inference.compiled import Compiled, Context
from virst_jax.ops.resize import byte_matrix, resize_bytes

HOST, DEVICE = "host", "device"
PLACES = (HOST, DEVICE)
BUCKET = 256  # frames are padded to multiples of it

Pixels = np.ndarray | jax.Array
Resize = Callable[[np.ndarray, int, str], Pixels]  # uint8[H, W, 3], S, "bilinear" or "bicubic" -> uint8[S, S, 3]


def check_place(place: object) -> None:
    """Raises UserError: `place` is none of PLACES."""
    if not isinstance(place, str) or place not in PLACES:
        raise UserError(f"resize is {place!r}; give 'host' or 'device'")


def make_resizer(place: str, context: Context = contextlib.nullcontext) -> Resize:
    """What resizes frames.

    Args:
      place: "host" or "device".
      context: entered around every step of the device.

    Raises:
      UserError: another place.
    """
    check_place(place)
    return DeviceResizer(context) if place == DEVICE else resize_on_host


def resize_on_host(frame: np.ndarray, size: int, method: str) -> np.ndarray:
    """See data.transforms.resize_frames."""
    return resize_frames(frame[None], size, method)[0]


class DeviceResizer(Compiled):
    """As `resize_on_host`, on the device, where the result stays.

    Args:
      context: entered around every step.
    """

    def __init__(self, context: Context = contextlib.nullcontext):
        super().__init__(context)
        # of the sizes that were met last; a matrix for frames of 4K takes 16 MB
        self._matrix = functools.lru_cache(maxsize=12)(functools.partial(_upload, context))

    def __call__(self, frame: np.ndarray, size: int, method: str) -> jax.Array:
        check_frames(frame[None], size, method)
        height, width = frame.shape[:2]
        padded = np.zeros((_round_up(height), _round_up(width), 3), np.uint8)
        padded[:height, :width] = frame
        rows, columns = (self._matrix(n, size, method, _round_up(n)) for n in (height, width))
        tall = height_comes_first(height, width, size, method)
        resized: jax.Array = self._run(resize_frame, None, padded, rows, columns, height_first=tall)
        return resized


def resize_frame(params: None, frame: jax.Array, rows: jax.Array, columns: jax.Array, height_first: bool) -> jax.Array:
    """A padded frame uint8[H, W, 3] and int32[S, H], int32[S, W] of `byte_matrix` -> uint8[S, S, 3]."""
    return resize_bytes(frame, rows, columns, height_first)


def stack_frames(params: None, frames: tuple[jax.Array, ...]) -> jax.Array:
    """Frames uint8[S, S, 3] that lie on the device -> uint8[T, S, S, 3]."""
    return jnp.stack(frames)


def _upload(context: Context, size: int, new_size: int, method: str, padded: int) -> jax.Array:
    with context():
        return jnp.asarray(byte_matrix(size, new_size, method, padded))


def _round_up(size: int) -> int:
    return -(-size // BUCKET) * BUCKET
