"""What a session keeps of every object, on the host: prompts, and the outcome of every frame.

Axes: O objects, A anchor slots, R remembered frames, P remembered pointers, S positions of the feature grid, C width,
D memory width.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np

from virst_jax.config import Sam2Config
from virst_jax.inference.outcomes import Outcome
from virst_jax.inference.plan import padded_rows
from virst_jax.inference.prompts import Prompt
from virst_jax.models.sam2.prompted import NO_FRAME, ObjectAnchors, ObjectBank


@dataclass
class ObjectState:
    """One object.

    Attributes:
      object_id: 1 or more.
      label: for people: the sentence, or "object 3".
      by_sentence: whether a sentence has begun it.
      prompts: by frame.
      anchors: the outcomes of prompted frames, by frame.
      settled: the anchors there were when tracking began last. A correction sees these: others that were given since
        are not seen by it, nor is an earlier try on its own frame, but for the mask that it gave.
      tracked: the outcomes of tracked frames, of those prompted since the last tracking, too.
      backward: of every frame that was tracked over, whether backward.
    """

    object_id: int
    label: str
    by_sentence: bool = False
    prompts: dict[int, Prompt] = field(default_factory=dict)
    anchors: dict[int, Outcome] = field(default_factory=dict)
    settled: dict[int, Outcome] = field(default_factory=dict)
    tracked: dict[int, Outcome] = field(default_factory=dict)
    backward: dict[int, bool] = field(default_factory=dict)

    def copy(self) -> "ObjectState":
        """With dictionaries of its own; what they hold is never changed."""
        return dataclasses.replace(
            self,
            prompts=dict(self.prompts),
            anchors=dict(self.anchors),
            settled=dict(self.settled),
            tracked=dict(self.tracked),
            backward=dict(self.backward),
        )

    def on(self, frame: int) -> Outcome | None:
        """The outcome of a frame; None: it has none yet."""
        return self.anchors.get(frame) or self.tracked.get(frame)

    def settle(self) -> None:
        """Tracking begins: all anchors are seen from now on, and what was tracked on their frames is forgotten."""
        self.settled = dict(self.anchors)
        for frame in self.anchors:
            self.tracked.pop(frame, None)

    def before_prompts(self) -> "ObjectState":
        """As tracking has left the object: what a correction sees."""
        return dataclasses.replace(self, anchors=self.settled)

    def clear(self, frame: int) -> None:
        """Forgets the prompt of a frame. What tracking has seen of its anchor stays as a tracked frame's outcome."""
        del self.prompts[frame], self.anchors[frame]
        seen = self.settled.pop(frame, None)
        if seen is not None:
            self.tracked[frame] = seen
            self.backward.pop(frame, None)

    def outcomes(self) -> list[Outcome]:
        """All that are kept, each once."""
        kept = (*self.anchors.values(), *self.settled.values(), *self.tracked.values())
        return list({id(outcome): outcome for outcome in kept}.values())


def gather_anchors(objects: Sequence[ObjectState]) -> ObjectAnchors:
    """The anchors of objects, padded to the next power of two of the most that one of them has."""
    most = max(len(state.anchors) for state in objects)
    slots = 1 << (most - 1).bit_length()
    some = next(iter(objects[0].anchors.values()))
    frames = np.full((len(objects), slots), NO_FRAME, np.int32)
    valid = np.zeros(frames.shape, bool)
    memory = np.zeros((*frames.shape, *some.memory.shape), some.memory.dtype)
    pointers = np.zeros((*frames.shape, *some.pointer.shape), some.pointer.dtype)
    for row, state in enumerate(objects):
        for slot, frame in enumerate(sorted(state.anchors)):
            outcome = state.anchors[frame]
            frames[row, slot], valid[row, slot] = frame, True
            memory[row, slot], pointers[row, slot] = outcome.memory, outcome.pointer
    return ObjectAnchors(*map(jnp.asarray, (frames, valid, memory, pointers)))


def gather_bank(cfg: Sam2Config, objects: Sequence[ObjectState], frame: int, sign: int) -> ObjectBank:
    """The memories of objects when frame `frame` comes next: of the frames before it, or behind it with sign -1."""
    some = next(iter(objects[0].anchors.values()))
    remembered, pointed = cfg.num_maskmem - 1, cfg.max_pointers - 1
    count = len(objects)
    memory_frames = np.full((count, remembered), NO_FRAME, np.int32)
    memory = np.zeros((count, remembered, *some.memory.shape), some.memory.dtype)
    pointer_frames = np.full((count, pointed), NO_FRAME, np.int32)
    pointers = np.zeros((count, pointed, *some.pointer.shape), some.pointer.dtype)
    for row, state in enumerate(objects):
        for age in range(1, max(remembered, pointed) + 1):
            number = frame - sign * age
            outcome = state.on(number)
            if outcome is None:
                continue
            if age <= remembered:
                memory_frames[row, number % remembered] = number
                memory[row, number % remembered] = outcome.memory
            if age <= pointed:
                pointer_frames[row, number % pointed] = number
                pointers[row, number % pointed] = outcome.pointer
    return ObjectBank(*map(jnp.asarray, (memory_frames, memory, pointer_frames, pointers)))


def snapshot(objects: Mapping[int, ObjectState]) -> dict[int, ObjectState]:
    """Objects as they are now."""
    return {object_id: state.copy() for object_id, state in objects.items()}


def groups_of(states: Sequence[ObjectState], size: int) -> list[tuple[list[ObjectState], int]]:
    """Objects in groups of at most `size`, each with its first object repeated up to a number of rows that is compiled,
    and how many there really are."""
    groups = [list(states[i : i + size]) for i in range(0, len(states), size)]
    return [(group + [group[0]] * (padded_rows(len(group)) - len(group)), len(group)) for group in groups]
