"""Frames of several streams in common batches of the image encoder.

A batch is encoded when it is full, whosever its frames are. A stream hands in frames until its next one is encoded, so
that it waits for others only where it has none left. When every stream that is at work waits, the batch is encoded as
far as it goes. No clock is asked. A frame's features do not depend on its neighbours in a batch, and so not on what the
other streams do.
"""

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

from virst_jax.inference.resizing import Pixels
from virst_jax.inference.tracker_steps import TrackerNetwork
from virst_jax.io import timeline
from virst_jax.models.sam2.sam2 import Features

Key = TypeVar("Key")


@dataclass(eq=False)
class _Frame:
    """A frame that was handed in, and what became of it."""

    owner: "StreamEncoder"
    pixels: Pixels
    features: Features | None = None
    error: BaseException | None = None

    @property
    def is_done(self) -> bool:
        return self.features is not None or self.error is not None


class SharedBatches:
    """Encodes the frames of streams, each of which has a thread of its own and its part of the batches from `join`.

    Args:
      network: with the image encoder.
      batch: frames that are encoded at a time.
    """

    def __init__(self, network: TrackerNetwork, batch: int):
        self.network, self.batch = network, batch
        self._changed = threading.Condition()
        self._pending: list[_Frame] = []  # fewer than a batch
        self._at_work: set[StreamEncoder] = set()

    def join(self) -> "StreamEncoder":
        """The part of a stream that begins its work, for which others wait from now on until it leaves."""
        encoder = StreamEncoder(self)
        with self._changed:
            self._at_work.add(encoder)
        return encoder

    def leave(self, encoder: "StreamEncoder") -> None:
        """Nobody waits for this stream any more; frames that it has left are not encoded."""
        with self._changed:
            self._at_work.discard(encoder)
            self._pending = [frame for frame in self._pending if frame.owner is not encoder]
            self._encode_if_all_wait()

    def add(self, encoder: "StreamEncoder", pixels: Pixels) -> _Frame:
        """Hands in a frame uint8[R, R, 3]."""
        frame = _Frame(encoder, pixels)
        with self._changed:
            self._pending.append(frame)
            if len(self._pending) == self.batch:
                self._encode()
        return frame

    def wait(self, frame: _Frame) -> Features:
        """The features of a frame, once they have been given to the device. Raises what encoding it has raised."""
        with self._changed:
            if not frame.is_done:
                frame.owner.awaited = frame
                self._encode_if_all_wait()
                self._changed.wait_for(lambda: frame.is_done)
                frame.owner.awaited = None
        if frame.error is not None:
            raise frame.error
        assert frame.features is not None
        return frame.features

    def _encode_if_all_wait(self) -> None:
        waiting = (encoder.awaited for encoder in self._at_work)
        if self._pending and all(frame is not None and not frame.is_done for frame in waiting):
            self._encode()

    def _encode(self) -> None:
        """Encodes what is pending; what goes wrong is told to the streams whose frames these are."""
        frames, self._pending = self._pending, []
        try:
            with timeline.span("start encoding"):
                found = self.network.encode_batch([frame.pixels for frame in frames], self.batch)
            for frame, features in zip(frames, found, strict=True):
                frame.features = features
        except BaseException as error:
            for frame in frames:
                frame.error = error
        self._changed.notify_all()


class StreamEncoder:
    """A stream's part of `SharedBatches`. It leaves them at the end of a `with` block, or by `leave`."""

    def __init__(self, batches: SharedBatches):
        self._batches = batches
        self.awaited: _Frame | None = None  # what the stream's thread waits for

    def encode(self, frames: Iterable[tuple[Key, Pixels | None]]) -> Iterator[tuple[Key, Features | None]]:
        """Features of frames in order; what has no pixels is passed on.

        Args:
          frames: any keys, with pixels uint8[R, R, 3] or None.
        """
        source = iter(frames)
        order: deque[tuple[Key, _Frame | None]] = deque()
        while True:
            while not order or not (order[0][1] is None or order[0][1].is_done):
                item = next(source, None)
                if item is None:
                    break
                key, pixels = item
                order.append((key, None if pixels is None else self._batches.add(self, pixels)))
            if not order:
                return
            key, frame = order.popleft()
            yield key, None if frame is None else self._batches.wait(frame)

    def leave(self) -> None:
        """The stream has nothing to encode any more."""
        self._batches.leave(self)

    def __enter__(self) -> "StreamEncoder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()
