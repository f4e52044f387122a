"""How long every compiled step of inference takes, and how much of the device it uses.

Operations are XLA's count: the cost analysis of the lowered step, with loops unrolled (it counts a loop's body once)
and attention written out (it sees nothing of what a fused kernel does).
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.random_network import random_features, random_params, random_past, track_inputs
from virst_jax.config import VirstConfig
from virst_jax.inference.steps import SCALE, Steps
from virst_jax.inference.tiles import TILE
from virst_jax.models import layers
from virst_jax.models.qwen2 import init_cache
from virst_jax.ops.resize import resize_matrix
from virst_jax.profiling.flops import device_peak

VOCABULARY = 1024  # rows of the embedding table: reading does not depend on them, and all of them take 2 GB
PREFIX_TEXT, TEXT = 64, 128  # tokens of a conversation up to the video's end and after it
MASK_SIZE = (480, 854)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One of `Steps` on inputs of the size that it meets in use."""

    name: str
    unit: str  # what is timed
    step: str
    parts: tuple[str, ...]  # of the parameters that it reads
    inputs: Callable[[], tuple[Any, ...]]
    frames: int = 0  # in the unit; 0: its time does not depend on the frames
    calls: int = 1  # that the unit takes
    static: tuple[tuple[str, Any], ...] = ()


def list_stages(cfg: VirstConfig, expressions: int) -> list[Stage]:
    """All stages, in the order in which a video passes them."""
    sam, vision, llm, frames, anchors = cfg.sam2, cfg.vision, cfg.llm, cfg.max_seg_frames, cfg.max_anchors
    clips, tokens = cfg.max_video_frames // vision.clip_frames, vision.tokens_per_frame * vision.clip_frames
    prefix = clips * tokens + PREFIX_TEXT
    rng = np.random.default_rng(3)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    def pixels(count: int, side: int) -> tuple[Any, ...]:
        return jnp.asarray(rng.integers(0, 256, (count, side, side, 3), np.uint8)), SCALE

    def conversation() -> tuple[Any, ...]:
        index = np.full((1, prefix), -1, np.int32)
        index[0, -clips * tokens :] = np.arange(clips * tokens)
        visual = tuple(normal(tokens, llm.hidden_size) for _ in range(clips))
        return visual, np.zeros((1, prefix), np.int32), index, np.ones((1, prefix), bool)

    def text() -> tuple[Any, ...]:
        cache = init_cache(llm, cfg.compute, 1, prefix)
        cache = dataclasses.replace(cache, mask=jnp.ones_like(cache.mask), length=jnp.full_like(cache.length, prefix))
        seg = np.tile(np.arange(cfg.num_seg_tokens, dtype=np.int32), (expressions, 1))
        shape = (expressions, TEXT)
        return cache, np.zeros(shape, np.int32), np.ones(shape, bool), seg, ()

    def fused() -> tuple[Any, ...]:
        tops = tuple(normal(sam.feature_size, sam.feature_size, sam.hidden_size) for _ in range(frames))
        return normal(1, cfg.num_seg_tokens, llm.hidden_size), tops, np.arange(anchors, dtype=np.int32)

    def prompted() -> tuple[Any, ...]:
        numbers = np.arange(anchors, dtype=np.int32) * cfg.frames_per_anchor
        prompts = normal(1, anchors, cfg.num_seg_tokens, sam.hidden_size)
        return (random_features(sam),) * anchors, numbers, np.ones(anchors, bool), prompts

    def tracked() -> tuple[Any, ...]:
        return track_inputs(cfg, [random_past(sam)], random_features(sam), anchors)

    def mask() -> tuple[Any, ...]:
        matrix = resize_matrix(sam.low_res_size, TILE, "bilinear")
        return normal(1, 1, sam.low_res_size, sam.low_res_size), matrix, matrix

    tiles = -(-MASK_SIZE[0] // TILE) * -(-MASK_SIZE[1] // TILE)
    clip, side, one = vision.clip_frames, vision.image_size, (("keep_memory", False),)
    return [
        Stage("image encoder", "1 frame", "encode_batch", ("sam2",), lambda: pixels(1, sam.image_size), 1),
        Stage("anchors", f"{anchors} anchors", "prompt_anchors", ("sam2",), prompted, anchors),
        Stage("track step", "1 frame", "track", ("sam2",), tracked, 1, static=one),
        Stage("mask resize", "1 mask of {} x {}".format(*MASK_SIZE), "resize_masks", (), mask, 1, tiles),
        Stage(
            "video encoder", f"{clip} frames", "encode_clip", ("vision", "projector"), lambda: pixels(clip, side), clip
        ),
        Stage("LLM reads the video", f"{prefix} tokens", "read_video", ("llm",), conversation, cfg.max_video_frames),
        Stage("LLM reads the text", f"{expressions} x {TEXT} tokens", "read_text", ("llm",), text),
        Stage("second fusion", f"{frames} frames", "fuse", ("second_fusion",), fused, frames),
    ]


def take_turns(functions: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Median seconds of each; they take turns, so that what else the machine does meets all."""
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for times, function in zip(seconds, functions, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(function())
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


@contextlib.contextmanager
def unrolled() -> Iterator[None]:
    """Scans are traced without loops, and what a CPU computes in parts in one."""
    scan = jax.lax.scan
    whole = mock.patch.object(layers, "PART", 2**60)
    with whole, mock.patch.object(jax.lax, "scan", lambda *args, **kwargs: scan(*args, **kwargs | {"unroll": True})):
        yield


def count_flops(cfg: VirstConfig, step: str, args: Any, **static: Any) -> float:
    """XLA's count of the operations of one of `Steps`; args are arrays or shapes."""
    cfg = dataclasses.replace(cfg, compute=dataclasses.replace(cfg.compute, attention="plain"))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), args)
    function = getattr(Steps(cfg), step)
    with unrolled():
        lowered = jax.jit(function, static_argnames=tuple(static)).lower(*shapes, **static)
    cost: Any = lowered.cost_analysis()
    return float(cost["flops"])


