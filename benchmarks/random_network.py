"""A network with random parameters, and inputs for its stages as they meet them in use.

Axes: T frames, O objects, S positions of the feature grid, C width, D memory width, R image side.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from conversion.weights_rule import make_video
from virst_jax.config import HieraConfig, Sam2Config, VirstConfig, tiny
from virst_jax.inference.steps import ExpressionBatch, Steps
from virst_jax.models.sam2.sam2 import Features, Prediction
from virst_jax.models.sam2.tracker import Anchors, MemoryBank
from virst_jax.models.virst import Virst

OBJECT_BIAS = 5.0  # on the object score: every object is there, for an absent one has no mask to compare


def small_config() -> VirstConfig:
    """The structure of virst_7b with a tracker that transformers can express too, small enough for tests."""
    hiera = HieraConfig(
        embed_dim=16, num_heads=1, stages=(1, 1, 2, 1), global_att_blocks=(3,), window_spec=(8, 4, 6, 4)
    )
    sam2 = Sam2Config(
        hiera=hiera,
        image_size=128,
        hidden_size=128,
        memory_layers=2,
        memory_mlp_dim=96,
        decoder_layers=1,
        decoder_heads=4,
        decoder_mlp_dim=96,
        iou_head_dim=48,
        memory_fuser_layers=1,
    )
    return dataclasses.replace(tiny(), name="small", sam2=sam2)


@functools.cache
def parameter_shapes(cfg: VirstConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of all parameters of `Virst(cfg)`, float32: shapes and the names of their axes."""
    boxed = jax.eval_shape(Virst(cfg).init, jax.random.key(0))["params"]
    return nn.unbox(boxed), nn.get_partition_spec(boxed)


def _spread(path: tuple[Any, ...], shape: tuple[int, ...], names: tuple[str, ...]) -> tuple[float, float]:
    """Mean and deviation of a parameter: no scale is one, no bias zero, and outputs do not amplify rounding.

    names: of its axes.
    """
    keys = [part.key for part in path]
    if keys[-4:] == ["mask_decoder", "object_head", "layer2", "bias"]:
        return OBJECT_BIAS, 0.05
    leaf = keys[-1]
    if leaf in ("scale", "gamma"):
        return 1.0, 0.1
    if leaf.endswith("bias"):
        return 0.0, 0.05
    if leaf == "kernel" or leaf.startswith("lora"):
        outputs = ("layers", "qkv") if names[0] != "conv_in" else names[1:]  # a transposed convolution
        inputs = [n for n, name in zip(shape[:-1], names, strict=False) if name not in outputs]
        return 0.0, float(0.7 / np.sqrt(np.prod(inputs)))
    return 0.0, 1.0 if leaf == "gaussian" else 0.5


def random_params(cfg: VirstConfig, *parts: str, seed: int = 0) -> dict[str, Any]:
    """Parameters float32 of some parts of `Virst(cfg)`, made on the host.

    The language model comes without its head, which segmentation does not use.
    """
    rng = np.random.default_rng(seed)

    def fill(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct, names: tuple[str, ...]) -> jax.Array:
        mean, deviation = _spread(path, shape.shape, names)
        return jnp.asarray(np.float32(mean) + np.float32(deviation) * rng.standard_normal(shape.shape, np.float32))

    shapes, axes = ({part: tree[part] for part in parts} for tree in parameter_shapes(cfg))
    if "llm" in shapes:
        shapes["llm"], axes["llm"] = ({k: v for k, v in t["llm"].items() if k != "lm_head"} for t in (shapes, axes))
    params: dict[str, Any] = jax.tree_util.tree_map_with_path(fill, shapes, axes)
    return params


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def device_normal(
    seed: int, shape: tuple[int, ...], dtype: str, mean: float = 0.0, deviation: float = 1.0
) -> jax.Array:
    """Normal numbers of the device's own generator: nothing of their size lies on the host."""
    numbers = jax.random.normal(jax.random.key(seed, impl="rbg"), shape, dtype)
    return (numbers * deviation + mean).astype(dtype)


