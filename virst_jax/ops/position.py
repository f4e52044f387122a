"""Position encodings: fixed tables (computed once, in numpy) and rotary embeddings over pairs.

Axes: H, W grid; S positions (H*W or T*H*W); D width; P = D // 2 rotated pairs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from virst_jax.ops.platform import target_platform
from virst_jax.ops.resize import resize_matrix


@functools.cache
def sine_2d(height: int, width: int, dim: int, temperature: float = 10000.0) -> np.ndarray:
    """Sine position encoding float32[H, W, dim]: rows in the first half of the channels, columns in the second.

    Source: model/sam2/modeling/position_encoding.py, class PositionEmbeddingSine (normalised, scale 2 pi).
    """
    half = dim // 2
    frequency = temperature ** (2 * (np.arange(half, dtype=np.float32) // 2) / half)

    def encode(size: int) -> np.ndarray:
        position = np.arange(1, size + 1, dtype=np.float32) / np.float32(size + 1e-6) * np.float32(2 * np.pi)
        angle = position[:, None] / frequency.astype(np.float32)
        return np.where(np.arange(half) % 2 == 0, np.sin(angle), np.cos(angle)).astype(np.float32)

    rows = np.broadcast_to(encode(height)[:, None], (height, width, half))
    columns = np.broadcast_to(encode(width)[None], (height, width, half))
    return np.concatenate([rows, columns], -1)


def sine_1d(position: jax.Array, dim: int, temperature: float = 10000.0) -> jax.Array:
    """Sine encoding of scalars: float32[...] -> float32[..., dim], sines first, then cosines.

    Source: model/sam2/modeling/sam2_utils.py, get_1d_sine_pe.
    """
    half = dim // 2
    frequency = np.float32(temperature) ** (2 * (np.arange(half, dtype=np.float32) // 2) / half)
    angle = position[..., None] / frequency.astype(np.float32)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)


@functools.cache
def sinusoid_table(
    grid: int, frames: int, dim: int, pretrained_grid: int = 14, pretrained_frames: int = 4
) -> np.ndarray:
    """Sinusoid table float32[frames * grid * grid, dim] of the video encoder, interpolated from its pretrained size.

    Space is interpolated bicubically, time linearly. Source: model/videochat/vision_tower_builder.py,
    get_sinusoid_encoding_table2.
    """
    count = pretrained_frames * pretrained_grid**2
    angle = np.arange(count)[:, None] / np.power(10000, 2 * (np.arange(dim) // 2) / dim)
    table = np.where(np.arange(dim) % 2 == 0, np.sin(angle), np.cos(angle)).astype(np.float32)
    table = table.reshape(pretrained_frames, pretrained_grid, pretrained_grid, dim)
    if grid != pretrained_grid:
        matrix = resize_matrix(pretrained_grid, grid, "bicubic")
        table = np.einsum("ih,thwd,jw->tijd", matrix, table, matrix, optimize=True)
    if frames != pretrained_frames:
        table = np.einsum("st,thwd->shwd", resize_matrix(pretrained_frames, frames, "bilinear"), table)
    return table.reshape(frames * grid * grid, dim).astype(np.float32)


@functools.cache
def axial_angles(height: int, width: int, dim: int, theta: float) -> np.ndarray:
    """Rotary angles float32[H*W, dim // 2]: columns in the first half of the pairs, rows in the second.

    Source: model/sam2/modeling/position_encoding.py, compute_axial_cis.
    """
    quarter = dim // 4
    frequency = 1.0 / theta ** (np.arange(quarter, dtype=np.float32) * 4 / dim)
    y, x = np.divmod(np.arange(height * width), width)
    return np.concatenate([np.outer(x, frequency), np.outer(y, frequency)], -1).astype(np.float32)


@functools.cache
def spacetime_angles(frames: int, grid: int, head_dim: int) -> np.ndarray:
    """Rotary angles float32[frames * grid * grid, head_dim // 2] over time, rows and columns.

    Each axis takes head_dim // 6 pairs; the rest stays unrotated (angle 0). Time only: grid = 1.
    Source: model/seg_prompter.py, class RoPE3D.
    """
    pairs = head_dim // 2 // 3
    frequency = 1.0 / 10000 ** (np.arange(pairs, dtype=np.float32) / pairs)
    t, y, x = np.meshgrid(np.arange(frames), np.arange(grid), np.arange(grid), indexing="ij")
    angles = np.zeros((frames * grid * grid, head_dim // 2), np.float32)
    for i, axis in enumerate((t, y, x)):
        angles[:, i * pairs : (i + 1) * pairs] = np.outer(axis.ravel(), frequency)
    return angles


def rotate_pairs(x: jax.Array, angles: np.ndarray) -> jax.Array:
    """Rotates neighbouring channels (2i, 2i+1) of dtype[..., S, heads, D] by angles float32[S, D // 2]."""
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    wide = x.astype(jnp.float32)
    if target_platform() == "tpu":
        # slices with a stride of 2 along the lanes take its compiler minutes
        is_even = np.arange(x.shape[-1]) % 2 == 0
        partner = jnp.where(is_even, jnp.roll(wide, -1, -1), jnp.roll(wide, 1, -1))
        signed = np.where(is_even, -1, 1).astype(np.float32) * np.repeat(sin, 2, -1)
        return (wide * np.repeat(cos, 2, -1) + partner * signed).astype(x.dtype)
    even, odd = wide[..., 0::2], wide[..., 1::2]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return rotated.reshape(x.shape).astype(x.dtype)


def rotate_halves(x: jax.Array, angles: np.ndarray) -> jax.Array:
    """As `rotate_pairs`, of channels in another order: first of all pairs, then second of all pairs."""
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], -1).astype(x.dtype)
