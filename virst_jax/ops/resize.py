"""Image resizing as products with small matrices, with PyTorch's half-pixel conventions.

jax.image.resize uses the cubic coefficient -0.5; PyTorch, and so the release, uses -0.75.

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


def resize_maps(x: jax.Array, size: tuple[int, int], method: str = "bilinear") -> jax.Array:
    """Resizes maps float32[..., H, W] to float32[..., I, J]."""
    rows = resize_matrix(x.shape[-2], size[0], method)
    columns = resize_matrix(x.shape[-1], size[1], method)
    # mask logits are thresholded at zero: keep them out of reduced-precision matrix units
    return jnp.einsum("ih,...hw,jw->...ij", rows, x, columns, precision=jax.lax.Precision.HIGHEST)


def upsample_nearest_2x(x: jax.Array) -> jax.Array:
    """dtype[B, H, W, C] -> dtype[B, 2H, 2W, C]"""
    return jnp.repeat(jnp.repeat(x, 2, axis=-3), 2, axis=-2)
