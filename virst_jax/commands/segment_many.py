"""`virst segment` on many videos: one model, a folder for each video, and a table that says what became of each.

OUT/NAME/                     what `virst segment` writes for one video
OUT/results.csv, results.json a row for each video and sentence; written anew behind every video
OUT/.virst/settings.json      which video has which folder, for --resume
"""

import argparse
import csv
import errno
import io
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from virst_jax.commands import _common, failures, interrupt, segment, segment_results
from virst_jax.commands.progress import Progress, Tell
from virst_jax.commands.segment_run import SETTINGS, STATE, claimed, clear_folder
from virst_jax.commands.video_list import Item, folder_names, key
from virst_jax.errors import UserError
from virst_jax.io import atomic, small_model
from virst_jax.io.json_files import read_json

if TYPE_CHECKING:
    from virst_jax.api import Model
    from virst_jax.inference.shared_batches import StreamEncoder

CSV, JSON = "results.csv", "results.json"
COLUMNS = ("video", "folder", "status", "sentence", "frames", "frames_found", "seconds", "error")
DONE, FAILED, STOPPED, WAITING = "done", "failed", "interrupted", "waiting"
SHOWN_ROWS = 40  # of the table that is printed; the files have them all


@dataclass
class Outcome:
    """What became of a video; the objects are those of `segment_results.findings`."""

    video: str
    folder: str
    status: str = WAITING
    error: str = ""
    seconds: float = 0.0
    objects: list[dict[str, Any]] = field(default_factory=list)


def run_many(args: argparse.Namespace, items: Sequence[Item]) -> int:
    """Segments the videos; one that fails does not stop the others.

    Returns:
      The exit status: 0, or 1 if a video has failed.

    Raises:
      UserError: the folder cannot be written or another run holds it, or the model cannot be loaded.
    """
    atomic.check_writable(args.out)
    notes = [small_model.NOTE] if small_model.is_small(args.model) else []
    with claimed(args.out, resume=args.resume, overwrite=args.overwrite):
        with Progress(quiet=args.quiet) as progress:
            if not args.quiet:
                for note in notes:
                    _common.tell(f"note: {note}")
            progress("load the model", 0, 0)
            model = _common.load_model(args)
            outcomes = _begin(args, items)
            segment_all = _segment_at_once if args.concurrency > 1 else _segment_in_turn
            try:
                segment_all(args, model, items, outcomes, notes, progress)
            except BaseException as stop:
                _stopped(outcomes, stop)
                write_tables(args.out, outcomes)
                raise
        report(args, outcomes)
    return int(any(outcome.status == FAILED for outcome in outcomes))


def _begin(args: argparse.Namespace, items: Sequence[Item]) -> list[Outcome]:
    """Chooses the folders, and writes down which video has which."""
    file = args.out / STATE / SETTINGS
    if args.overwrite:
        clear_folder(args.out)
    known: dict[str, str] = {}
    if file.exists():
        before = read_json(file)
        if "folders" not in before:
            raise UserError(f"{args.out}: holds a run on a single video; choose another folder, or --overwrite")
        known = {name: folder.text() for name, folder in before["folders"].members()}
    names = folder_names(items, known)
    segment_results.write(file, {"folders": known | {key(item): name for item, name in zip(items, names)}})
    return [Outcome(item.video, name) for item, name in zip(items, names)]


def _segment_in_turn(
    args: argparse.Namespace,
    model: "Model",
    items: Sequence[Item],
    outcomes: Sequence[Outcome],
    notes: Sequence[str],
    progress: Progress,
) -> None:
    for number, (item, outcome) in enumerate(zip(items, outcomes), 1):
        progress.begin(outcome.folder, number, len(items))
        _segment(args, model, item, outcome, notes, progress)
        write_tables(args.out, outcomes)


