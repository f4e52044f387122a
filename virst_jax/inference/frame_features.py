"""Features of a video's frames, encoded once and kept as far as a budget of memory allows.

Axes: R side of the tracker's image.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Generator, Mapping, Sequence

import jax
import numpy as np

from virst_jax.errors import UserError
from virst_jax.inference.resizing import Pixels
from virst_jax.inference.tracker_steps import TrackerNetwork
from virst_jax.io.video import Reader, prefetch
from virst_jax.models.sam2.sam2 import Features

AHEAD = 8  # frames that the decoding thread may run ahead
BLOCK = 16  # frames that are read forward at a time to go through them backward


class FrameFeatures:
    """Reads and encodes frames when they are asked for.

    Args:
      budget: bytes of features to keep on the device; those used last are kept. A frame of SAM 2.1 takes 16.8 MB in
        float32, half of it in bfloat16. At least one frame is kept.
      batch: frames that are encoded at a time.
    """

    def __init__(self, network: TrackerNetwork, reader: Reader, budget: int, batch: int = 1):
        self.network, self.reader, self.budget, self.batch = network, reader, budget, batch
        self.num_encoded = 0  # frames that were encoded so far, some of them several times if the budget is small
        self._kept: OrderedDict[int, Features] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """Bytes that are kept now."""
        return sum(_bytes(features) for features in self._kept.values())

    @property
    def kept(self) -> tuple[int, ...]:
        """Numbers of the frames whose features are there, the last used one last."""
        return tuple(self._kept)

    def keep(self, features: Mapping[int, Features]) -> None:
        """Adds features of frames, by their numbers, that were computed elsewhere."""
        for number, x in features.items():
            self._kept[number] = x
            self._kept.move_to_end(number)
        while len(self._kept) > 1 and self.num_bytes > self.budget:
            self._kept.popitem(last=False)

    def clear(self) -> None:
        """Forgets all features, so that their memory is free for others; frames are encoded again when asked for."""
        self._kept.clear()

    def get(self, number: int) -> Features:
        """Of one frame."""
        if number not in self._kept:
            (frame,) = self.reader.pick([number])
            return self._encode([number], [self._resize(frame)])[0]
        self._kept.move_to_end(number)
        return self._kept[number]

    def walk(self, numbers: Sequence[int]) -> Generator[Features, None, None]:
        """Of consecutive frames, rising or falling, in this order; a thread decodes ahead."""
        missing = [number for number in numbers if number not in self._kept]
        position = {number: i for i, number in enumerate(missing)}
        with contextlib.ExitStack() as stack:
            source = stack.enter_context(contextlib.closing(self._pixels(missing)))
            pixels = stack.enter_context(contextlib.closing(prefetch(source, AHEAD)))
            ready: dict[int, Features] = {}
            for number in numbers:
                if number in position and number not in ready:
                    batch = missing[position[number] : position[number] + self.batch]
                    frames = [next(pixels, None) for _ in batch]
                    if any(frame is None for frame in frames):
                        raise UserError(f"{self.reader.name}: the video ended before frame {number}; was it changed?")
                    ready = dict(zip(batch, self._encode(batch, [frame for frame in frames if frame is not None])))
                # what was kept when the walk began may have had to go since
                yield ready.pop(number) if number in ready else self.get(number)

    def _encode(self, numbers: Sequence[int], pixels: Sequence[Pixels]) -> list[Features]:
        encoded = self.network.encode_batch(pixels, self.batch)
        self.num_encoded += len(numbers)
        self.keep(dict(zip(numbers, encoded)))
        return encoded

    def _pixels(self, numbers: Sequence[int]) -> Generator[Pixels, None, None]:
        if len(numbers) > 1 and numbers[1] < numbers[0]:
            for first in range(0, len(numbers), BLOCK):
                block = numbers[first : first + BLOCK]
                frames = [self._resize(frame) for frame in self.reader.pick(block[::-1])]
                yield from reversed(frames)
        elif numbers:
            for frame in self.reader.pick(numbers):
                yield self._resize(frame)

    def _resize(self, frame: np.ndarray) -> Pixels:
        return self.network.resize(frame, self.network.tracker_cfg.image_size, "bicubic")


def _bytes(features: Features) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(features))
