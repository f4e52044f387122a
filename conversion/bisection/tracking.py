"""The operations of the tracker: anchors, then every frame's memories, memory attention, decoder and memory encoder.

Axes: A anchors, S = H*W positions, K keys, C width, D memory width, L mask side.
"""

import dataclasses
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
from virst_jax.models.sam2.tracker import Anchors, MemoryBank, Tracked, Tracker

from .encoders import encode_frame
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


class _Frames:
    """Names, and what the tracker's functions take, of tensors by name."""

    def __init__(self, network: Network, anchor_frames: tuple[int, ...], num_frames: int):
        self.network, self.num_frames = network, num_frames
        self.tracker: Tracker = network.steps.tracker
        self.cfg = network.cfg.sam2
        self.dtype = jnp.dtype(network.cfg.compute.dtype)
        self.anchor_frames = anchor_frames  # one for each anchor, in the order of computation

    @staticmethod
    def features_of(t: int) -> tuple[str, str, str]:
        return f"frame{t}.high0", f"frame{t}.high1", f"frame{t}.top"

    @staticmethod
    def outcome_of(t: int) -> tuple[str, str, str]:
        return f"frame{t}.low_res", f"frame{t}.pointer", f"frame{t}.score"

    def features(self, *levels: Array) -> Features:
        high0, high1, top = (jnp.asarray(x, self.dtype) for x in levels)
        return Features(high0, high1, top)

    @property
    def unique(self) -> list[int]:
        return list(dict.fromkeys(self.anchor_frames))

    def remembered(self, t: int) -> list[int]:
        """Frames before t of which the tracker may still hold something."""
        return list(range(max(0, t - max(self.cfg.num_maskmem, self.cfg.max_pointers)), t))

    def memory_inputs(self, t: int) -> tuple[str, ...]:
        frames = [*self.unique, *self.remembered(t)]
        return tuple(f"frame{n}.{part}" for n in frames for part in ("memory", "pointer"))

    def state(self, t: int, given: Sequence[Array]) -> tuple[Anchors, MemoryBank]:
        """Anchors and the memories before frame t, of the tensors that `memory_inputs` names."""
        pairs = list(zip(given[::2], given[1::2], strict=True))
        count = len(self.unique)
        empty = self.tracker.empty(1)
        slots = self.network.cfg.max_anchors
        memory = np.zeros((slots, *empty.memory.shape), np.float32)
        pointer = np.zeros((slots, *empty.prediction.pointer.shape), np.float32)
        for i, (m, p) in enumerate(pairs[:count]):
            memory[i, 0], pointer[i, 0] = m, p
        numbers = np.pad(np.asarray(self.unique, np.int32), (0, slots - count))
        spread: Any = jax.tree.map(lambda x: jnp.broadcast_to(x, (slots, *x.shape)), empty.prediction)
        prediction = dataclasses.replace(spread, pointer=jnp.asarray(pointer, empty.prediction.pointer.dtype))
        anchors = Anchors(
            jnp.asarray(numbers),
            jnp.arange(slots) < count,
            prediction,
            jnp.asarray(memory, self.tracker.memory_dtype),
        )
        bank = self.tracker.start(1)
        for n, (m, p) in zip(self.remembered(t), pairs[count:], strict=True):
            bank = add_to_bank(bank, n, jnp.asarray(m)[None], jnp.asarray(p)[None])
        return anchors, bank


def add_to_bank(bank: MemoryBank, number: int, memory: Array, pointer: Array) -> MemoryBank:
    """The state after frame `number`."""
    m, p = number % bank.memory_frames.shape[0], number % bank.pointer_frames.shape[0]
    return MemoryBank(
        bank.memory_frames.at[m].set(number),
        bank.memory.at[m].set(jnp.asarray(memory, bank.memory.dtype)),
        bank.pointer_frames.at[p].set(number),
        bank.pointers.at[p].set(jnp.asarray(pointer, bank.pointers.dtype)),
    )


