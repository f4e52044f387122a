"""Deterministic weights for parity cases: a parameter's value depends on its name and shape alone.

Both sides of a parity check (the PyTorch release and the JAX implementation) can rebuild the same
checkpoint from a manifest of names and shapes, so no weight file has to be shipped.
"""

import zlib

import numpy as np


def make_tensor(name: str, shape: tuple[int, ...], salt: int = 0) -> np.ndarray:
    """Value of the parameter `name` (PyTorch naming), float32, of `shape`.

    `salt` selects another draw of the whole checkpoint.
    """
    rs = np.random.RandomState((zlib.crc32(name.encode()) + 7919 * salt) % (2**32))
    x = rs.standard_normal(shape).astype(np.float32)
    leaf = name.rsplit(".", 1)[-1]
    if len(shape) == 0:  # scalar gates
        return np.float32(0.5) + np.float32(0.1) * x
    if leaf == "bias" or leaf in ("q_bias", "v_bias"):
        return 0.1 * x
    if len(shape) == 1:  # norm scales, layer scales
        return 1.0 + 0.2 * x
    if "embed_tokens" in name or leaf in ("positional_encoding_gaussian_matrix",):
        return x
    if "embed" in leaf or "tpos" in leaf or "no_mem" in leaf or "no_obj" in leaf:
        return 0.5 * x
    if len(shape) == 2 and (
        "tokens" in name or "token.weight" in name or "embeddings" in name or "embed.weight" in name
    ):
        return 0.5 * x
    fan_in = int(np.prod(shape[1:]))
    return x / np.float32(np.sqrt(max(fan_in, 1)))


def make_state(manifest: dict[str, list[int]], salt: int = 0) -> dict[str, np.ndarray]:
    """A whole checkpoint from a manifest {name: shape}."""
    return {k: make_tensor(k, tuple(v), salt) for k, v in manifest.items()}


def make_input(name: str, shape: tuple[int, ...], salt: int = 0, scale: float = 1.0) -> np.ndarray:
    """A float32 input drawn from a standard normal, times `scale`."""
    rs = np.random.RandomState((zlib.crc32(("input:" + name).encode()) + 104729 * salt) % (2**32))
    return (scale * rs.standard_normal(shape)).astype(np.float32)


def make_video(num_frames: int, height: int, width: int, salt: int = 0) -> np.ndarray:
    """A smooth synthetic uint8 RGB video [T, H, W, 3]: drifting gradients with two moving blobs."""
    rs = np.random.RandomState(1234 + salt)
    ph = rs.uniform(0, 2 * np.pi, size=(3, 4))
    yy, xx = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    out = np.zeros((num_frames, height, width, 3), np.float64)
    for t in range(num_frames):
        s = t / max(num_frames - 1, 1)
        for c in range(3):
            a = np.sin(2 * np.pi * (1.5 * xx + 0.4 * s) + ph[c, 0]) + np.cos(
                2 * np.pi * (2.1 * yy - 0.3 * s) + ph[c, 1]
            )
            out[t, :, :, c] = 0.5 + 0.18 * a
        for b in range(2):
            cy, cx = 0.3 + 0.4 * np.sin(2.2 * s + ph[b, 2]), 0.5 + 0.35 * np.cos(2.9 * s + ph[b, 3])
            m = np.exp(-(((yy - cy) / 0.12) ** 2 + ((xx - cx) / 0.16) ** 2))
            out[t, :, :, b] += 0.6 * m
            out[t, :, :, 2] -= 0.3 * m
    return np.clip(np.round(out * 255), 0, 255).astype(np.uint8)
