"""Evaluates a model on a benchmark: masks, scores, a report. Interrupted, the same command goes on.

    python eval.py --model=MODEL --dataset=NAME --data-root=DIR --workdir=DIR

Writes WORKDIR/DATASET-SPLIT/{masks, scores, report}; configs/eval.py lists the settings, docs/evaluation.md tells more,
virst_jax/commands/eval.py defines the arguments. Exit status: 0, 1 if a video failed (it is named, the others are
done), 2 for bad input.

An installed package has this file as virst_jax.eval; there `virst eval` runs it.
"""

import argparse
import functools
import hashlib
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from virst_jax import cli
from virst_jax.commands import eval as command
from virst_jax.data.datasets.registry import open_dataset
from virst_jax.data.samples import Video
from virst_jax.errors import UserError
from virst_jax.evaluation.benchmarks import Opened, Subset
from virst_jax.evaluation.predictions import StoredReader
from virst_jax.evaluation.report import write_report
from virst_jax.evaluation.runner import Outcome, Predict, evaluate
from virst_jax.evaluation.submission import ROOTS, write_pngs
from virst_jax.io import buckets, small_model
from virst_jax.io.address import local
from virst_jax.io.buckets import Mirror

DAYS = 7 * 24 * 3600.0  # seconds; one that has ended is noticed sooner

Frames = Iterator[tuple[int, np.ndarray, np.ndarray]]


def predict_with_model(config: ConfigDict) -> Predict:
    """Masks by the model, which is loaded when the first video asks for it."""

    @functools.cache
    def model() -> Any:
        from virst_jax import api

        return api.load(config.model, dtype=config.dtype or None)

    def predict(video: Video, expressions: Sequence[int]) -> Frames:
        texts = [video.expressions[i].text for i in expressions]
        seed = (config.seed, zlib.crc32(video.name.encode()))  # all expressions of a video share its frames
        with model().segment_stream(video, texts, seed=seed, exact=config.exact, still=video.is_image) as stream:
            for frame in stream:
                yield frame.index, frame.masks, frame.scores

    return predict


def predict_truth(video: Video, expressions: Sequence[int]) -> Frames:
    """The annotated masks."""
    if video.read_masks is None:
        raise UserError(f"video {video.name}: its masks are not public, so they cannot be taken for predictions")
    for t in range(video.num_frames):
        masks = np.concatenate([video.read_masks(i, [t]) for i in expressions])
        yield t, masks, np.where(masks.any(axis=(1, 2)), 1.0, -1.0)


def predict_empty(video: Video, expressions: Sequence[int]) -> Frames:
    """Empty masks."""
    for t in range(video.num_frames):
        yield t, np.zeros((len(expressions), *video.size), bool), np.full(len(expressions), -1.0)


def predictor(config: ConfigDict) -> Predict:
    """The predict function of a config.

    Raises:
      UserError: unknown name.
    """
    known = {"model": predict_with_model(config), "truth": predict_truth, "empty": predict_empty}
    if config.predictor not in known:
        raise UserError(f"config.predictor: unknown {config.predictor!r}; choose one of {', '.join(known)}")
    return known[config.predictor]


def model_identity(path: str) -> str:
    """A hash of a model's config, tokenizer and parameter files (their names and sizes, and small ones whole)."""
    from virst_jax.api import find_model

    folder = find_model(path)
    digest = hashlib.sha256()
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)} {size} ".encode())
        with file.open("rb") as content:
            digest.update(content.read(1 << 16))
            if size > 1 << 17:
                content.seek(-(1 << 16), 2)
                digest.update(content.read())
    return digest.hexdigest()[:16]


def settings_of(config: ConfigDict, source: Opened) -> dict[str, Any]:
    """What determines the masks."""
    settings: dict[str, Any] = {"dataset": source.name, "split": source.split, "predictor": config.predictor}
    if config.predictor == "model":
        settings |= {
            "model": model_identity(config.model),
            "seed": config.seed,
            "exact": config.exact,
            "dtype": config.dtype,
        }
    return settings


