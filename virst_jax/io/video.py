"""Videos from files, folders of frames, images and arrays, read in order without holding more than a frame.

Axes: T frames of the video, n frames asked for, H height, W width, C channels, 3 RGB.
"""

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from virst_jax.errors import UserError
from virst_jax.io import arrays, images
from virst_jax.io.names import find_entry, natural_key, other_spelling, same_name
from virst_jax.io.reader import Reader, check_indices
from virst_jax.io.regular import require_file
from virst_jax.io.video_file import FileReader
from virst_jax.io.video_writer import VideoWriter

__all__ = ["FRAME_SUFFIXES", "FileReader", "Reader", "StridedReader", "VideoWriter", "open_video", "prefetch"]

FRAME_SUFFIXES = images.SUFFIXES
MIN_FPS, MAX_FPS = 1e-4, 10_000
T = TypeVar("T")


def open_video(video: Any, *, fps: float | None = None, allow_damaged: bool = False) -> Reader:
    """Opens a video.

    Args:
      video: one of
        - a file that FFmpeg reads (mp4, mov, webm, gif, ...), or an animated WebP, PNG or TIFF;
        - an image: a file or a PIL image;
        - a folder of frames, in the natural order of their names ("cam2_frame_2" before "cam2_frame_10");
        - an array or tensor [T, H, W, C], [T, C, H, W] or [T, H, W], C 1 (grey), 3 (RGB) or 4 (RGBA, whose last is left
          out), of integers of 0 to 255, 16-bit integers, or floats of 0 to 1;
        - a list or generator of frames: arrays, PIL images or paths of images;
        - a data set's `Video`, or a reader.
      fps: frames a second of what states none itself: folders, arrays, lists. It is used for times.
      allow_damaged: go on with a damaged video file; see `FileReader`.

    Raises:
      UserError: missing, unreadable, empty, damaged or truncated, or frames that differ in size.
    """
    is_number = isinstance(fps, (int, float, np.integer, np.floating)) and not isinstance(fps, bool)
    if fps is not None and not (is_number and MIN_FPS <= fps <= MAX_FPS):
        raise UserError(f"{fps!r} frames a second cannot be; give a number of {MIN_FPS:g} to {MAX_FPS:,}")
    reader = _opened(video, allow_damaged)
    if fps is not None:
        if reader.fps > 0 and reader is not video:
            raise UserError(
                f"{reader.name}: states itself when its frames are shown; frames a second are for folders and arrays"
            )
        reader.fps = float(fps)
    return reader


def _opened(video: Any, allow_damaged: bool) -> Reader:
    if isinstance(video, (str, os.PathLike)):
        return _open_path(os.fspath(video), allow_damaged)
    if isinstance(video, Reader) or hasattr(video, "pick"):  # asking for its frame names may decode the whole video
        return video
    if hasattr(video, "read_frames") and hasattr(video, "frame_names"):
        return SampleReader(video)
    if video is None or isinstance(video, (bool, int, float, bytes, dict, set)):
        raise UserError(f"a video cannot be made of {type(video).__name__}; give a path, a folder, an array or frames")
    if arrays.is_image(video):
        return ArrayReader(arrays.to_image(video)[None], still=True)
    if isinstance(video, Iterable) and not hasattr(video, "shape"):
        items = list(video)
        if items and all(isinstance(item, (str, os.PathLike)) for item in items):
            return FolderReader.of_files([Path(_found(os.fspath(item))) for item in items])
        return ArrayReader(arrays.stack(items))
    return ArrayReader(arrays.video(video))


def _open_path(given: str | bytes, allow_damaged: bool) -> Reader:
    if isinstance(given, bytes):
        given = os.fsdecode(given)
    if not given:
        raise UserError("the video's name is empty; give a file or a folder of frames")
    if "://" in given and not os.path.lexists(given):
        raise UserError(f"{given}: addresses are not read; download the video and give the file")
    path = Path(_found(given))
    if os.path.isdir(path):
        return FolderReader(path)
    if not os.path.exists(path) and not other_spelling(path):
        raise UserError(f"{path}: no such video; give a file or a folder of frames")
    require_file(path, "give a video file, an image, or a folder of frames")
    if path.suffix.lower() in FRAME_SUFFIXES:
        return AnimationReader(path) if images.num_frames(path) > 1 else FolderReader.of_files([path], still=True)
    return FileReader(path, allow_damaged)


