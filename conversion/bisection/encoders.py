"""The operations of the image encoder and of the video encoder with its projector.

Axes: F segmentation frames, C clips, N tokens, D width, H, W grid, R, S image sides.
"""

from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from virst_jax.data.transforms import normalize, resize_frames, sam_pixels
from virst_jax.inference.steps import UNIT_SCALE, Network, Scale
from virst_jax.models import umt
from virst_jax.models.projector import Projector
from virst_jax.models.sam2 import hiera
from virst_jax.models.sam2.sam2 import Features, Sam2
from virst_jax.models.umt import VideoEncoder

from .operation import Operation, apply, compiled, hearing, layer_of, replacing


def image_operations(network: Network, video: np.ndarray, seg_frames: list[int]) -> Iterator[Operation]:
    """The image encoder, block by block on the first segmentation frame, then whole on all of them.

    video: uint8[T, h, w, 3].
    """
    cfg, compute = network.cfg.sam2, network.cfg.compute
    sam, params = network.steps.tracker.sam, network.params["sam2"]
    trunk = params["image_encoder"]["trunk"]
    dtype = jnp.dtype(compute.dtype)
    first = video[seg_frames[:1]]
    yield Operation("image / pixels", (), ("image.pixels",), lambda _: (sam_pixels(first, cfg.image_size, "bilinear"),))

    def embed(params: Any, pixels: jax.Array) -> tuple[jax.Array]:
        _, kept = apply(hiera.Hiera(cfg.hiera, compute), params, pixels, mutable=["intermediates"])
        return (kept["intermediates"]["embedded"][0],)

    yield Operation("image / patches", ("image.pixels",), ("image.embed",), compiled(embed), trunk)
    before = "image.embed"
    programs: dict[hiera.BlockSpec, Any] = {}
    ends = []
    for run in hiera.block_runs(cfg.hiera):
        if run.spec not in programs:
            block = hiera.Block(run.spec, cfg.hiera.mlp_ratio, compute)
            programs[run.spec] = compiled(lambda params, x, block=block: apply(block, params, x.astype(dtype))[:1])
        for k in range(run.count):
            index = run.start + k
            own = layer_of(trunk[run.name], k if run.count > 1 else None)
            name = f"image.block{index}"
            yield Operation(f"image / block {index}", (before,), (name,), programs[run.spec], own)
            before = name
        if run.start + run.count in np.cumsum(cfg.hiera.stages):
            ends.append(before)

    def pyramid(params: Any, *stages: jax.Array) -> tuple[jax.Array, ...]:
        given = [stage.astype(dtype) for stage in stages]
        with nn.intercept_methods(replacing(hiera.Hiera, lambda *_: given)):
            return tuple(apply(hiera.ImageEncoder(cfg, compute), params, jnp.zeros(())))

    levels = tuple(f"image.fpn{i}" for i in range(3))
    yield Operation("image / pyramid", tuple(ends), levels, compiled(pyramid), params["image_encoder"])

    def sharpen(params: Any, *levels: jax.Array) -> tuple[jax.Array, ...]:
        given = [level.astype(dtype) for level in levels]
        with nn.intercept_methods(replacing(hiera.ImageEncoder, lambda *_: given)):
            features = apply(sam, params, jnp.zeros(()), method=Sam2.encode_image)
        return features.high0, features.high1

    names = ("image.high0", "image.high1")
    yield Operation("image / high resolution", levels, names, compiled(sharpen), params)

    def encode(_: None) -> tuple[np.ndarray]:
        tops = {n: np.asarray(encode_frame(network, video, n, "bilinear").top) for n in dict.fromkeys(seg_frames)}
        return (np.stack([tops[n] for n in seg_frames]),)

    yield Operation("image / all segmentation frames", (), ("maps",), encode, whole="image / ")


def encode_frame(network: Network, video: np.ndarray, number: int, resample: str) -> Features:
    """The features of a frame of uint8[T, h, w, 3], as segmenting computes them."""
    pixels = resize_frames(video[number : number + 1], network.cfg.sam2.image_size, resample)
    (features,) = network.encode_batch(pixels, 1)
    return features


def video_operations(network: Network, clips: np.ndarray, scale: Scale) -> Iterator[Operation]:
    """The video encoder, block by block on the first clip, then whole on all of them.

    clips: number[C, frames, S, S, 3], which `scale` normalises.
    """
    cfg, compute = network.cfg.vision, network.cfg.compute
    params, dtype = network.params["vision"], jnp.dtype(compute.dtype)
    encoder = VideoEncoder(cfg, compute)

    def pixels(_: None) -> tuple[np.ndarray]:
        return (clips[:1] if scale is UNIT_SCALE else normalize(clips[:1]),)

    yield Operation("video / pixels", (), ("vision.pixels",), pixels)

    def embed(params: Any, pixels: jax.Array) -> tuple[jax.Array]:
        _, kept = apply(encoder, params, pixels, mutable=["intermediates"])
        return (kept["intermediates"]["embedded"][0],)

    yield Operation("video / patches", ("vision.pixels",), ("vision.embed",), compiled(embed), params)
    block = umt.Block(cfg, compute)
    run = compiled(lambda params, x: apply(block, params, x.astype(dtype))[:1])
    before = "vision.embed"
    for i in range(cfg.num_layers):
        own = layer_of(params["layers"], i)
        yield Operation(f"video / block {i}", (before,), (f"vision.block{i}",), run, own)
        before = f"vision.block{i}"
    shape = (1, *clips.shape[1:])

    def norm(params: Any, x: jax.Array) -> tuple[jax.Array]:
        with nn.intercept_methods(replacing(umt.Block, lambda *_: (x.astype(dtype), None))):
            return (apply(encoder, params, jnp.zeros(shape)),)

    yield Operation("video / final norm", (before,), ("vision.norm",), compiled(norm), params)
    project = Projector(cfg, compute, network.cfg.llm.hidden_size)

    def merge(params: Any, x: jax.Array) -> tuple[jax.Array]:
        heard: list[Any] = []
        with nn.intercept_methods(hearing(nn.Dense, heard)):
            apply(project, params, x.astype(dtype), shape[1])
        return (heard[0][0][0],)  # what enters the first linear layer

    own = network.params["projector"]
    yield Operation("video / token merging", ("vision.norm",), ("projector.merged",), compiled(merge), own)

    def linear(params: Any, x: jax.Array) -> tuple[jax.Array]:
        return (apply(project, params, x.astype(dtype), shape[1], merge=False),)

    yield Operation("video / projector", ("projector.merged",), ("projector.tokens",), compiled(linear), own)

    def encode(_: None) -> tuple[np.ndarray]:
        return (np.stack([np.asarray(x) for x in network.encode_visual(clips, len(clips), scale)]),)

    yield Operation("video / all clips", (), ("visual",), encode, whole="video / ")
