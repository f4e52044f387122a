"""Image resizing as products with small matrices, with PyTorch's half-pixel conventions.

jax.image.resize uses the cubic coefficient -0.5; PyTorch, and so the release, uses -0.75.

`resize_bytes` follows PIL instead, in PIL's fixed-point numbers (src/libImaging/Resample.c).

Axes: H, W input size; I, J output size; C channels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.lru_cache(maxsize=64)  # a server meets videos of any size: it must not keep a matrix for each
def resize_matrix(size: int, new_size: int, method: str) -> np.ndarray:
    """Weights float32[new_size, size] of a 1-D resize, edges replicated, corners not aligned.

    method: "bilinear", "bicubic" (a = -0.75), or "antialias" (bilinear with the filter widened when shrinking).
    Equal to torch.nn.functional.interpolate(align_corners=False) of the same mode.
    """
    scale = size / new_size
    center = (np.arange(new_size) + 0.5) * scale - 0.5
    if method == "antialias":
        support = max(scale, 1.0)
        distance = np.abs(np.arange(size)[None] - center[:, None]) / support
        weights = np.maximum(1 - distance, 0)
        return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    if method == "bilinear":
        center = np.maximum(center, 0)
        taps, kernel = range(2), _triangle
    elif method == "bicubic":
        taps, kernel = range(-1, 3), _cubic
    else:
        raise ValueError(f"unknown resize method {method!r}: choose bilinear, bicubic or antialias")
    base = np.floor(center).astype(int)
    weights = np.zeros((new_size, size))
    rows = np.arange(new_size)
    for tap in taps:
        np.add.at(weights, (rows, np.clip(base + tap, 0, size - 1)), kernel(center - base - tap))
    return weights.astype(np.float32)


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0)


def _cubic(x: np.ndarray, a: float = -0.75) -> np.ndarray:
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


BYTE_BITS = 22  # PIL holds the weights of 8-bit images as integers, in units of 2^-22


def byte_matrix(size: int, new_size: int, method: str, padded: int) -> np.ndarray:
    """Weights int32[new_size, padded] with which PIL resizes one axis of 8-bit images, in units of 2^-BYTE_BITS.

    method: "bilinear" or "bicubic" (a = -0.5), both with the filter widened when shrinking.
    padded: columns, of which those from `size` on are zero.
    """
    if method not in ("bilinear", "bicubic"):
        raise ValueError(f"unknown resize method {method!r}: choose bilinear or bicubic")
    scale = size / new_size
    widened = max(scale, 1.0)
    support = widened * (1 if method == "bilinear" else 2)
    center = ((np.arange(new_size) + 0.5) * scale)[:, None]
    first, last = (np.floor(np.maximum(edge + 0.5, 0)) for edge in (center - support, center + support))
    place = np.arange(size)
    distance = (place - center + 0.5) * (1 / widened)
    weights = _triangle(distance) if method == "bilinear" else _cubic(distance, -0.5)
    weights[(place < first) | (place >= last)] = 0
    weights /= np.cumsum(weights, axis=1)[:, -1:]  # added up in PIL's order
    units = weights * (1 << BYTE_BITS)
    out = np.zeros((new_size, padded), np.int32)
    out[:, :size] = np.trunc(units + np.copysign(0.5, units))
    return out


def resize_bytes(image: jax.Array, rows: jax.Array, columns: jax.Array, height_first: bool = False) -> jax.Array:
    """Resizes as PIL does, to the byte: uint8[H, W, C], int32[I, H], int32[J, W] -> uint8[I, J, C].

    rows, columns: of `byte_matrix`. Shrinking to less than 1/128 may round a byte in the other direction.
    height_first: which axis comes first, see data.transforms.height_comes_first.
    """
    axes = (("hwc,jw->hjc", columns), ("hwc,ih->iwc", rows))
    for equation, weights in axes[::-1] if height_first else axes:  # PIL rounds and clips behind each
        image = _weighted(equation, image, weights)
    return image


def _weighted(equation: str, image: jax.Array, weights: jax.Array) -> jax.Array:
    """Sums of integers in float32, whose order does not matter: none comes to 2^24.

    Two sums of 15-bit and 8-bit parts of the weights make up for one of 23 bits. The lower parts are -128 to 127, so
    that up to 512 of them times 255 stay below 2^24: four for each time that the cubic filter shrinks.
    """
    high = (weights + 128) >> 8
    parts = (high, weights - (high << 8))
    numbers = image.astype(jnp.float32)
    sums = [jnp.einsum(equation, numbers, x.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST) for x in parts]
    upper, lower = (x.astype(jnp.int32) for x in sums)
    units = (upper << 8) + lower + (1 << (BYTE_BITS - 1))
    return jnp.clip(units >> BYTE_BITS, 0, 255).astype(jnp.uint8)


def resize_maps(x: jax.Array, size: tuple[int, int], method: str = "bilinear") -> jax.Array:
    """Resizes maps float32[..., H, W] to float32[..., I, J]."""
    rows = resize_matrix(x.shape[-2], size[0], method)
    columns = resize_matrix(x.shape[-1], size[1], method)
    # mask logits are thresholded at zero: keep them out of reduced-precision matrix units
    return jnp.einsum("ih,...hw,jw->...ij", rows, x, columns, precision=jax.lax.Precision.HIGHEST)


def upsample_nearest_2x(x: jax.Array) -> jax.Array:
    """dtype[B, H, W, C] -> dtype[B, 2H, 2W, C]"""
    return jnp.repeat(jnp.repeat(x, 2, axis=-3), 2, axis=-2)