def _segment_at_once(
    args: argparse.Namespace,
    model: "Model",
    items: Sequence[Item],
    outcomes: Sequence[Outcome],
    notes: Sequence[str],
    progress: Progress,
) -> None:
    """As many videos at the same time as `--concurrency` says, each by a thread; their frames share batches."""
    from virst_jax.inference.shared_batches import SharedBatches

    batches, stopping = SharedBatches(model.network, model.batch), threading.Event()

    def work(item: Item, outcome: Outcome) -> None:
        def tell(stage: str, done: int, total: int) -> None:
            interrupt.check()  # a signal raises in the main thread alone
            if stopping.is_set():
                raise KeyboardInterrupt
            show(stage, done, total)

        with batches.join() as encoder, progress.beside(outcome.folder) as show:
            _segment(args, model, item, outcome, notes, tell, encoder)

    progress.finished(0, len(items))
    with (
        interrupt.gently(lambda: None),  # the first signal is seen by the threads, which save what they have
        ThreadPoolExecutor(max_workers=args.concurrency, thread_name_prefix="video") as pool,
    ):
        futures = [pool.submit(work, item, outcome) for item, outcome in zip(items, outcomes)]
        try:
            for number, future in enumerate(as_completed(futures), 1):
                future.result()
                progress.finished(number, len(items))
                write_tables(args.out, outcomes)
        except BaseException:
            stopping.set()
            pool.shutdown(cancel_futures=True)
            raise
    interrupt.check()


def _segment(
    args: argparse.Namespace,
    model: "Model",
    item: Item,
    outcome: Outcome,
    notes: Sequence[str],
    progress: Tell,
    encoder: "StreamEncoder | None" = None,
) -> None:
    out, start = args.out / outcome.folder, time.perf_counter()
    begun = (out / STATE / SETTINGS).is_file()
    try:
        reader = segment.open_reader(args, item.video)
        with claimed(out, resume=begun):
            result = segment.segment_into(
                args,
                item.video,
                reader,
                item.sentences,
                out,
                model=model,
                notes=notes,
                progress=progress,
                encoder=encoder,
            )
        outcome.status, outcome.error = DONE, ""
        outcome.objects = segment_results.findings(result)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # the others would fail, too
        line = failures.one_line(error)
        outcome.status = FAILED
        outcome.error = line or f"a fault of this program: {type(error).__name__}: {error}"
        _common.tell(f"{item.video}: failed: {outcome.error.removeprefix(f'{item.video}: ')}")
        if line is None:
            traceback.print_exc()
    finally:
        outcome.seconds = round(time.perf_counter() - start, 2)


def _stopped(outcomes: Sequence[Outcome], stop: BaseException) -> None:
    """Marks the videos that were at work."""
    for outcome in outcomes:
        if outcome.status == WAITING and outcome.seconds:
            outcome.status = STOPPED if isinstance(stop, KeyboardInterrupt) else FAILED
            outcome.error = "" if isinstance(stop, KeyboardInterrupt) else failures.one_line(stop) or repr(stop)


def write_tables(out: Path, outcomes: Sequence[Outcome]) -> None:
    """results.csv and results.json."""
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows(outcomes))
    atomic.write_text(out / CSV, file.getvalue())
    atomic.write_text(out / JSON, json.dumps([asdict(x) for x in outcomes], indent=1, ensure_ascii=False) + "\n")


def rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row for each video and sentence; one for a video without result."""
    out: list[dict[str, Any]] = []
    for outcome in outcomes:
        shared = {name: getattr(outcome, name) for name in ("video", "folder", "status", "seconds", "error")}
        out += [
            {**shared, "sentence": x["expression"], "frames": x["frames"], "frames_found": x["frames_found"]}
            for x in outcome.objects
        ] or [{**shared, "sentence": "", "frames": "", "frames_found": ""}]
    return out


def report(args: argparse.Namespace, outcomes: Sequence[Outcome]) -> None:
    """Prints the table."""
    if args.json:
        print(json.dumps({"out": str(args.out), "videos": [asdict(x) for x in outcomes]}, indent=1, ensure_ascii=False))
        return
    failed = [outcome for outcome in outcomes if outcome.status != DONE]
    # of a long table, what needs a person
    shown = rows(outcomes if len(outcomes) <= SHOWN_ROWS else failed[:SHOWN_ROWS])
    lines = [
        (row["folder"], row["sentence"] or row["status"], f"found in {row['frames_found']} of {row['frames']} frames")
        if row["status"] == DONE
        else (row["folder"], row["status"], row["error"])
        for row in shown
    ]
    widths = [max((len(line[i]) for line in lines), default=0) for i in range(2)]
    for line in lines:
        print("  ".join([line[0].ljust(widths[0]), line[1].ljust(widths[1]), line[2]]).rstrip())
    print(f"wrote {len(outcomes) - len(failed)} of {len(outcomes)} videos to {args.out}, the table to {CSV} and {JSON}")
    if failed:
        again = f"{len(failed)} failed; mend them, and run it again with --resume{os.linesep}"
        sys.stdout.flush()
        sys.stderr.write(again)
    sys.stdout.flush()
