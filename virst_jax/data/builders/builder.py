"""TFDS builders over the readers, and the source that reads what they wrote.

One builder for videos and images with expressions, one for questions; a configuration is a split of a data set.
The official folder is the manual directory; nothing is downloaded. Samples keep the reader's order.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from virst_jax.data.builders.features import (
    RawFrames,
    decode_question,
    decode_video,
    encode_sample,
    question_features,
    video_features,
)
from virst_jax.data.datasets.registry import DATASETS, open_dataset, resolve
from virst_jax.data.datasets.source import IndexedSource, Problem
from virst_jax.data.datasets.validate import Report, against_official, inspect
from virst_jax.data.samples import Question, Source, Video
from virst_jax.errors import UserError
from virst_jax.io import atomic, buckets, lock, remote
from virst_jax.io.address import local

VERSION = "1.1.0"
_LAYOUT = "The official folder of the data set; docs/datasets.md shows the layouts."


@dataclass
class SplitConfig(tfds.core.BuilderConfig):
    """A split of a data set of the registry. Each has files of its own, so that one can be added to others."""

    data_set: str = ""
    split: str = ""


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    VERSION = tfds.core.Version(VERSION)
    MANUAL_DOWNLOAD_INSTRUCTIONS = _LAYOUT
    FEATURES: Callable[[], tfds.features.FeaturesDict]

    def __init__(self, **kwargs: Any) -> None:
        self.report: Report | None = None  # of what was built, if it was not there before
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=type(self).FEATURES(), disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        config = self.builder_config
        source = open_dataset(config.data_set, dl_manager.manual_dir, config.split)
        return {split_name(config.split): self._generate_examples(source)}

    def _generate_examples(self, source: IndexedSource) -> Iterator[tuple[int, dict[str, Any]]]:
        problems: list[Problem] = [*source.problems, *against_official(source)]
        stated = kept_samples = kept_expressions = 0
        for index, record in enumerate(source.records):
            try:
                whole = source[index]
                stated += _count(whole)
                sample, found = inspect(whole)
            except UserError as error:
                sample, found = None, [Problem.of(error, f"sample {record.name}")]
            problems += found
            if sample is not None:
                kept_samples += 1
                kept_expressions += _count(sample)
                yield index, encode_sample(sample)
        where = (source.name, source.split, source.root)
        counts = (len(source), stated, kept_samples, kept_expressions)
        self.report = Report(*where, *counts, tuple(problems))


class VirstVideos(_Builder):
    """Videos and still images with expressions."""

    FEATURES = staticmethod(video_features)


class VirstQuestions(_Builder):
    """Videos with questions."""

    FEATURES = staticmethod(question_features)


@dataclass
class BuiltSource:
    """A `Source` over the ArrayRecord files of a split. Picklable; the files are opened in each process when needed."""

    name: str
    split: str
    folder: str

    def __post_init__(self) -> None:
        self._data: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_data": None}

    @property
    def data(self) -> Any:
        """TFDS's data source, with the frames left encoded."""
        if self._data is None:
            try:
                builder = tfds.builder_from_directory(self.folder)
                split = split_name(self.split)
                for path in builder.info.splits[split].filepaths:
                    if not Path(str(path)).is_file():
                        raise FileNotFoundError(f"{Path(str(path)).name} is missing")
                self._data = builder.as_data_source(split=split, decoders={"frames": RawFrames()})
            except (OSError, ValueError, KeyError, AttributeError) as error:
                reason = " ".join(str(error).split())[:160]
                raise UserError(
                    f"{self.folder}: not readable as a built data set ({reason}); build it again"
                ) from error
        return self._data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Video | Question:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        try:
            example = self.data[index]
        except Exception as error:  # array_record and TFDS raise all sorts for damaged files
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"{self.folder}: record {index} is damaged ({reason}); build it again") from error
        return decode_question(example) if "turns" in example else decode_video(example)


