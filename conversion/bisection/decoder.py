"""The operations of the mask decoder on one frame: two-way blocks, final attention, masks, scores, choice.

Axes: N tokens, S = H*W positions, C width, M masks, L mask side.
"""

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from virst_jax.models.sam2.mask_decoder import MaskDecoder, Masks, TwoWayBlock
from virst_jax.models.sam2.sam2 import Features, Prediction, Sam2
from virst_jax.models.sam2.tracker import Tracker

from .frames import Frames, outcome
from .operation import Array, Operation, Outputs, apply, compiled, hearing, keeping, replacing

Entry = tuple[jax.Array, jax.Array]  # tokens dtype[1, N, C] and image dtype[1, S, C], as the first block takes them


class DecoderPrograms:
    """The decoder's parts, compiled once for all frames. `params` are those of Sam2, or all but the image encoder's."""

    def __init__(self, tracker: Tracker):
        sam, cfg, compute = tracker.sam, tracker.cfg, tracker.sam.compute
        decoder = MaskDecoder(cfg, compute)

        def enter(params: Any, *given: Any) -> Entry:
            """Of the arguments of Sam2.predict."""
            heard: list[Any] = []
            with nn.intercept_methods(hearing(TwoWayBlock, heard)):
                apply(sam, params, *given, mode=tracker.mode, method=Sam2.predict)
            (tokens, image, *_), _ = heard[0]
            return tokens, image

        def enter_frame(params: Any, image: jax.Array) -> Entry:
            sparse = apply(sam, params, 1, method=Sam2.no_prompt)
            return enter(params, image[None], _no_features(image), sparse)

        def enter_anchor(params: Any, frame: Features, sparse: jax.Array, prompt: jax.Array, prompted: Any) -> Entry:
            image = apply(sam, params, frame, 1, method=Sam2.without_memory)
            return enter(params, image, frame, sparse, prompt, prompted)

        def anchor(params: Any, frame: Features, sparse: jax.Array, prompt: jax.Array, prompted: Any) -> Prediction:
            image = apply(sam, params, frame, 1, method=Sam2.without_memory)
            out: Prediction = apply(
                sam, params, image, frame, sparse, prompt, prompted, mode=tracker.mode, method=Sam2.predict
            )
            return out

        def position(params: Any) -> jax.Array:
            x: jax.Array = apply(sam, params, method=lambda self: self.prompt_encoder.dense_position())
            return x.reshape(1, -1, x.shape[-1])

        def block(index: int) -> Callable[..., Outputs]:
            module = TwoWayBlock(cfg, compute, first=index == 0)

            def run(params: Any, state: jax.Array, image: jax.Array, tokens: jax.Array) -> Outputs:
                own = params["mask_decoder"][f"blocks_{index}"]
                where = position(params).astype(image.dtype)
                out: Entry = apply(module, own, state, image, tokens, where, None)
                return out

            return compiled(run)

        def decode(params: Any, state: jax.Array, image: jax.Array, tokens: jax.Array, frame: Features) -> Masks:
            """The decoder with these for what its blocks give."""
            side = cfg.feature_size
            where = position(params).reshape(side, side, -1)
            sparse = tokens[:, 2 + 1 + cfg.num_multimask :]
            square = jnp.zeros((1, side, side, image.shape[-1]), image.dtype)
            levels = (frame.high0[None], frame.high1[None])
            with nn.intercept_methods(replacing(TwoWayBlock, lambda *_: (state, image))):
                out: Masks = apply(decoder, params["mask_decoder"], square, where, sparse, square, levels)
            return out

        def attend(params: Any, state: jax.Array, image: jax.Array, tokens: jax.Array) -> Outputs:
            kept: list[Any] = []
            with nn.intercept_methods(keeping("final_norm", kept)):
                decode(params, state, image, tokens, _no_features(image.reshape(cfg.feature_size, -1, image.shape[-1])))
            return (kept[0],)

        def masks(params: Any, final: jax.Array, image: jax.Array, high0: jax.Array, high1: jax.Array) -> Outputs:
            frame = Features(high0, high1, jnp.zeros(()))
            with nn.intercept_methods(replacing("final_norm", lambda *_: final)):
                return (decode(params, final, image, final, frame).logits,)

        def scores(params: Any, final: jax.Array) -> Outputs:
            image = jnp.zeros((1, cfg.feature_size**2, cfg.hidden_size), final.dtype)
            frame = _no_features(image.reshape(cfg.feature_size, cfg.feature_size, -1))
            with nn.intercept_methods(replacing("final_norm", lambda *_: final)):
                out = decode(params, final, image, final, frame)
            return out.ious, out.object_score

        def choose(params: Any, logits: jax.Array, ious: jax.Array, score: jax.Array, final: jax.Array) -> Outputs:
            tokens = final[:, 2 : 2 + logits.shape[1]]
            decoded = Masks(logits, ious, tokens, score)
            return outcome(apply(sam, params, decoded, mode=tracker.mode, method=Sam2.choose))

        self.enter_frame, self.enter_anchor = compiled(enter_frame), compiled(enter_anchor)
        self.anchor = compiled(anchor)
        self.blocks = [block(i) for i in range(cfg.decoder_layers)]
        self.attend, self.masks = compiled(attend), compiled(masks)
        self.scores, self.choose = compiled(scores), compiled(choose)


def _no_features(image: jax.Array) -> Features:
    """Levels of the right shapes around image[H, W, C], for steps that do not depend on them."""
    height, width, channels = image.shape
    sizes = ((4 * height, 4 * width, channels // 8), (2 * height, 2 * width, channels // 4))
    high0, high1 = (jnp.zeros(size, image.dtype) for size in sizes)
    return Features(high0, high1, image)


def decoder_operations(frames: Frames, programs: DecoderPrograms, t: int, stage: str) -> Iterator[Operation]:
    """All behind the entry, whose outputs are `entry_of(t)`. `stage` is what the operations' names begin with."""
    params, dtype = frames.without_image_encoder, frames.dtype
    tokens, image = entry_of(t)
    state = tokens

    for i, block in enumerate(programs.blocks):
        outputs = (f"frame{t}.decoder{i}.tokens", f"frame{t}.decoder{i}.image")
        yield Operation(f"{stage} block {i}", (state, image, tokens), outputs, frames.in_dtype(block), params)
        state, image = outputs
    final, logits = f"frame{t}.decoder.final", f"frame{t}.decoder.masks"
    yield Operation(f"{stage} attention", (state, image, tokens), (final,), frames.in_dtype(programs.attend), params)
    levels = frames.features_of(t)[:2]
    yield Operation(f"{stage} masks", (final, image, *levels), (logits,), frames.in_dtype(programs.masks), params)
    heads = (f"frame{t}.decoder.ious", f"frame{t}.decoder.object")
    yield Operation(f"{stage} scores", (final,), heads, frames.in_dtype(programs.scores), params)

    def choose(params: Any, logits: Array, ious: Array, score: Array, final: Array) -> Outputs:
        floats = (jnp.asarray(x) for x in (logits, ious, score))
        return programs.choose(params, *floats, jnp.asarray(final, dtype))

    yield Operation(f"{stage} choice", (logits, *heads, final), frames.outcome_of(t), choose, params)


def entry_of(t: int) -> tuple[str, str]:
    """Names of what the first block takes."""
    return f"frame{t}.decoder.tokens", f"frame{t}.decoder.image"
