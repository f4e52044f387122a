"""The compiled steps of segmentation, tracking and chat with the shapes of use, for compiling them elsewhere.

Shapes follow from one another: what a step gives, the next one takes.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from virst_jax.config import TrackerConfig, VirstConfig
from virst_jax.inference.plan import Options, padded_rows
from virst_jax.inference.steps import SCALE, Steps
from virst_jax.inference.tiles import TILE
from virst_jax.inference.tracker_steps import TrackerSteps
from virst_jax.models.generate import generate
from virst_jax.models.qwen2 import Qwen2
from virst_jax.models.sam2.prompted import ObjectAnchors, ObjectBank, PromptTokens
from virst_jax.ops.quantized import is_scale
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
    """Shapes of parameters as inference holds them: floating-point numbers in `dtype`, but for scales of integers."""

    def held(path: tuple[Any, ...], x: PyTree) -> jax.ShapeDtypeStruct:
        casts = jnp.issubdtype(x.dtype, jnp.floating) and not is_scale(jax.tree_util.keystr(path, simple=True))
        return jax.ShapeDtypeStruct(x.shape, dtype if casts else x.dtype)

    return jax.tree_util.tree_map_with_path(held, shapes)


def step_calls(
    cfg: VirstConfig,
    params: PyTree,
    frames: int,
    expressions: int,
    options: Options = DEFAULTS,
    *,
    text: int = TEXT,
    prefix_text: int = PREFIX_TEXT,
) -> list[StepCall]:
    """The steps that segment a video, in their order, then those of chat; of a tracker alone those of tracking.

    Args:
      params: shapes of the parameters.
      frames: of the video, at least one clip.
      expressions: that are read and tracked together, at most the options' group size; of a tracker, objects.
      text: tokens of a conversation after the video; a multiple of 64.
      prefix_text: tokens before the video's end, beside those of the video.
    """
    rows = padded_rows(expressions)
    if isinstance(cfg, TrackerConfig):
        return _tracker_calls(cfg, params, frames, rows, options)
    steps = Steps(cfg)
    sam, vision = cfg.sam2, cfg.vision
    clips = -(-min(frames, cfg.max_video_frames) // vision.clip_frames)
    slots = cfg.max_video_frames // vision.clip_frames
    fused = min(frames, cfg.max_seg_frames)
    scale = _shapes(SCALE)

    frame = (_pixels(options.batch, sam.image_size), scale)
    features = jax.eval_shape(steps.encode_batch, params["sam2"], *frame)[0]
    clip = (_pixels(vision.clip_frames, vision.image_size), scale)
    visual = (jax.eval_shape(steps.encode_clip, params, *clip),) * slots
    prefix = slots * visual[0].shape[0] + prefix_text
    video = (visual, _integers(1, prefix), _integers(1, prefix), _flags(1, prefix))
    cache = jax.eval_shape(steps.read_video, params, *video).cache
    maps = (features.top,) * fused
    tops = maps if cfg.fusion.initial else ()
    sentences = (cache, _integers(rows, text), _flags(rows, text), _integers(rows, cfg.num_seg_tokens), tops)
    hidden = jax.eval_shape(steps.read_text, params, *sentences).seg_hidden
    anchors, bank = steps.state_shapes(rows)
    slots_of_anchors = cfg.max_anchors
    fuse = (hidden, maps, _integers(slots_of_anchors))
    prompts = jax.eval_shape(steps.fuse, params, *fuse)[0]
    prompted = ((features,) * slots_of_anchors, _integers(slots_of_anchors), _flags(slots_of_anchors), prompts)
    chunk = options.chunk
    followed = (anchors, bank, (features,) * chunk, _integers(chunk), _flags(chunk), _integers())
    chunks = -(-frames // chunk)
    calls = [
        StepCall("image encoder", steps.encode_batch, "sam2", frame, frames, kept=fused * _bytes(features)),
        StepCall("video encoder", steps.encode_clip, "", clip, clips, kept=_bytes(visual)),
        StepCall("LLM reads the video", steps.read_video, "", video, 1, {"keep_embeds": False}, _bytes(cache)),
        StepCall("LLM reads the sentences", steps.read_text, "", sentences, 1, {"keep_layers": False}),
        StepCall("second fusion", steps.fuse, "", fuse, 1),
        StepCall("anchors", steps.prompt_anchors, "sam2", prompted, 1, kept=_bytes((anchors, bank))),
        StepCall(f"track {chunk} frames", steps.track, "sam2", followed, chunks, {"keep_memory": False}),
        _mask_tile(steps, sam.low_res_size, rows, chunk, chunks),
    ]
    asked = prefix + text
    conversation = (visual, _integers(1, asked), _integers(1, asked))
    calls.append(StepCall("embed a conversation", steps.embed, "", conversation, 0))
    embeds = jax.eval_shape(steps.embed, params, *conversation)
    answer = functools.partial(_answer, cfg)
    calls.append(StepCall(f"answer in {NEW_TOKENS} tokens", answer, "llm", (embeds, _flags(1, asked)), 0))
    return calls


def _tracker_calls(cfg: TrackerConfig, params: PyTree, frames: int, objects: int, options: Options) -> list[StepCall]:
    """Steps of tracking `objects` from clicks on the first frame; see inference.session."""
    sam, chunk = cfg.sam2, options.chunk
    steps = TrackerSteps(sam, cfg.compute)
    frame = (_pixels(options.batch, sam.image_size), _shapes(SCALE))
    features = jax.eval_shape(steps.encode_batch, params["sam2"], *frame)[0]
    tokens = PromptTokens(_numbers(1, 1, 2), _integers(1, 1), _integers(1))
    click = (features, tokens, _numbers(1, sam.low_res_size, sam.low_res_size), _flags(), None)
    outcome = jax.eval_shape(steps.prompt_objects, params["sam2"], *click)
    memory, pointer = outcome.memory, outcome.prediction.pointer
    kept: Any = [jax.ShapeDtypeStruct((objects, 1, *x.shape[1:]), x.dtype) for x in (memory, pointer)]
    anchors = ObjectAnchors(_integers(objects, 1), _flags(objects, 1), *kept)
    bank = jax.eval_shape(lambda: ObjectBank.empty(sam, objects, memory.dtype, pointer.dtype))
    followed = (anchors, bank, (features,) * chunk, _integers(chunk), _flags(chunk), _integers(), _integers())
    chunks = -(-frames // chunk)
    return [
        StepCall("image encoder", steps.encode_batch, "sam2", frame, frames),
        StepCall("a click", steps.prompt_objects, "sam2", click, objects, kept=_bytes((anchors, bank))),
        StepCall(f"track {chunk} frames", steps.propagate, "sam2", followed, chunks),
        _mask_tile(steps, sam.low_res_size, objects, chunk, chunks),
    ]


def _mask_tile(steps: TrackerSteps, side: int, rows: int, chunk: int, chunks: int) -> StepCall:
    tiles = -(-MASK_SIZE[0] // TILE) * -(-MASK_SIZE[1] // TILE)
    arguments = (_numbers(chunk, rows, side, side), _numbers(TILE, side), _numbers(TILE, side))
    return StepCall("mask tile", steps.resize_masks, None, arguments, tiles * chunks, {"exclusive": False})


def _pixels(count: int, side: int) -> Any:
    return jax.ShapeDtypeStruct((count, side, side, 3), np.uint8)


def _integers(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, np.int32)


def _flags(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, bool)


def _numbers(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, np.float32)


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
