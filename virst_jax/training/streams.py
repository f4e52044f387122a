"""The streams of batches of a stage, and which of them each step takes.

Both follow from the seed, the stage's name and the step, so a run goes on from any step without a stored position, on
any number of processes.
"""

import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from virst_jax.config import VirstConfig
from virst_jax.data.batches import Arrays, BatchConfig
from virst_jax.data.pipeline import SKIPPED, Mixture, batches
from virst_jax.data.prompts import Tokenizer
from virst_jax.data.samples import Source
from virst_jax.data.sources import make_source
from virst_jax.errors import UserError
from virst_jax.parallel import sharding
from virst_jax.training.recipe import DataConfig, Stage
from virst_jax.training.tasks import Batch, Task, get_task

MAX_SKIPPED = 0.2  # share of the samples that may be too long for the batch
ENOUGH = 200  # samples from which on that share is judged


def stage_seed(seed: int, stage: str) -> int:
    """The seed of all that a stage draws, 32 bits: stages draw different batches and dropout masks."""
    return int(np.random.SeedSequence([seed, zlib.crc32(stage.encode())]).generate_state(1)[0])


def choose_stream(stage: Stage, seed: int, step: int) -> str:
    """The name of the data that a step takes its batch from, drawn by weight, or each in turn if the stage asks so.

    seed: of stage_seed.
    """
    if stage.in_turn:
        drawn = [data.name for data in stage.data if data.weight > 0]
        return drawn[step % len(drawn)]
    weights = np.array([data.weight for data in stage.data], float)
    rng = np.random.default_rng([seed, step])
    return stage.data[rng.choice(len(weights), p=weights / weights.sum())].name


@dataclass
class Stream:
    """Batches of one kind."""

    name: str
    task: Task
    config: BatchConfig
    prefix_len: int
    iterator: Iterator[Arrays]
    shown: int = field(default=0, init=False)  # samples since this process began
    skipped: int = field(default=0, init=False)

    def next(self) -> Arrays:
        """This process's rows of the next batch.

        Raises:
          UserError: data that cannot be read, or too many samples that do not fit.
        """
        arrays = dict(next(self.iterator))
        skipped = arrays.pop(SKIPPED)
        if skipped.any() and not self.skipped:
            tqdm.write(f"{self.name}: a sample does not fit text_length {self.config.text_length} and is skipped")
        self.shown += len(skipped)
        self.skipped += int(skipped.sum())
        drawn = self.shown + self.skipped
        if drawn >= ENOUGH and self.skipped > MAX_SKIPPED * drawn:
            raise UserError(
                f"{self.name}: {self.skipped} of {drawn} samples do not fit text_length {self.config.text_length}, "
                f"more than {MAX_SKIPPED:.0%}; raise text_length"
            )
        return arrays

    def batch(self, arrays: Mapping[str, Any]) -> Batch:
        """Arrays, or their shapes, as what the task's loss takes."""
        return self.task.batch(arrays, self.prefix_len)


def open_streams(
    stage: Stage,
    cfg: VirstConfig,
    tokenizer: Tokenizer,
    mesh: Mesh,
    *,
    seed: int,
    step: int = 0,
    data_root: str = "",
    threads: int = 2,
    workers: int = 0,
) -> dict[str, Stream]:
    """The streams of a stage by name, each at the batch that it gives next when training goes on from `step`.

    Args:
      seed: of stage_seed.
      data_root: where the data sets lie that name no root of their own.
      threads, workers: as of pipeline.batches.

    Raises:
      UserError: data that cannot be read, or a batch that the mesh does not divide.
    """
    index, count = sharding.process_share(mesh)
    taken = Counter(choose_stream(stage, seed, earlier) for earlier in range(step))
    streams = {}
    for number, data in enumerate(stage.data):
        sharding.check_batch(data.batch.batch_size, mesh)
        task = get_task(data.batch.kind)
        maker = task.make_examples(cfg, tokenizer, data.batch)
        iterator = batches(
            _mixed(open_sources(data, data_root), data),
            maker,
            seed=(seed + 1000 * number) % 2**32,
            start=taken[data.name],
            process_index=index,
            process_count=count,
            threads=threads,
            workers=workers,
        )
        streams[data.name] = Stream(data.name, task, data.batch, maker.prefix_len, iterator)
    return streams


def open_sources(data: DataConfig, data_root: str) -> dict[str, Source]:
    """The sources of a kind of batch by name; see open_source."""
    return {name: open_member(data, name, data_root) for name in data.sources}


def open_member(data: DataConfig, name: str, data_root: str) -> Source:
    """One of the sources of a kind of batch; see open_source."""
    values = dict(data.sources[name])
    values.pop("weight", None)
    return open_source(values.pop("kind", name), get_task(data.batch.kind), data_root, **values)


def _mixed(sources: Mapping[str, Source], data: DataConfig) -> Source | Mixture:
    if len(sources) == 1:
        return next(iter(sources.values()))
    return Mixture(list(sources.values()), [float(data.sources[name].get("weight", 1.0)) for name in sources])


def open_source(kind: str, task: Task, data_root: str, **arguments: Any) -> Source:
    """A source of samples for a task, as recipes describe it; see sources.make_source."""
    if kind != "synthetic":
        arguments.setdefault("root", data_root)
    return make_source(kind, is_image=task.is_image, questions=task.takes_questions, **arguments)