def _found(given: str) -> str:
    """A path as it is spelled on the disk, which may store accents in another way."""
    path = Path(given)
    if given.isascii() or "\0" in given or os.path.lexists(given):
        return given
    base = path.anchor or "."
    return find_entry(base, str(path.relative_to(path.anchor)) if path.anchor else given)


class FolderReader(Reader):
    """Frames as image files of one size.

    Raises:
      UserError: no frames, two of one name, or one that is no still image.
    """

    def __init__(self, folder: Path):
        try:
            found = [f for f in folder.iterdir() if f.suffix.lower() in FRAME_SUFFIXES and not f.name.startswith(".")]
        except OSError as error:
            raise UserError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from error
        if not found:
            raise UserError(f"{folder}: holds no frames ({', '.join(FRAME_SUFFIXES)}); give a folder of images")
        seen: dict[str, Path] = {}
        for file in sorted(found, key=lambda f: natural_key(f.name)):
            other = seen.setdefault(same_name(file.stem), file)
            if other is not file:
                raise UserError(
                    f"{folder}: {other.name} and {file.name} would be two frames of one name; give a folder with the "
                    "frames alone (masks and previews elsewhere), or rename them"
                )
        self._set(folder.name, sorted(found, key=lambda f: natural_key(same_name(f.stem))))

    @classmethod
    def of_files(cls, files: Sequence[Path], still: bool = False) -> "FolderReader":
        """A reader of these files, in this order."""
        reader = cls.__new__(cls)
        reader.still = still
        reader._set(files[0].stem if len(files) == 1 else files[0].parent.name, files)
        return reader

    def _set(self, name: str, files: Sequence[Path]) -> None:
        self.name, self.files = name, list(files)
        first = images.read_image(self.files[0])
        self.size = (first.shape[0], first.shape[1])
        stems = [same_name(file.stem) for file in self.files]
        # the same name in several folders
        self._names = stems if len(set(stems)) == len(stems) else super().names_of(range(len(stems)))

    @property
    def num_frames(self) -> int:
        return len(self.files)

    def names_of(self, indices: Sequence[int]) -> Sequence[str]:
        return [self._names[i] for i in indices]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self._frame(i) for i in range(len(self.files)))

    def pick(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        check_indices(self.name, indices, self.num_frames)
        return (self._frame(i) for i in indices)

    def _frame(self, index: int) -> np.ndarray:
        frame = images.read_image(self.files[index])
        if frame.shape[:2] != self.size:
            have, want = frame.shape[1::-1], self.size[::-1]
            raise UserError(
                f"{self.files[index]}: {have[0]}x{have[1]} pixels where the first frame has {want[0]}x{want[1]}; "
                "give frames of one size"
            )
        return frame


class AnimationReader(Reader):
    """An animated WebP or PNG, or a TIFF with pages. When frames are shown is known once all were decoded."""

    def __init__(self, path: Path):
        self.path, self.name = path, path.stem
        self._num_frames = images.num_frames(path)
        self.size = next(images.frames(path))[0].shape[:2]
        self._known: list[float] = []  # of each frame, when the next one is shown
        self._stated: float | None = None

    @property
    def num_frames(self) -> int:
        return self._num_frames

    @property
    def fps(self) -> float:
        if self._stated is not None:
            return self._stated
        end = self._starts()[-1]
        return self._num_frames / end if end > 0 else 0.0

    @fps.setter
    def fps(self, value: float) -> None:
        self._stated = value

    def _starts(self) -> list[float]:
        if len(self._known) < self._num_frames:
            for _ in self:
                pass
        return [0.0, *self._known]

    def times_of(self, indices: Sequence[int]) -> Sequence[float] | None:
        starts = self._starts()
        return [starts[i] for i in indices] if starts[-1] > 0 else super().times_of(indices)

    @property
    def duration(self) -> float:
        return self._starts()[-1] or super().duration

    def __iter__(self) -> Iterator[np.ndarray]:
        ends: list[float] = []
        for frame, seconds in images.frames(self.path):
            ends.append((ends[-1] if ends else 0.0) + seconds)
            yield frame
        self._known = ends

    def pick(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        check_indices(self.name, indices, self.num_frames)
        wanted, last = set(indices), max(indices)
        for index, frame in enumerate(self):
            if index in wanted:
                yield frame
            if index == last:
                return

    def survey(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        wanted = set(indices)
        return (frame for index, frame in enumerate(self) if index in wanted)


class ArrayReader(Reader):
    """Frames in memory, uint8[T, H, W, 3]."""

    def __init__(self, frames: Any, name: str = "video", still: bool = False):
        frames = arrays.video(frames)
        self.frames, self.name, self.still = frames, name, still
        self.size = (frames.shape[1], frames.shape[2])

    @property
    def num_frames(self) -> int:
        return len(self.frames)

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.frames)

    def pick(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        check_indices(self.name, indices, self.num_frames)
        return (self.frames[i] for i in indices)


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


class SampleReader(Reader):
    """A video of a data set."""

    def __init__(self, video: Sample):
        self.video, self.name = video, video.name
        self.size = (video.size[0], video.size[1])
        if video.num_frames < 1:
            raise UserError(f"{video.name}: the video is empty; leave it out")

    @property
    def num_frames(self) -> int:
        return self.video.num_frames

    def names_of(self, indices: Sequence[int]) -> Sequence[str]:
        names = self.video.frame_names
        return [names[i] for i in indices] if names else super().names_of(indices)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.video.read_frames([i])[0] for i in range(self.num_frames))

    def pick(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        check_indices(self.name, indices, self.num_frames)
        return (self.video.read_frames([i])[0] for i in indices)


class StridedReader(Reader):
    """Every k-th frame of a range, and no more than so many; what lies behind the last one is not decoded.

    Args:
      every: k.
      max_frames: how many at most; None: all.
      start, end: numbers of the range's first and last frame; end None: the video's last.

    Raises:
      UserError: a number that leaves nothing.
    """

    def __init__(
        self, reader: Reader, every: int = 1, max_frames: int | None = None, start: int = 0, end: int | None = None
    ):
        if every < 1:
            raise UserError(f"every {every} frames cannot be taken; give 1 or more")
        if max_frames is not None and max_frames < 1:
            raise UserError(f"at most {max_frames} frames leave nothing; give 1 or more")
        if start < 0 or (end is not None and end < start):
            raise UserError(f"frames {start} to {end} are no range; give numbers from 0 on, the first one first")
        if isinstance(reader, FileReader) and start:
            reader.begin_at(start)
        self.reader, self.every, self.max_frames, self.start, self.end = reader, every, max_frames, start, end
        self.name, self.size, self.still, self.format = reader.name, reader.size, reader.still, reader.format
        self.fps = reader.fps / every
        lasts = [] if end is None else [end + 1]
        lasts += [] if max_frames is None else [start + (max_frames - 1) * every + 1]
        self._limit = min(lasts, default=None)  # frames from this number on are not needed

    @property
    def numbers(self) -> range:
        """The numbers of its frames in the whole video."""
        count = self.reader.num_frames if self._limit is None else self.reader.count_up_to(self._limit)
        if count <= self.start:
            raise UserError(f"{self.name}: there is no frame {self.start}; the video has frames 0 to {count - 1}")
        return range(self.start, count, self.every)

    def expected_frames(self) -> int:
        count = self.reader.expected_frames()
        return max(1, len(range(self.start, count if self._limit is None else min(count, self._limit), self.every)))

    def survey(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        numbers = [self.start + i * self.every for i in indices]
        if isinstance(self.reader, FileReader):
            return self.reader.survey(numbers, self._limit)
        return self.reader.survey(numbers)

    @property
    def num_frames(self) -> int:
        return len(self.numbers)

    @property
    def damaged(self) -> Sequence[int]:  # type: ignore[override]
        """Numbers among its own frames."""
        bad = set(self.reader.damaged)
        return [i for i, number in enumerate(self.numbers) if number in bad]

    @property
    def num_lost(self) -> int:  # type: ignore[override]
        return self.reader.num_lost

    @property
    def is_cut(self) -> bool:  # type: ignore[override]
        return self.reader.is_cut

    def names_of(self, indices: Sequence[int]) -> Sequence[str]:
        numbers = self.numbers
        return self.reader.names_of([numbers[i] for i in indices])

    def times_of(self, indices: Sequence[int]) -> Sequence[float] | None:
        numbers = self.numbers
        return self.reader.times_of([numbers[i] for i in indices])

    @property
    def duration(self) -> float:
        times = self.times_of([0, self.num_frames - 1])
        return 0.0 if times is None else times[1] - times[0] + (1 / self.fps if self.fps > 0 else 0.0)

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.pick(range(self.num_frames))

    def pick(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        check_indices(self.name, indices, self.num_frames)
        numbers = self.numbers
        return self.reader.pick([numbers[i] for i in indices])


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

    thread = threading.Thread(target=work, daemon=True, name="read ahead")
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
