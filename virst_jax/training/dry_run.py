"""A recipe in short, before hours are spent: every data set, kind of batch, evaluation, save and restore, and a report.

train.py runs the stages, with the code that trains; here is what is done beside it.
"""

import csv
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from virst_jax.config import IGNORE, VirstConfig
from virst_jax.data.batches import Arrays, ConversationMaker
from virst_jax.data.pipeline import one_example
from virst_jax.data.prompts import Tokenizer
from virst_jax.errors import UserError
from virst_jax.io import buckets
from virst_jax.training.evaluate import held_out_videos
from virst_jax.training.log import TABLE
from virst_jax.training.recipe import DataConfig, Stage, plain
from virst_jax.training.streams import open_member
from virst_jax.training.tasks import get_task
from virst_jax.training.time_use import CHECKPOINT, COMPILE, EVALUATION, TimeUse

if TYPE_CHECKING:
    from virst_jax.io.buckets import Place

FOLDER = "dry_run"  # within the run's folder; removed at the end
EACH = 3  # steps of every kind of batch: the first compiles, the second does so again behind the restore
GIB = 2**30


def in_short(config: ConfigDict) -> ConfigDict:
    """The recipe with one held-out video and one checkpoint a stage, and without traces or services."""
    short = config.copy_and_resolve_references()
    with short.unlocked():
        short.eval.videos, short.eval.every = min(1, config.eval.videos), 0
        short.checkpoint.every = 0
        for key in {"profile", "tracking", "goodput"} & set(short):
            del short[key]
    return short


def shortened(stage: Stage, each: int) -> Stage:
    """The stage with `each` steps of every kind of batch, in turn. Its optimizer stays, so that its compiled steps are
    those of the stage."""
    return dataclasses.replace(stage, steps=each * len(used(stage)), in_turn=True)


def used(stage: Stage) -> list[DataConfig]:
    """The kinds of batch that the stage takes steps of."""
    return [data for data in stage.data if data.weight > 0]


# Data


def check_data(
    stages: Sequence[Stage], config: ConfigDict, cfg: VirstConfig, tokenizer: Tokenizer, say: Callable[[str], None]
) -> None:
    """Makes an example of every data set, and reads a held-out video. Nothing is compiled for it.

    Args:
      say: is given a line for each.

    Raises:
      UserError: names all data sets that cannot be read.
    """
    seen: dict[Any, bool] = {}
    faults: list[str] = []

    def tried(where: str, read: Callable[[], str]) -> None:
        start = time.perf_counter()
        try:
            told = read()
        except UserError as error:
            faults.append(f"{where}: {error}")
            say(f"{where}: fails: {error}")
        else:
            say(f"{where}: {told}, read in {time.perf_counter() - start:.1f} s")

    def example(data: DataConfig, name: str) -> str:
        source = open_member(data, name, config.data_root)
        maker = get_task(data.batch.kind).make_examples(cfg, tokenizer, data.batch)
        made = one_example(source, maker, int(config.seed))
        filled = filled_text(made, maker) if isinstance(maker, ConversationMaker) else ""
        return f"{len(source)} samples{filled}"

    for stage in stages:
        for data in used(stage):
            for name, arguments in data.sources.items():
                key = (data.batch, name, repr(sorted(arguments.items())))
                if key not in seen and float(arguments.get("weight", 1.0)) > 0:
                    seen[key] = True
                    tried(f"{stage.name}, {data.name}, {name}", functools.partial(example, data, name))
    if config.eval.videos and any(get_task(data.batch.kind).evaluated for stage in stages for data in used(stage)):

        def held_out() -> str:
            videos = held_out_videos(plain(config.eval.source), config.eval.videos, config.data_root)
            if not len(videos):
                raise UserError("it has no videos; check its folder and split")
            videos[0].read_frames([0])
            return f"{len(videos)} videos"

        tried("held-out videos", held_out)
    if len(faults) == 1:
        raise UserError(faults[0])
    if faults:
        raise UserError(f"{len(faults)} data sets cannot be read: " + "; ".join(faults))


def filled_text(example: Arrays, maker: ConversationMaker) -> str:
    """How much of its positions behind the video an example fills with text: what packing may gain."""
    own, labelled = example["mask"][:, maker.prefix_len :], (example["labels"] != IGNORE).any(1)
    lengths = (example["places"] >= 0).sum(1) if "places" in example else own.sum(1) * labelled  # others fill up
    share, longest = lengths.sum() / own.size, lengths.max()
    return (
        f", of which one fills {share:.0%} of its {own.size} text positions "
        f"(its longest conversation {longest} of {maker.batch.text_length})"
    )