def open_source(config: ConfigDict) -> Opened:
    """The data set of a config.

    Raises:
      UserError: it is not named, or cannot be opened.
    """
    for key in ("dataset", "data_root"):
        if not config[key]:
            raise UserError(f"config.{key} is not given: add --config.{key}=...")
    source = open_dataset(config.dataset, config.data_root, config.split)
    dropped = [problem for problem in source.problems if problem.dropped]
    if dropped:
        print(f"{len(dropped)} samples or expressions are left out, the first: {dropped[0]}", file=sys.stderr)
    if config.limit:
        order = sorted((name, index) for index, name in enumerate(source.names))[: config.limit]
        return Subset(source, tuple(index for _, index in order))
    return source


def share_of(config: ConfigDict) -> tuple[int, int]:
    """This process's number, and how many there are."""
    if not config.distributed:
        return config.process_index, config.process_count
    import jax

    return jax.process_index(), jax.process_count()


def run(config: ConfigDict, workdir: Path) -> int:
    """Evaluates; gives the exit status. With config.distributed, processes wait for the one that takes longest."""
    if not config.distributed:
        return _run(config, workdir)
    from virst_jax.parallel import processes

    processes.start()
    with processes.together():
        status = _run(config, workdir)
        processes.barrier("evaluated", seconds=DAYS)
        return status


def _run(config: ConfigDict, workdir: Path) -> int:
    source = open_source(config)
    if config.predictor == "model" and small_model.is_small(config.model):
        print(f"note: {small_model.NOTE}", file=sys.stderr)
    name = "-".join(filter(None, (source.name, source.split)))
    if not buckets.is_bucket(workdir):
        return _evaluate(config, source, workdir / name)
    with buckets.mirrored(workdir / name) as mirror:
        return _evaluate(config, source, mirror.folder, mirror)


def _evaluate(config: ConfigDict, source: Opened, out: Path, mirror: Mirror | None = None) -> int:
    """Evaluates with results in `out`, which `mirror` keeps the same as a bucket's folder."""
    process_index, process_count = share_of(config)
    read_pred = StoredReader(str(out / "masks"))

    def after_video(video: Video) -> None:
        if config.png:
            write_pngs(video, read_pred, out / "Annotations")
        if mirror is not None:
            mirror.push()

    outcome = evaluate(
        source,
        predictor(config),
        out,
        settings_of(config, source),
        process_index=process_index,
        process_count=process_count,
        workers=config.workers,
        overwrite=config.overwrite,
        progress=config.progress,
        after_video=after_video,
        exchange=mirror.exchange if mirror is not None else lambda: None,
    )
    shown = mirror.address if mirror is not None else out
    if outcome.summary is not None:
        table = write_report(
            out / "report",
            outcome.summary,
            outcome.scores,
            source=source,
            read_pred=read_pred,
            worst=config.worst,
            errors=outcome.errors,
            progress=config.progress,
        )
        print(table, end="")
        print(f"report: {shown}/report")
    _say_what_is_left(outcome, source, shown)
    return 1 if outcome.errors else 0


def _say_what_is_left(outcome: Outcome, source: Opened, out: Path | str) -> None:
    if outcome.pending:
        print(f"{outcome.pending} of {outcome.videos} videos are left to other processes; the last one reports")
    elif not outcome.scores and not outcome.errors:
        advice = f"; `virst submit {out} --dataset {source.name}` writes the zip" if source.name in ROOTS else ""
        print(f"the masks of {source.name} {source.split} are not public, so there are no scores{advice}")
    if outcome.errors:
        print(f"{len(outcome.errors)} of {outcome.videos} videos failed:", file=sys.stderr)
        for name, error in sorted(outcome.errors.items()):
            print(f"  {name}: {error}", file=sys.stderr)


def main(args: argparse.Namespace) -> int:
    """Evaluates as the arguments of `virst eval` say; gives the exit status."""
    config = command.config_of(args)
    try:
        return run(config, args.workdir if buckets.is_bucket(args.workdir) else local(args.workdir, "--workdir"))
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("interrupted; what is finished is kept, the same command goes on") from error


if __name__ == "__main__":
    sys.exit(cli.call(command, None, "eval.py", main))
