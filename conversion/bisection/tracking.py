"""The operations of the tracker: anchors, then every frame's memories, memory attention, decoder and memory encoder.

Axes: A anchors, S = H*W positions, K keys, C width, D memory width, L mask side.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from virst_jax.inference.plan import Plan
from virst_jax.inference.reading import anchor_positions
from virst_jax.inference.steps import Network
from virst_jax.models.sam2 import memory as memories
from virst_jax.models.sam2.sam2 import Features, Prediction, Sam2
from virst_jax.models.sam2.tracker import PROMPT_LOGIT_LIMIT, Anchors, MemoryBank, Tracked

from .decoder import DecoderPrograms, decoder_operations, entry_of
from .encoders import encode_frame
from .frames import Frames, add_to_bank, outcome
from .memory_encoder import EncoderPrograms, memory_operations
from .operation import Array, Operation, apply, compiled, hearing, layer_of, replacing

OUTCOME = ("low_res", "pointer", "score")


def second_moments(keys: Array, positions: Array, mask: Array) -> jax.Array:
    """What attention can tell of the valid keys, in whatever order they lie: float32[1 + 2D, 1 + 2D].

    The sum over keys of the outer product of (1, key, position) with itself.

    Args:
      keys, positions: dtype[K, D].
      mask: bool[K].
    """
    rows = jnp.concatenate([jnp.ones((len(keys), 1)), keys, positions], axis=1).astype(jnp.float32)
    rows = jnp.where(mask[:, None], rows, 0)
    return jnp.matmul(rows.T, rows, precision="highest")


def tracking_operations(network: Network, video: np.ndarray, plan: Plan, recorded_anchors: Any) -> Iterator[Operation]:
    """Anchors and all frames of uint8[T, h, w, 3].

    recorded_anchors: frame of each anchor as the other program chose them; None: as the plan does.
    """
    chosen = np.asarray(plan.anchor_frames, np.int32)
    yield Operation("anchors / choice", (), ("anchors",), lambda _: (chosen,))
    frames = Frames(network, tuple(chosen if recorded_anchors is None else recorded_anchors), len(video))
    for t in range(len(video)):

        def encode(_: None, t: int = t) -> tuple[jax.Array, ...]:
            features = encode_frame(network, video, t, "bicubic")
            return features.high0, features.high1, features.top

        yield Operation(f"frame {t} / features", (), frames.features_of(t), encode, whole="image / ")
    programs = _Programs(frames)
    yield from _anchor_operations(frames, programs, plan)
    for t in range(len(video)):
        if t not in frames.unique:
            yield from _frame_operations(frames, programs, t)


class _Programs:
    """Compiled once for all frames."""

    def __init__(self, frames: Frames):
        self.frames, tracker = frames, frames.tracker
        sam, cfg, compute = tracker.sam, frames.cfg, frames.network.cfg.compute

        def conditioned(params: Any, anchors: Anchors, bank: MemoryBank, frame: Features, t: Any, count: Any) -> Any:
            """What enters memory attention: its arguments."""
            heard: list[Any] = []
            with nn.intercept_methods(hearing(memories.MemoryAttention, heard)):
                tracker.condition(params, anchors, anchors.valid, bank, frame, t, count)
            return heard[0][0]

        def enter(params: Any, *given: Any) -> tuple[jax.Array, jax.Array]:
            image, image_pos, keys, keys_pos, mask, tokens, _ = conditioned(params, *given)
            attention = memories.MemoryAttention(cfg, compute)
            own = params["memory_attention"]
            _, kept = apply(attention, own, image, image_pos, keys, keys_pos, mask, tokens, mutable=["intermediates"])
            return second_moments(keys[0], keys_pos[0], mask[0]), kept["intermediates"]["entered"][0]

        def layer(params: Any, own: Any, x: jax.Array, *given: Any) -> jax.Array:
            _, _, keys, keys_pos, mask, tokens, _ = conditioned(params, *given)
            out: jax.Array = apply(memories.Layer(cfg, compute, tokens), own, x, keys, keys_pos, mask)[0]
            return out

        def norm(params: Any, x: jax.Array) -> jax.Array:
            attention = memories.MemoryAttention(cfg, compute)
            none = jnp.zeros((1, 1, cfg.memory_dim), x.dtype)
            with nn.intercept_methods(replacing(memories.Layer, lambda *_: (x, None))):
                out: jax.Array = apply(attention, params["memory_attention"], x, 0 * x, none, none)
            return out.reshape(cfg.feature_size, cfg.feature_size, -1)

        def decode(params: Any, image: jax.Array, frame: Features) -> Prediction:
            sparse = apply(sam, params, 1, method=Sam2.no_prompt)
            out: Prediction = apply(sam, params, image[None], frame, sparse, mode=tracker.mode, method=Sam2.predict)
            return out

        def step(
            params: Any, anchors: Anchors, bank: MemoryBank, frame: Features, t: Any, count: Any
        ) -> tuple[MemoryBank, Tracked]:
            one = jax.tree.map(lambda x: x[None], frame)
            bank, out = tracker.track(
                params, anchors, bank, one, jnp.asarray(t)[None], jnp.ones(1, bool), count, keep_memory=True
            )
            return bank, jax.tree.map(lambda x: x[0], out)

        self.enter, self.layer, self.norm = compiled(enter), compiled(layer), compiled(norm)
        self.decode, self.step = compiled(decode), compiled(step)
        self.prompt = compiled(tracker.prompt_anchors)
        self.decoder, self.encoder = DecoderPrograms(tracker), EncoderPrograms(tracker)


def _anchor_operations(frames: Frames, programs: _Programs, plan: Plan) -> Iterator[Operation]:
    network, params = frames.network, frames.network.params["sam2"]
    slots, numbers, unique = network.cfg.max_anchors, frames.anchor_frames, frames.unique
    last = [max(i for i, n in enumerate(numbers) if n == frame) for frame in unique]

    def prompt(params: Any, prompts: Array, *levels: Array) -> tuple[Any, ...]:
        known = {n: frames.features(*levels[3 * i : 3 * i + 3]) for i, n in enumerate(unique)}
        features = [known[n] for n in numbers]
        features += [features[-1]] * (slots - len(features))
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *features)
        padded = jnp.asarray(np.pad(np.asarray(numbers, np.int32), (0, slots - len(numbers))))
        chosen = jnp.asarray(prompts, frames.dtype).swapaxes(1, 2)[:, anchor_positions(network.cfg, plan)]
        out = programs.prompt(params, stacked, padded, jnp.arange(slots) < len(numbers), chosen).prediction
        return tuple(x for i in last for x in outcome(jax.tree.map(lambda x, i=i: x[i], out)))

    for n in unique:
        yield _anchor_entry(frames, programs, anchor_positions(network.cfg, plan), n)
        yield from decoder_operations(frames, programs.decoder, n, f"anchor {n} / decoder")
    levels = tuple(name for n in unique for name in frames.features_of(n))
    outputs = tuple(name for n in unique for name in frames.outcome_of(n))
    yield Operation("anchors / masks", ("prompts", *levels), outputs, prompt, params, whole="anchor ")
    for n in unique:
        yield from memory_operations(frames, programs.encoder, n, f"anchor {n} / memory encoder")


def _anchor_entry(frames: Frames, programs: _Programs, positions: np.ndarray, n: int) -> Operation:
    """What enters the decoder for the last anchor on frame n: an earlier one there hands on its logits."""
    *earlier, last = [i for i, number in enumerate(frames.anchor_frames) if number == n]
    side = frames.cfg.low_res_size

    def enter(params: Any, prompts: Array, *levels: Array) -> tuple[Any, ...]:
        features, sparse = frames.features(*levels), jnp.asarray(prompts, frames.dtype)[0].swapaxes(0, 1)[positions]
        logits, prompted = jnp.zeros((1, side, side)), False
        for i in earlier:
            low_res = programs.decoder.anchor(params, features, sparse[i][None], logits, prompted).low_res
            logits, prompted = jnp.clip(low_res, -PROMPT_LOGIT_LIMIT, PROMPT_LOGIT_LIMIT), True
        out: tuple[Any, ...] = programs.decoder.enter_anchor(params, features, sparse[last][None], logits, prompted)
        return out

    inputs = ("prompts", *frames.features_of(n))
    return Operation(f"anchor {n} / decoder entry", inputs, entry_of(n), enter, frames.without_image_encoder)


def _frame_operations(frames: Frames, programs: _Programs, t: int) -> Iterator[Operation]:
    params = frames.network.params["sam2"]
    state = frames.memory_inputs(t)
    levels = frames.features_of(t)
    number, count = jnp.int32(t), jnp.int32(frames.num_frames)

    def arguments(given: Sequence[Array]) -> tuple[Any, ...]:
        return (*frames.state(t, given[3:]), frames.features(*given[:3]), number, count)

    def enter(params: Any, *given: Array) -> tuple[jax.Array, ...]:
        moments, x = programs.enter(params, *arguments(given))
        return moments, x

    names = (f"frame{t}.keys", f"frame{t}.enter")
    yield Operation(f"frame {t} / memories", (*levels, *state), names, enter, params)
    before = f"frame{t}.enter"

    def layer(params: Any, x: Array, *given: Array) -> tuple[jax.Array]:
        return (programs.layer(*params, jnp.asarray(x, frames.dtype), *arguments(given)),)

    for i in range(frames.cfg.memory_layers):
        own = (params, layer_of(params["memory_attention"]["layers"], i))
        name = f"frame{t}.attention{i}"
        yield Operation(f"frame {t} / memory layer {i}", (before, *levels, *state), (name,), layer, own)
        before = name

    def norm(params: Any, x: Array) -> tuple[jax.Array]:
        return (programs.norm(params, jnp.asarray(x, frames.dtype)),)

    image = f"frame{t}.conditioned"
    yield Operation(f"frame {t} / memory norm", (before,), (image,), norm, params)

    def decode(params: Any, image: Array, *levels: Array) -> tuple[jax.Array, ...]:
        return outcome(programs.decode(params, jnp.asarray(image, frames.dtype), frames.features(*levels)))

    def enter_decoder(params: Any, image: Array) -> tuple[jax.Array, ...]:
        out: tuple[jax.Array, ...] = programs.decoder.enter_frame(params, jnp.asarray(image, frames.dtype))
        return out

    later = frames.without_image_encoder
    stage, results = f"frame {t} / decoder", frames.outcome_of(t)
    yield Operation(f"{stage} entry", (image,), entry_of(t), enter_decoder, later)
    yield from decoder_operations(frames, programs.decoder, t, stage)
    yield Operation(stage, (image, *levels), results, decode, later, whole=f"{stage} ")
    yield from memory_operations(frames, programs.encoder, t, f"frame {t} / memory encoder")

    def step(params: Any, *given: Array) -> tuple[Any, ...]:
        bank, out = programs.step(params, *arguments(given))
        after = add_to_bank(arguments(given)[1], t, out.memory, out.prediction.pointer)
        same = jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), bank, after))
        return *outcome(out.prediction), out.memory[0], np.asarray(same)

    outputs = (*results, f"frame{t}.memory", "scan.state")
    yield Operation(f"frame {t} / scan", (*levels, *state), outputs, step, params)
