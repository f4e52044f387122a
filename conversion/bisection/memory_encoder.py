"""The operations of the memory encoder on one frame: the mask made small, the sum with the image, fuser blocks, output.

Axes: H, W feature grid, S = H*W, C width, D memory width, L mask side.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from virst_jax.models.sam2.memory import ConvNextBlock, MemoryEncoder
from virst_jax.models.sam2.sam2 import Features
from virst_jax.models.sam2.tracker import Tracker

from .frames import Frames
from .operation import Array, Operation, Outputs, apply, compiled, hearing, keeping, replacing


class EncoderPrograms:
    """The encoder whole and in parts, compiled once for all frames."""

    def __init__(self, tracker: Tracker):
        cfg, compute = tracker.cfg, tracker.sam.compute
        side = cfg.feature_size

        def encode(params: Any, top: jax.Array, low_res: jax.Array, score: jax.Array) -> jax.Array:
            """top dtype[H, W, C], logits float32[L, L] and float32[] -> [S, D]"""
            none = jnp.zeros((), top.dtype)
            prediction = dataclasses.replace(
                tracker.empty(1).prediction, low_res=low_res[None], object_score=score.reshape(1)
            )
            return tracker._encode_memory(params, Features(none, none, top), prediction).memory[0]

        def mask(params: Any, low_res: jax.Array) -> Outputs:
            kept: list[Any] = []
            top = jnp.zeros((side, side, cfg.hidden_size), jnp.dtype(compute.dtype))
            with nn.intercept_methods(keeping("mask_proj", kept)):
                encode(params, top, low_res, jnp.ones(()))
            return (kept[0],)

        def add(params: Any, top: jax.Array, small: jax.Array) -> Outputs:
            heard: list[Any] = []
            module, full = MemoryEncoder(cfg, compute), jnp.zeros((1, cfg.image_size, cfg.image_size))
            with (
                nn.intercept_methods(replacing("mask_proj", lambda *_: small)),
                nn.intercept_methods(hearing(ConvNextBlock, heard)),
            ):
                apply(module, params["memory_encoder"], top[None], full)
            return (heard[0][0][0],)

        block = ConvNextBlock(compute, cfg.memory_kernel)

        def project(params: Any, x: jax.Array, score: jax.Array) -> Outputs:
            low_res = jnp.zeros((cfg.low_res_size, cfg.low_res_size))
            with nn.intercept_methods(replacing(ConvNextBlock, lambda *_: x)):
                return (encode(params, x[0], low_res, score),)

        self.encode = compiled(encode)
        self.mask, self.add, self.project = compiled(mask), compiled(add), compiled(project)
        self.fuse = compiled(lambda params, x: (apply(block, params, x),))


def memory_operations(frames: Frames, programs: EncoderPrograms, t: int, stage: str) -> Iterator[Operation]:
    """In parts, then whole; `stage` is what the operations' names begin with."""
    params, dtype = frames.without_image_encoder, frames.dtype
    low_res, _, score = frames.outcome_of(t)
    top, memory = frames.features_of(t)[2], f"frame{t}.memory"
    small, before = f"frame{t}.encoder.mask", f"frame{t}.encoder.sum"

    def mask(params: Any, low_res: Array) -> Outputs:
        return programs.mask(params, jnp.asarray(low_res))

    yield Operation(f"{stage} mask", (low_res,), (small,), mask, params)
    yield Operation(f"{stage} sum", (top, small), (before,), frames.in_dtype(programs.add), params)
    for i in range(frames.cfg.memory_fuser_layers):
        own, name = params["memory_encoder"][f"fuser{i}"], f"frame{t}.encoder{i}"
        yield Operation(f"{stage} fuser {i}", (before,), (name,), frames.in_dtype(programs.fuse), own)
        before = name

    def project(params: Any, x: Array, score: Array) -> Outputs:
        return programs.project(params, jnp.asarray(x, dtype), jnp.asarray(score))

    yield Operation(f"{stage} output", (before, score), (memory,), project, params)

    def encode(params: Any, low_res: Array, score: Array, top: Array) -> Outputs:
        return (programs.encode(params, jnp.asarray(top, dtype), jnp.asarray(low_res), jnp.asarray(score)),)

    yield Operation(stage, (low_res, score, top), (memory,), encode, params, whole=f"{stage} ")