def measure_stages(
    cfg: VirstConfig, *, layers: int, expressions: int, repeats: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Times of all stages.

    Args:
      layers: of the language model that are run, if it has so many.
      expressions: that are read together.
      say: told what is being done.

    Returns:
      A row a stage: seconds, seconds_per_frame (None where that means nothing), flops, share_of_peak, compile_seconds.
    """
    whole, layers = cfg.llm.num_layers, min(layers, cfg.llm.num_layers)
    cfg = dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, num_layers=layers, vocab_size=VOCABULARY))
    peak, _ = device_peak()
    rows: list[dict[str, Any]] = []
    held: dict[tuple[str, ...], Any] = {}
    for stage in list_stages(cfg, expressions):
        say(f"{stage.name}: compiling")
        if stage.parts not in held:
            held.clear()  # before others come: they do not all fit into memory together
            held[stage.parts] = random_params(cfg, *stage.parts) if stage.parts else None
        params, static = held[stage.parts], dict(stage.static)
        args = (params["sam2"] if stage.parts == ("sam2",) else params, *stage.inputs())
        step = jax.jit(getattr(Steps(cfg), stage.step), static_argnames=tuple(static))
        start = time.perf_counter()
        run = step.lower(*args, **static).compile()
        compiling = time.perf_counter() - start
        say(f"{stage.name}: running")
        jax.block_until_ready(run(*args))
        seconds = stage.calls * take_turns([lambda run=run, args=args: run(*args)], repeats)[0]  # type: ignore[misc]
        flops = stage.calls * count_flops(cfg, stage.step, args, **static)
        partly = stage.parts == ("llm",) and layers < whole
        rows.append(
            {
                "stage": stage.name + (f", {layers} of {whole} layers" if partly else ""),
                "unit": stage.unit,
                "seconds": seconds,
                "seconds_per_frame": seconds / stage.frames if stage.frames else None,
                "flops": flops,
                "share_of_peak": flops / seconds / peak,
                "compile_seconds": compiling,
            }
        )
    return rows
