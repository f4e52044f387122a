"""What is wrong with a data set's files: missing and damaged frames, sizes that differ, masks that do not fit.

`inspect` looks at one sample and gives what is left of it; `check` goes over a whole source and gives a report. An
index made by a reader has problems of its own (empty expressions, unknown ids and keys), which the report repeats.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from virst_jax.data.datasets.mevis import NO_TARGET
from virst_jax.data.datasets.registry import DATASETS
from virst_jax.data.datasets.source import IndexedSource, Problem
from virst_jax.data.samples import Question, Video
from virst_jax.errors import UserError
from virst_jax.io import atomic

_CHUNK = 16  # frames whose masks are held at once


@dataclass(frozen=True)
class Report:
    """The outcome of a check."""

    name: str
    split: str
    root: str
    num_samples: int  # that the index lists
    num_expressions: int  # that the index lists, or questions
    kept_samples: int
    kept_expressions: int
    problems: tuple[Problem, ...]

    @property
    def dropped(self) -> tuple[Problem, ...]:
        """Problems for which something is left out."""
        return tuple(problem for problem in self.problems if problem.dropped)

    def write(self, path: Path) -> None:
        """Writes the report as JSON; the file appears whole."""
        atomic.write_json(path, asdict(self))


@dataclass(frozen=True)
class KeptMasks:
    """The masks of some of a video's expressions."""

    read: Callable[[int, Sequence[int]], np.ndarray]
    positions: tuple[int, ...]

    def __call__(self, position: int, indices: Sequence[int]) -> np.ndarray:
        return self.read(self.positions[position], indices)


def inspect(sample: Video | Question, quick: bool = False) -> tuple[Video | Question | None, list[Problem]]:
    """Reads everything of a sample.

    Args:
      quick: only see that the frames' files are there; read no pixels and no masks.

    Returns:
      What is left of the sample, None if nothing is, and what was found.
    """
    problems = _check_frames(sample, quick)
    if problems:
        return None, problems
    if isinstance(sample, Question):
        return sample, []
    if not sample.expressions:
        return None, [Problem(sample.name, "has no expressions", _label(sample))]
    if sample.read_masks is None or quick:
        return sample, []
    kept = []
    for position, expression in enumerate(sample.expressions):
        label = f"expression {expression.id} of {sample.name}"
        try:
            seen = _check_masks(sample, sample.read_masks, position)
        except UserError as error:
            problems.append(Problem.of(error, label))
            continue
        kept.append(position)
        if seen is None and expression.category != NO_TARGET:
            problems.append(Problem(f"{sample.name}, expression {expression.id}", "its masks are empty on all frames"))
        elif seen is not None and expression.category == NO_TARGET:
            problems.append(Problem(f"{sample.name}, expression {expression.id}", "has no target but masks"))
    if not kept:
        problems.append(Problem(sample.name, "no expression is left", _label(sample)))
        return None, problems
    if len(kept) == len(sample.expressions):
        return sample, problems
    expressions = tuple(sample.expressions[position] for position in kept)
    return replace(sample, expressions=expressions, read_masks=KeptMasks(sample.read_masks, tuple(kept))), problems


def check(
    source: IndexedSource, *, quick: bool = False, workers: int = 4, progress: Callable[[], object] | None = None
) -> Report:
    """Inspects all samples of a source.

    Args:
      quick: as in `inspect`.
      workers: threads that read.
      progress: called after every sample.
    """

    def one(index: int) -> tuple[int, int, int, list[Problem]]:
        record = source.records[index]
        try:
            sample = source[index]
        except UserError as error:
            return 0, 0, 0, [Problem.of(error, f"sample {record.name}")]
        kept, problems = inspect(sample, quick)
        return _count(sample), int(kept is not None), _count(kept) if kept is not None else 0, problems

    problems = [*source.problems, *against_official(source)]
    totals = np.zeros(3, int)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        try:
            for *counts, found in pool.map(one, range(len(source))):
                totals += counts
                problems += found
                if progress is not None:
                    progress()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    stated, samples, expressions = (int(n) for n in totals)
    where = (source.name, source.split, source.root)
    return Report(*where, len(source), stated, samples, expressions, tuple(problems))


def summarize(problems: Sequence[Problem]) -> list[tuple[str, int]]:
    """Kinds of problems, the most frequent first: what is said, without the names in it."""
    kinds = Counter("".join("#" if c.isdigit() else c for c in problem.what.split(";")[0])[:80] for problem in problems)
    return kinds.most_common()


def _check_frames(sample: Video | Question, quick: bool) -> list[Problem]:
    problems = []
    path_of = getattr(sample.read_frames, "path", None)
    for index in range(sample.num_frames):
        if quick:
            path = path_of(index) if callable(path_of) else path_of
            if isinstance(path, str) and not os.path.isfile(path):
                problems.append(Problem(path, "no such file", _label(sample)))
            continue
        try:
            shape = sample.read_frames([index]).shape[1:3]
        except UserError as error:
            problems.append(Problem.of(error, _label(sample)))
            continue
        if isinstance(sample, Video) and shape != sample.size:
            what = f"{shape[0]}x{shape[1]} pixels where {sample.size[0]}x{sample.size[1]} are expected"
            path = path_of(index) if callable(path_of) else path_of or f"{sample.name}: frame {index}"
            problems.append(Problem(str(path), what, _label(sample)))
    return problems


def _check_masks(video: Video, read: Callable[[int, Sequence[int]], np.ndarray], position: int) -> int | None:
    """The first frame on which the expression's mask is not empty."""
    first = None
    for start in range(0, video.num_frames, _CHUNK):
        indices = range(start, min(start + _CHUNK, video.num_frames))
        masks = read(position, indices)
        if masks.shape != (len(indices), *video.size):
            raise UserError(f"{video.name}: masks of shape {list(masks.shape)} for frames of {list(video.size)}")
        seen = np.flatnonzero(masks.any(axis=(1, 2)))
        if first is None and len(seen):
            first = start + int(seen[0])
    return first


def against_official(source: IndexedSource) -> list[Problem]:
    """Counts that differ from the official split's, which says that files of another version were put together."""
    data_set = DATASETS.get(source.name)
    problems = []
    for split, samples, expressions in data_set.official if data_set else ():
        if split != source.split:
            continue
        if samples is not None and samples != len(source):
            problems.append(Problem(source.root, f"{len(source)} samples, the official {split} has {samples}"))
        stated = sum(len(getattr(record, "expressions", ())) for record in source.records)
        if expressions is not None and expressions != stated:
            problems.append(Problem(source.root, f"{stated} expressions, the official {split} has {expressions}"))
    return problems


def _count(sample: Video | Question) -> int:
    return len(sample.turns if isinstance(sample, Question) else sample.expressions)


def _label(sample: Video | Question) -> str:
    return f"{'image' if sample.is_image else 'video'} {sample.name}"
