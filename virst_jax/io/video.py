"""Videos from files, folders of frames and arrays, read in order without holding more than a frame; videos written.

Axes: T frames of the video, n frames asked for, H height, W width, 3 RGB.
"""

import contextlib
import os
import queue
import re
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from virst_jax.errors import UserError
from virst_jax.io import atomic

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
T = TypeVar("T")


class Reader(Protocol):
    """A video that can be read from its start any number of times. `open_video` makes one.

    name: of the file or folder. frame_names: of the frames, as masks are named; fps: frames a second, 0: unknown.
    """

    name: str
    size: tuple[int, int]  # height, width
    fps: float

    @property
    def num_frames(self) -> int: ...

    @property
    def frame_names(self) -> Sequence[str]: ...

    def __iter__(self) -> Iterator[np.ndarray]:
        """Frames uint8[H, W, 3] in order."""
        ...

    def pick(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """The frames of these numbers, which must rise."""
        ...

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """uint8[n, H, W, 3] of frame numbers in any order; repeats are fine."""
        ...


def open_video(video: Any) -> Reader:
    """Opens a video.

    Args:
      video: a file that FFmpeg reads (mp4, mov, webm, gif, ...), a picture, a folder of frames (sorted by the first
        number in their names), an array uint8[T, H, W, 3], a data set's `Video`, or a reader.

    Raises:
      UserError: missing, unreadable, empty or truncated, or frames that differ in size.
    """
    if isinstance(video, (str, os.PathLike)):
        path = Path(video)
        if path.is_dir():
            return FolderReader(path)
        if not path.exists():
            raise UserError(f"{path}: no such video; give a file or a folder of frames")
        if path.suffix.lower() in FRAME_SUFFIXES:
            return FolderReader(path.parent, [path])
        return FileReader(path)
    if hasattr(video, "read_frames") and hasattr(video, "frame_names"):
        return SampleReader(video)
    if hasattr(video, "pick"):  # asking for num_frames or frame_names may decode the whole video
        return video
    return ArrayReader(video)


class FileReader:
    """A video file, decoded by FFmpeg. Frames are counted as they are decoded: containers may be wrong about it."""

    def __init__(self, path: Path):
        self.path, self.name = path, path.stem
        self._num_frames: int | None = None
        with self._opened() as (_, stream):
            rate = stream.average_rate or stream.guessed_rate
            self.fps = float(rate) if rate else 0.0
        first = next(self._decode(lambda frame: True), None)
        if first is None:
            raise UserError(f"{path}: the video has no frames; record or export it again")
        self.size = (first.shape[0], first.shape[1])

    @property
    def num_frames(self) -> int:
        if self._num_frames is None:
            for _ in self._decode(lambda index: False):
                pass
        assert self._num_frames is not None
        return self._num_frames

    @property
    def frame_names(self) -> Sequence[str]:
        return _numbers(self.num_frames)

    def __iter__(self) -> Iterator[np.ndarray]:
        for frame in self._decode(lambda index: True):
            assert frame is not None
            yield frame

    def pick(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        _check_indices(self.name, indices, self.num_frames)
        wanted = set(indices)
        left = len(wanted)
        with contextlib.closing(self._decode(wanted.__contains__)) as frames:
            for frame in frames:
                if frame is not None:
                    yield frame
                    left -= 1
                    if not left:
                        return

    def read(self, indices: Sequence[int]) -> np.ndarray:
        return _read(self, indices)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        import av  # loads FFmpeg's libraries

        try:
            container = av.open(str(self.path))
        except (av.error.FFmpegError, OSError) as error:
            raise UserError(f"{self.path}: cannot be read as a video ({_reason(error)}); give another file") from error
        with container:
            if not container.streams.video:
                raise UserError(f"{self.path}: holds no video stream; give a video file")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield container, stream

    def _decode(self, wanted: Callable[[int], bool]) -> Generator[np.ndarray | None, None, None]:
        """Every frame in order of display; None for those that are not wanted, which saves converting them."""
        import av

        count, shape = 0, getattr(self, "size", None)
        with self._opened() as (container, stream):
            try:
                for packet in container.demux(stream):
                    if packet.is_corrupt:
                        raise UserError(self._damaged(count))
                    for frame in packet.decode():
                        image = None
                        if wanted(count):
                            image = frame.to_ndarray(format="rgb24")
                            if frame.rotation % 360:
                                image = np.rot90(image, round(frame.rotation / 90) % 4)
                            if shape is not None and image.shape[:2] != shape:
                                # a stream may change its size
                                image = np.asarray(Image.fromarray(image).resize(shape[::-1]))
                            image = np.ascontiguousarray(image)
                        count += 1
                        yield image
            except av.error.FFmpegError as error:
                raise UserError(self._damaged(count)) from error
        if self._num_frames is None:
            self._num_frames = count

    def _damaged(self, count: int) -> str:
        return (
            f"{self.path}: damaged or truncated after frame {count}; copy the file again, or cut it before that frame"
        )


class FolderReader:
    """Frames as picture files of one size."""

    def __init__(self, folder: Path, files: Sequence[Path] | None = None):
        self.name, self.fps = (folder.name if files is None else files[0].stem), 0.0
        if files is None:
            files = sorted(
                (f for f in folder.iterdir() if f.suffix.lower() in FRAME_SUFFIXES and not f.name.startswith(".")),
                key=_frame_order,
            )
        if not files:
            raise UserError(f"{folder}: holds no frames ({', '.join(FRAME_SUFFIXES)}); give a folder of pictures")
        self.files = list(files)
        first = _read_picture(self.files[0])
        self.size = (first.shape[0], first.shape[1])

    @property
    def num_frames(self) -> int:
        return len(self.files)

    @property
    def frame_names(self) -> Sequence[str]:
        return [file.stem for file in self.files]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self._frame(i) for i in range(len(self.files)))

    def pick(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        _check_indices(self.name, indices, self.num_frames)
        return (self._frame(i) for i in indices)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        return _read(self, indices)

    def _frame(self, index: int) -> np.ndarray:
        frame = _read_picture(self.files[index])
        if frame.shape[:2] != self.size:
            have, want = frame.shape[1::-1], self.size[::-1]
            raise UserError(
                f"{self.files[index]}: {have[0]}x{have[1]} pixels where the first frame has {want[0]}x{want[1]}; "
                "give frames of one size"
            )
        return frame


class ArrayReader:
    """Frames in memory."""

    def __init__(self, frames: Any, name: str = "video"):
        frames = np.asarray(frames)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise UserError(
                f"a video must be a file, a folder of frames or an array uint8[T, H, W, 3], not "
                f"{frames.dtype}{list(frames.shape)}"
            )
        if 0 in frames.shape:
            raise UserError(f"the video is empty: an array of shape {list(frames.shape)}; give at least one frame")
        self.frames, self.name, self.fps = frames, name, 0.0
        self.size = (frames.shape[1], frames.shape[2])

    @property
    def num_frames(self) -> int:
        return len(self.frames)

    @property
    def frame_names(self) -> Sequence[str]:
        return _numbers(len(self.frames))

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.frames)

    def pick(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        _check_indices(self.name, indices, self.num_frames)
        return (self.frames[i] for i in indices)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        return _read(self, indices)


class Sample(Protocol):
    """What is read of a data set's video (see virst_jax.data.samples.Video)."""

    @property
    def name(self) -> str: ...

    @property
    def num_frames(self) -> int: ...

    @property
    def size(self) -> tuple[int, int]: ...

    @property
    def frame_names(self) -> Sequence[str]: ...

    @property
    def read_frames(self) -> Callable[[Sequence[int]], np.ndarray]: ...


class SampleReader:
    """A video of a data set."""

    def __init__(self, video: Sample):
        self.video, self.name, self.fps = video, video.name, 0.0
        self.size = (video.size[0], video.size[1])
        if video.num_frames < 1:
            raise UserError(f"{video.name}: the video is empty; leave it out")

    @property
    def num_frames(self) -> int:
        return self.video.num_frames

    @property
    def frame_names(self) -> Sequence[str]:
        return self.video.frame_names or _numbers(self.num_frames)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.video.read_frames([i])[0] for i in range(self.num_frames))

    def pick(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        _check_indices(self.name, indices, self.num_frames)
        return (self.video.read_frames([i])[0] for i in indices)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        return _read(self, indices)


class StridedReader:
    """Every k-th frame of a video, and no more than so many."""

    def __init__(self, reader: Reader, every: int = 1, max_frames: int | None = None):
        if every < 1:
            raise UserError(f"every {every} frames cannot be taken; give 1 or more")
        if max_frames is not None and max_frames < 1:
            raise UserError(f"at most {max_frames} frames leave nothing; give 1 or more")
        self.reader, self.every, self.max_frames = reader, every, max_frames
        self.name, self.size, self.fps = reader.name, reader.size, reader.fps / every

    @property
    def numbers(self) -> range:
        """The numbers of its frames in the whole video."""
        numbers = range(0, self.reader.num_frames, self.every)
        return numbers if self.max_frames is None else numbers[: self.max_frames]

    @property
    def num_frames(self) -> int:
        return len(self.numbers)

    @property
    def frame_names(self) -> Sequence[str]:
        names = self.reader.frame_names
        return [names[i] for i in self.numbers]

    def __iter__(self) -> Iterator[np.ndarray]:
        left = self.num_frames
        for index, frame in enumerate(self.reader):
            if index % self.every == 0:
                yield frame
                left -= 1
                if not left:
                    return

    def pick(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        _check_indices(self.name, indices, self.num_frames)
        numbers = self.numbers
        return self.reader.pick([numbers[i] for i in indices])

    def read(self, indices: Sequence[int]) -> np.ndarray:
        return _read(self, indices)


class VideoWriter:
    """Writes frames to an H.264 mp4, which appears under its name once `close` has ended it.

    Follows what players can show: yuv420p, an even number of rows and columns (the last ones are repeated).
    """

    def __init__(self, path: Path, size: tuple[int, int], fps: float):
        import av

        self.path = path
        self._place = atomic.new_path(path)
        self._part = self._place.__enter__()
        self._av = av
        self._container = av.open(str(self._part), "w", format="mp4", options={"movflags": "+faststart"})
        rate = Fraction(fps if fps > 0 else 10.0).limit_denominator(1001)
        self._stream = self._container.add_stream("libx264", rate=rate, options={"crf": "20", "preset": "veryfast"})
        self._pad = ((0, size[0] % 2), (0, size[1] % 2), (0, 0))
        self._stream.height, self._stream.width = size[0] + size[0] % 2, size[1] + size[1] % 2
        self._stream.pix_fmt = "yuv420p"

    def write(self, frame: np.ndarray) -> None:
        """Adds a frame uint8[H, W, 3]."""
        image = np.pad(frame, self._pad, mode="edge")
        self._container.mux(self._stream.encode(self._av.VideoFrame.from_ndarray(image, format="rgb24")))

    def close(self) -> None:
        self._container.mux(self._stream.encode())
        self._container.close()
        self._place.__exit__(None, None, None)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.close()
            return
        with contextlib.suppress(Exception):
            self._container.close()
        self._part.unlink(missing_ok=True)


def prefetch(items: Iterable[T], depth: int) -> Generator[T, None, None]:
    """The items, made by a thread that runs up to `depth` of them ahead. Closing the iterator ends the thread."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: tuple[str, Any]) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                return ready.put(item, timeout=0.1)

    def work() -> None:
        try:
            for item in items:
                put(("item", item))
                if stop.is_set():
                    return
            put(("end", None))
        except BaseException as error:
            put(("error", error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        stop.set()
        thread.join()


def _read(reader: Reader, indices: Sequence[int]) -> np.ndarray:
    _check_indices(reader.name, indices, reader.num_frames)
    numbers = sorted(set(indices))
    found = dict(zip(numbers, reader.pick(numbers)))
    return np.stack([found[i] for i in indices])


def _frame_order(file: Path) -> tuple[int, str]:
    number = re.search(r"\d+", file.stem)
    return (int(number[0]) if number else -1, file.name)


def _read_picture(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise UserError(f"{file}: cannot be read as a picture ({_reason(error)}); copy it again") from error


def _check_indices(name: str, indices: Sequence[int], num_frames: int) -> None:
    if not len(indices):
        raise UserError(f"{name}: no frame was asked for; name at least one")
    for index in indices:
        if not 0 <= index < num_frames:
            raise UserError(f"{name}: there is no frame {index}; the video has frames 0 to {num_frames - 1}")


def _numbers(count: int) -> Sequence[str]:
    return [f"{i:05d}" for i in range(count)]


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:200]