# The report


@dataclass
class StageReport:
    """What a stage took in short. The process that writes the log fills it."""

    stage: Stage  # as it is, not in short
    begun: TimeUse  # until it was stopped
    rest: TimeUse  # from its restore on
    rows: list[Mapping[str, str]] = field(default_factory=list)  # of its log
    checkpoint: int = 0  # bytes
    model: int = 0  # bytes

    @classmethod
    def of(cls, stage: Stage, begun: TimeUse, rest: TimeUse, folder: "Place", export: str) -> "StageReport":
        """Reads the log and the sizes of what was written to the stage's folder."""
        rows: list[Mapping[str, str]] = [*csv.DictReader((folder / TABLE).read_text().splitlines())]
        sizes = {name: _size(folder / name) for name in ("checkpoints", export)}
        return cls(stage, begun, rest, rows, sizes["checkpoints"] // 2, sizes[export])  # two checkpoints

    def of_kind(self, name: str) -> list[Mapping[str, str]]:
        return [row for row in self.rows if row.get(f"{name}/seconds")]

    def seconds(self, name: str) -> float | None:
        """A step of a kind of batch; None: no step that did not compile."""
        compiling = 2 * len(used(self.stage))
        later = [float(row[f"{name}/seconds"]) for row in self.of_kind(name) if int(row["step"]) > compiling]
        return min(later, default=None)

    @property
    def hours(self) -> float | None:
        """Of all steps of the stage; None: not known."""
        known = [(data.weight, self.seconds(data.name)) for data in used(self.stage)]
        if any(seconds is None for _, seconds in known):
            return None
        mean = sum(weight * float(seconds or 0) for weight, seconds in known) / sum(weight for weight, _ in known)
        return self.stage.steps * mean / 3600

    def lines(self) -> list[tuple[str, str]]:
        """What is told of the stage: of what, and what."""
        told = []
        for data in used(self.stage):
            rows, seconds = self.of_kind(data.name), self.seconds(data.name)
            losses = ", ".join(f"{float(row[f'{data.name}/loss']):.3f}" for row in rows)
            speed = "not measured (give --steps 3 or more)" if seconds is None else f"{seconds:.2f} s a step"
            first = float(rows[0][f"{data.name}/seconds"])
            told.append((f"batches: {data.name}", f"{speed}, the first one {first:.0f} s; losses {losses}"))
        saved, restored = self.begun.seconds[CHECKPOINT], self.rest.seconds["start"]
        told.append(("checkpoint", f"{_gib(self.checkpoint)}, saved in {saved:.1f} s; restored in {restored:.1f} s"))
        if EVALUATION in self.rest.seconds:
            score = next((row["eval/j_and_f"] for row in self.rows if row.get("eval/j_and_f")), "")
            told.append(("held-out video", f"{self.rest.seconds[EVALUATION]:.0f} s, J&F {float(score or 'nan'):.3f}"))
        told.append(("model", f"{_gib(self.model)}, written in {self.rest.seconds['export']:.1f} s"))
        told.append(("compilation", f"{self.begun.seconds[COMPILE] + self.rest.seconds[COMPILE]:.0f} s in two starts"))
        if memory := _memory():
            told.append(("memory so far", memory))
        hours = self.hours
        whole = "not known" if hours is None else f"{hours:.2f} hours"
        told.append((f"all {self.stage.steps} steps", f"{whole}, without evaluations and checkpoints"))
        return told


def print_report(reports: Sequence[StageReport], console: Console | None = None) -> None:
    """The reports of all stages, as tables."""
    console = console or Console()
    for report in reports:
        table = Table(title=report.stage.name, show_header=False, title_justify="left")
        for what, told in report.lines():
            table.add_row(what, told)
        console.print(table)
    console.print("Everything that this recipe does was done once.")


def _memory() -> str:
    """The most that a device of this process has held; empty: the backend does not say."""
    known = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    peak = max((stats.get("peak_bytes_in_use", 0) for stats in known), default=0)
    limit = max((stats.get("bytes_limit", 0) for stats in known), default=0)
    return f"at most {_gib(peak)} of {_gib(limit)} a device" if peak else ""


def _size(folder: "Place") -> int:
    """Bytes of all files below."""
    if buckets.is_bucket(folder):
        return buckets.size_below(folder)
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
