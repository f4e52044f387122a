"""Names of the tracker's tensors by frame, and what the tracker's functions take, made of such tensors."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from virst_jax.inference.steps import Network
from virst_jax.models.sam2.sam2 import Features, Prediction
from virst_jax.models.sam2.tracker import Anchors, MemoryBank, Tracker

from .operation import Array, Outputs


class Frames:
    """Names, and what the tracker's functions take, of tensors by name."""

    def __init__(self, network: Network, anchor_frames: tuple[int, ...], num_frames: int):
        self.network, self.num_frames = network, num_frames
        self.tracker: Tracker = network.steps.tracker
        self.cfg = network.cfg.sam2
        self.dtype = jnp.dtype(network.cfg.compute.dtype)
        self.anchor_frames = anchor_frames  # one for each anchor, in the order of computation

    @property
    def without_image_encoder(self) -> dict[str, Any]:
        """The parameters of Sam2 that matter once a frame has features."""
        return {name: value for name, value in self.network.params["sam2"].items() if name != "image_encoder"}

    @staticmethod
    def features_of(t: int) -> tuple[str, str, str]:
        return f"frame{t}.high0", f"frame{t}.high1", f"frame{t}.top"

    @staticmethod
    def outcome_of(t: int) -> tuple[str, str, str]:
        return f"frame{t}.low_res", f"frame{t}.pointer", f"frame{t}.score"

    def features(self, *levels: Array) -> Features:
        high0, high1, top = (jnp.asarray(x, self.dtype) for x in levels)
        return Features(high0, high1, top)

    def in_dtype(self, run: Callable[..., Outputs]) -> Callable[..., Outputs]:
        """`run` with its tensors, all but the parameters, in the network's type."""
        return lambda params, *given: run(params, *(jnp.asarray(x, self.dtype) for x in given))

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


def outcome(prediction: Prediction) -> tuple[jax.Array, ...]:
    """What `Frames.outcome_of` names, of the one object."""
    return prediction.low_res[0], prediction.pointer[0], prediction.object_score[0]