def tracking_operations(network: Network, video: np.ndarray, plan: Plan, recorded_anchors: Any) -> Iterator[Operation]:
    """Anchors and all frames of uint8[T, h, w, 3].

    recorded_anchors: frame of each anchor as the other program chose them; None: as the plan does.
    """
    chosen = np.asarray(plan.anchor_frames, np.int32)
    yield Operation("anchors / choice", (), ("anchors",), lambda _: (chosen,))
    frames = _Frames(network, tuple(chosen if recorded_anchors is None else recorded_anchors), len(video))
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

    def __init__(self, frames: _Frames):
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

        def encode(params: Any, frame: Features, low_res: jax.Array, score: jax.Array) -> jax.Array:
            prediction = dataclasses.replace(
                tracker.empty(1).prediction, low_res=low_res[None], object_score=score.reshape(1)
            )
            return tracker._encode_memory(params, frame, prediction).memory[0]

        def step(
            params: Any, anchors: Anchors, bank: MemoryBank, frame: Features, t: Any, count: Any
        ) -> tuple[MemoryBank, Tracked]:
            one = jax.tree.map(lambda x: x[None], frame)
            bank, out = tracker.track(
                params, anchors, bank, one, jnp.asarray(t)[None], jnp.ones(1, bool), count, keep_memory=True
            )
            return bank, jax.tree.map(lambda x: x[0], out)

        self.enter, self.layer, self.norm = compiled(enter), compiled(layer), compiled(norm)
        self.decode, self.encode, self.step = compiled(decode), compiled(encode), compiled(step)
        self.prompt = compiled(tracker.prompt_anchors)


def _outcome(prediction: Prediction) -> tuple[jax.Array, ...]:
    return prediction.low_res[0], prediction.pointer[0], prediction.object_score[0]


def _anchor_operations(frames: _Frames, programs: _Programs, plan: Plan) -> Iterator[Operation]:
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
        return tuple(x for i in last for x in _outcome(jax.tree.map(lambda x, i=i: x[i], out)))

    levels = tuple(name for n in unique for name in frames.features_of(n))
    outputs = tuple(name for n in unique for name in frames.outcome_of(n))
    yield Operation("anchors / masks", ("prompts", *levels), outputs, prompt, params)
    for n in unique:
        yield _memory_operation(frames, programs, n, "anchor")


def _memory_operation(frames: _Frames, programs: _Programs, t: int, kind: str) -> Operation:
    def encode(params: Any, low_res: Array, score: Array, *levels: Array) -> tuple[jax.Array]:
        return (programs.encode(params, frames.features(*levels), jnp.asarray(low_res), jnp.asarray(score)),)

    low_res, _, score = frames.outcome_of(t)
    inputs, params = (low_res, score, *frames.features_of(t)), frames.network.params["sam2"]
    return Operation(f"{kind} {t} / memory encoder", inputs, (f"frame{t}.memory",), encode, params)


def _frame_operations(frames: _Frames, programs: _Programs, t: int) -> Iterator[Operation]:
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
        return _outcome(programs.decode(params, jnp.asarray(image, frames.dtype), frames.features(*levels)))

    outcome = frames.outcome_of(t)
    yield Operation(f"frame {t} / decoder", (image, *levels), outcome, decode, params)
    yield _memory_operation(frames, programs, t, "frame")

    def step(params: Any, *given: Array) -> tuple[Any, ...]:
        bank, out = programs.step(params, *arguments(given))
        after = add_to_bank(arguments(given)[1], t, out.memory, out.prediction.pointer)
        same = jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), bank, after))
        return *_outcome(out.prediction), out.memory[0], np.asarray(same)

    outputs = (*outcome, f"frame{t}.memory", "scan.state")
    yield Operation(f"frame {t} / scan", (*levels, *state), outputs, step, params)