def build(name: str, root: str | Path, data_dir: str | Path, split: str = "") -> tuple[Path, Report | None]:
    """Builds a split of a data set from its official folder. The files appear whole; what is there is left alone.

    Args:
      name, root, split: as `open_dataset` takes them.
      data_dir: folder of all built data sets; a subfolder is made.

    Returns:
      The folder of the split, and the report of what was left out, None if it was built before. The report lies in
      the folder too, as report.json.

    Raises:
      UserError: as `open_dataset`; the folder cannot be written.
    """
    canonical, chosen = resolve(name, split)
    builder_class = VirstQuestions if DATASETS[canonical].group == "video_vqa" else VirstVideos
    config = SplitConfig(config_name(canonical, chosen), VERSION, data_set=canonical, split=chosen)
    folder = built_folder(canonical, chosen, local(data_dir, "--out"))
    if folder.is_dir():
        return folder, None
    open_dataset(canonical, root, chosen)  # before TFDS starts, so that a wrong folder is one clear line
    atomic.check_writable(data_dir)
    with lock.exclusive(folder.parent), _told(data_dir):
        if folder.is_dir():  # by the run that this one has waited for
            return folder, None
        for left in folder.parent.glob("incomplete.*"):  # of a build that was killed
            shutil.rmtree(left, ignore_errors=True)
        builder = builder_class(data_dir=str(data_dir), config=config, file_format="array_record")
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=str(root)))
        assert builder.report is not None
        builder.report.write(folder / "report.json")
    return folder, builder.report


@contextlib.contextmanager
def _told(data_dir: str | Path) -> Iterator[None]:
    """Turns what the system says of writing into one line; array_record has a RuntimeError for it."""
    try:
        yield
    except OSError as error:
        raise atomic.cannot_write(data_dir, error) from error
    except RuntimeError as error:
        number = next((n for n in (*atomic.NO_SPACE, errno.EIO) if os.strerror(n) in str(error)), None)
        if number is None:
            raise
        raise atomic.cannot_write(data_dir, OSError(number, os.strerror(number))) from error


def open_built(name: str, data_dir: str | Path, split: str = "") -> BuiltSource:
    """Opens a data set that `build` wrote.

    Args:
      name, split: as in `open_dataset`.
      data_dir: as given to `build`.

    Raises:
      UserError: unknown name or split, or it is not built there.
    """
    canonical, chosen = resolve(name, split)
    folder = remote.local_copy(built_folder(canonical, chosen, data_dir))  # its files are mapped into memory
    if not folder.is_dir():
        split_option = f" --split {chosen}" if chosen else ""
        raise UserError(
            f"{folder}: not built; run virst data build DIR --dataset {canonical}{split_option} --out {data_dir}"
        )
    source = BuiltSource(canonical, chosen, str(folder))
    len(source)  # opens the files
    return source


def open_source(name: str, root: str | Path, split: str = "") -> Source:
    """`open_built` if the split is built in `root`, else `open_dataset`; the arguments are theirs.

    Raises UserError: as they do.
    """
    canonical, chosen = resolve(name, split)
    folder = built_folder(canonical, chosen, root)
    is_built = bool(buckets.folders(folder.parent)) if buckets.is_bucket(root) else folder.is_dir()
    return open_built(name, root, split) if is_built else open_dataset(name, root, split)


def built_folder(name: str, split: str, data_dir: str | Path) -> Path:
    """Where a split of a data set is built."""
    kind = "virst_questions" if DATASETS[name].group == "video_vqa" else "virst_videos"
    return Path(data_dir) / kind / config_name(name, split) / VERSION


def config_name(name: str, split: str) -> str:
    """The folder's name of a split: "+" is spelt out."""
    return f"{name.replace('+', '_plus')}-{split_name(split)}"


def split_name(split: str) -> str:
    """The name of a split in the files: that of a data set without splits is "whole"."""
    return split or "whole"


def _count(sample: Video | Question) -> int:
    return len(sample.turns if isinstance(sample, Question) else sample.expressions)
