"""The compiled steps of segmentation and chat with the shapes that they meet in use, for compiling them elsewhere.

Shapes follow from one another: what a step gives, the next one takes.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from virst_jax.config import VirstConfig
from virst_jax.inference.plan import Options
from virst_jax.inference.steps import SCALE, Steps
from virst_jax.inference.tiles import TILE
from virst_jax.models.generate import generate
from virst_jax.models.qwen2 import Qwen2
from virst_jax.types import PyTree

TEXT = 128  # tokens of a conversation after the video; a multiple of 64
PREFIX_TEXT = 64  # tokens before the video's end, beside those of the video
MASK_SIZE = (480, 854)
NEW_TOKENS = 64  # of an answer
DEFAULTS = Options()


@dataclass(frozen=True)
class StepCall:
    """A step, and what it is called with.

    part: of the parameters that it reads; empty: all; None: none.
    calls: how often segmenting the video calls it; 0: chat alone does.
    kept: of what it gives, arrays that stay until the video is done, bytes.
    """

    name: str
    function: Callable[..., Any]
    part: str | None
    arguments: tuple[PyTree, ...]  # of ShapeDtypeStructs, behind the parameters
    calls: int
    static: Mapping[str, Any] = field(default_factory=dict)
    kept: int = 0


def parameters(shapes: PyTree, dtype: str) -> PyTree:
    """Shapes of parameters as inference holds them, floating-point numbers in `dtype`."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype), shapes
    )


def step_calls(
    cfg: VirstConfig, params: PyTree, frames: int, expressions: int, options: Options = DEFAULTS
) -> list[StepCall]:
    """The steps that segment a video, in their order, then those of chat.

    Args:
      params: shapes of the parameters.
      frames: of the video, at least one clip.
      expressions: that are read and tracked together, at most the options' group size.
    """
    steps = Steps(cfg)
    rows = 1 << (expressions - 1).bit_length()
    sam, vision = cfg.sam2, cfg.vision
    clips = -(-min(frames, cfg.max_video_frames) // vision.clip_frames)
    slots = cfg.max_video_frames // vision.clip_frames
    fused = min(frames, cfg.max_seg_frames)
    scale = _shapes(SCALE)

    def pixels(count: int, side: int) -> Any:
        return jax.ShapeDtypeStruct((count, side, side, 3), np.uint8)

    def integers(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, np.int32)

    def flags(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, bool)

    frame = (pixels(options.batch, sam.image_size), scale)
    features = jax.eval_shape(steps.encode_batch, params["sam2"], *frame)[0]
    clip = (pixels(vision.clip_frames, vision.image_size), scale)
    visual = (jax.eval_shape(steps.encode_clip, params, *clip),) * slots
    prefix = slots * visual[0].shape[0] + PREFIX_TEXT
    video = (visual, integers(1, prefix), integers(1, prefix), flags(1, prefix))
    cache = jax.eval_shape(steps.read_video, params, *video).cache
    maps = (features.top,) * fused
    tops = maps if cfg.fusion.initial else ()
    text = (cache, integers(rows, TEXT), flags(rows, TEXT), integers(rows, cfg.num_seg_tokens), tops)
    hidden = jax.eval_shape(steps.read_text, params, *text).seg_hidden
    anchors, bank = steps.state_shapes(rows)
    slots_of_anchors = cfg.max_anchors
    fuse = (hidden, maps, integers(slots_of_anchors))
    prompts = jax.eval_shape(steps.fuse, params, *fuse)[0]
    prompted = ((features,) * slots_of_anchors, integers(slots_of_anchors), flags(slots_of_anchors), prompts)
    chunk = options.chunk
    followed = (anchors, bank, (features,) * chunk, integers(chunk), flags(chunk), integers())
    tiles = -(-MASK_SIZE[0] // TILE) * -(-MASK_SIZE[1] // TILE)
    low = jax.ShapeDtypeStruct((chunk, rows, sam.low_res_size, sam.low_res_size), np.float32)
    matrix = jax.ShapeDtypeStruct((TILE, sam.low_res_size), np.float32)
    chunks = -(-frames // chunk)
    calls = [
        StepCall("image encoder", steps.encode_batch, "sam2", frame, frames, kept=fused * _bytes(features)),
        StepCall("video encoder", steps.encode_clip, "", clip, clips, kept=_bytes(visual)),
        StepCall("LLM reads the video", steps.read_video, "", video, 1, {"keep_embeds": False}, _bytes(cache)),
        StepCall("LLM reads the sentences", steps.read_text, "", text, 1, {"keep_layers": False}),
        StepCall("second fusion", steps.fuse, "", fuse, 1),
        StepCall("anchors", steps.prompt_anchors, "sam2", prompted, 1, kept=_bytes((anchors, bank))),
        StepCall(f"track {chunk} frames", steps.track, "sam2", followed, chunks, {"keep_memory": False}),
        StepCall("mask tile", steps.resize_masks, None, (low, matrix, matrix), tiles * chunks, {"exclusive": False}),
    ]
    asked = prefix + TEXT
    conversation = (visual, integers(1, asked), integers(1, asked))
    calls.append(StepCall("embed a conversation", steps.embed, "", conversation, 0))
    embeds = jax.eval_shape(steps.embed, params, *conversation)
    answer = functools.partial(_answer, cfg)
    calls.append(StepCall(f"answer in {NEW_TOKENS} tokens", answer, "llm", (embeds, flags(1, asked)), 0))
    return calls


def _answer(cfg: VirstConfig, params: PyTree, embeds: jax.Array, mask: jax.Array) -> jax.Array:
    """The tokens of an answer; see models.generate."""
    tokens, _ = generate(
        Qwen2(cfg.llm, cfg.compute), params, embeds, mask, max_new_tokens=NEW_TOKENS, eos_ids=(cfg.llm.vocab_size - 1,)
    )
    return tokens


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype), tree)


def _bytes(tree: PyTree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