def device_params(cfg: VirstConfig, dtype: str) -> dict[str, Any]:
    """All parameters of `Virst(cfg)` in `dtype`, made on the device."""
    count = itertools.count()

    def fill(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct, names: tuple[str, ...]) -> jax.Array:
        return device_normal(next(count), shape.shape, dtype, *_spread(path, shape.shape, names))

    params: dict[str, Any] = jax.tree_util.tree_map_with_path(fill, *parameter_shapes(cfg))
    return params


@dataclasses.dataclass(frozen=True)
class Past:
    """The memories that a tracker has of an object in frames 0 to T-1, of which frame 0 was prompted."""

    memory: np.ndarray  # float32[T, S, D], numbers of bfloat16, in which trackers keep them
    pointers: np.ndarray  # float32[T, C]


def random_past(cfg: Sam2Config, seed: int = 0) -> Past:
    """As many frames as there are pointers: all memories are in place."""
    rng = np.random.default_rng([1, seed])
    memory = rng.standard_normal((cfg.max_pointers, cfg.feature_size**2, cfg.memory_dim), np.float32)
    pointers = rng.standard_normal((cfg.max_pointers, cfg.hidden_size), np.float32)
    return Past(memory.astype(ml_dtypes.bfloat16).astype(np.float32), pointers)


def random_features(cfg: Sam2Config) -> Features:
    """Of one frame."""
    rng, size, width = np.random.default_rng(2), cfg.feature_size, cfg.hidden_size
    sides = ((4 * size, width // 8), (2 * size, width // 4), (size, width))
    return Features(*(jnp.asarray(rng.standard_normal((side, side, w), np.float32)) for side, w in sides))


def random_video(cfg: Sam2Config, frames: int) -> np.ndarray:
    """Frames uint8[T, R, R, 3] of drifting blobs."""
    return make_video(frames, cfg.image_size, cfg.image_size)


def remembering(cfg: VirstConfig, pasts: Sequence[Past], anchors: int = 1) -> ExpressionBatch:
    """The past of several objects as our tracker keeps it; anchors but the first lie in frames to come."""
    sam, tracker = cfg.sam2, Steps(cfg).tracker
    memory = np.stack([past.memory for past in pasts], 1)  # [T, O, S, D]
    pointers = np.stack([past.pointers for past in pasts], 1)
    count, objects = memory.shape[:2]
    known = Anchors(
        frames=jnp.arange(anchors, dtype=jnp.int32) * 2 * count,
        valid=jnp.ones(anchors, bool),
        prediction=Prediction(
            low_res=jnp.zeros((anchors, objects, sam.low_res_size, sam.low_res_size)),
            pointer=jnp.asarray(np.repeat(pointers[:1], anchors, 0)),
            object_score=jnp.ones((anchors, objects)),
            iou=jnp.ones((anchors, objects)),
        ),
        memory=jnp.asarray(np.repeat(memory[:1], anchors, 0), tracker.memory_dtype),
    )
    bank = tracker.start(objects)
    near, far = (np.arange(count - len(ring), count) for ring in (bank.memory_frames, bank.pointer_frames))
    filled = MemoryBank(
        bank.memory_frames.at[near % len(near)].set(near),
        bank.memory.at[near % len(near)].set(jnp.asarray(memory[near], bank.memory.dtype)),
        bank.pointer_frames.at[far % len(far)].set(far),
        bank.pointers.at[far % len(far)].set(jnp.asarray(pointers[far])),
    )
    return ExpressionBatch(known, filled, objects)


def track_inputs(cfg: VirstConfig, pasts: Sequence[Past], frame: Features, anchors: int = 1) -> tuple[Any, ...]:
    """What Steps.track takes behind the parameters: the frame after the past."""
    number, batch = len(pasts[0].memory), remembering(cfg, pasts, anchors)
    return batch.anchors, batch.bank, (frame,), np.array([number], np.int32), np.ones(1, bool), np.int32(number + 1)
