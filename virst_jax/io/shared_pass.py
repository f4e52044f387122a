"""One pass over a video for two who need its frames: one reads some of them ahead, the other takes all of them later.

Axes: H height, W width, 3 RGB.
"""

import threading
from collections.abc import Iterator, Sequence

import numpy as np

from virst_jax.errors import UserError
from virst_jax.io.reader import Reader


class SharedPass(Reader):
    """A reader whose `pick` goes on where the pass stands; every frame that passes is kept until `take` asks for it.

    How many are kept is how far `pick` runs ahead of `take`. Both may be called by threads of their own; a frame that
    is picked must be picked before it is taken.

    Args:
      reader: the video, which is decoded once.
    """

    def __init__(self, reader: Reader):
        self.reader = reader
        self.name, self.size, self.fps, self.still, self.format = (
            reader.name,
            reader.size,
            reader.fps,
            reader.still,
            reader.format,
        )
        self._frames = iter(reader)
        self._passed: dict[int, np.ndarray] = {}
        self._next = 0
        self._lock = threading.Lock()

    @property
    def num_frames(self) -> int:
        return self.reader.num_frames

    def pick(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        return (self._up_to(index) for index in indices)

    def take(self, index: int) -> np.ndarray:
        """The frame of this number, uint8[H, W, 3]; each can be taken once.

        Raises:
          UserError: the video has no such frame.
        """
        frame = self._passed.pop(index, None)  # at once: the lock is held while another frame is decoded
        if frame is None:
            frame = self._up_to(index)
            del self._passed[index]
        return frame

    def _up_to(self, index: int) -> np.ndarray:
        with self._lock:
            while self._next <= index:
                frame = next(self._frames, None)
                if frame is None:
                    raise UserError(f"{self.name}: the video ended after {self._next} frames; was it changed?")
                self._passed[self._next] = frame
                self._next += 1
            return self._passed[index]

    def close(self) -> None:
        """Ends the pass, which closes the file."""
        close = getattr(self._frames, "close", None)
        if close is not None:
            close()
