"""Endless, seeded streams of training batches (grain).

Which samples make batch n, and all that is drawn for them, follows from the seed and n alone. A stream therefore begins
at any batch, with any number of threads, worker processes and processes of the run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from absl import flags

from virst_jax.data.batches import Arrays, DoesNotFit, ExampleMaker, stack
from virst_jax.data.samples import Source, Video
from virst_jax.errors import UserError

DRAWS = 1000
ENDLESS = 2**48  # samples
SKIPPED = "skipped"  # in a batch: how many samples were passed over for each example, int32[B]


@dataclass(frozen=True)
class Mixture:
    """Several sources, drawn in proportion to their weights.

    Raises:
      UserError: weights that make no mixture, or a source that is to be drawn and is empty.
    """

    sources: Sequence[Source]
    weights: Sequence[float]

    def __post_init__(self) -> None:
        weights = self.weights
        if len(self.sources) != len(weights) or not weights or min(weights) < 0 or sum(weights) <= 0:
            raise UserError("a mixture needs sources with weights that are not negative, and not all of them 0")
        for i, source in enumerate(self.sources):
            if weights[i] > 0 and not len(source):
                raise UserError(f"source {i} of a mixture is empty; check its folder and split")


def batches(
    data: Source | Mixture,
    maker: ExampleMaker,
    *,
    seed: int,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 2,
    workers: int = 0,
) -> grain.DatasetIterator[Arrays]:
    """An iterator of batches: dictionaries of arrays with a leading axis of this process's share.

    An epoch of a source shows each of its samples once, in an order of its own. A batch holds, beside its examples,
    "skipped": how many samples did not fit and were replaced by others of their source.

    Args:
      maker: its batch_size counts the samples of all processes together.
      seed: at most 32 bits.
      start: number of the first batch.
      threads: that read ahead.
      workers: processes that do, each with its threads; 0: none.

    Raises:
      UserError: a source is empty, or the batch cannot be divided among the processes.
    """
    size = maker.batch.batch_size
    if not isinstance(data, Mixture) and not len(data):
        raise UserError("the training data is empty; check its folder and split")
    if size % process_count:
        raise UserError(f"a batch of {size} cannot be shared out over {process_count} processes; choose a multiple")
    mixture = data if isinstance(data, Mixture) else Mixture([data], [1.0])
    share = _Share(_examples(mixture, maker, seed), size, start, process_index, process_count)
    dataset = grain.MapDataset.source(share).batch(size // process_count, batch_fn=stack)
    stream = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))
    if workers:
        if not flags.FLAGS.is_parsed():  # grain's processes read flags of theirs, which nobody need have parsed
            flags.FLAGS.mark_as_parsed()
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(stream)


def one_example(source: Source, maker: ExampleMaker, seed: int = 0) -> Arrays:
    """An example of a source's first sample, or of another one if that cannot be used: whether the data can be read.

    Raises:
      UserError: it cannot, or the source is empty.
    """
    if not len(source):
        raise UserError("it has no samples; check its folder and split")
    return _Draw(source, maker)(source[0], np.random.default_rng(seed))


def _examples(mixture: Mixture, maker: ExampleMaker, seed: int) -> grain.MapDataset[Arrays]:
    """All examples in the order in which they are shown."""
    chosen = [(source, weight) for source, weight in zip(mixture.sources, mixture.weights) if weight > 0]
    seeds = [seed, *np.random.SeedSequence([seed, len(chosen)]).generate_state(len(chosen) - 1).tolist()]
    each = []
    for (source, _), own_seed in zip(chosen, seeds):
        # endless in effect; grain's own endless length overflows for sources of some sizes
        shuffled = grain.MapDataset.source(source).seed(own_seed).shuffle().repeat(-(-ENDLESS // len(source)))
        each.append(shuffled.random_map(_Draw(source, maker)))
    return each[0] if len(each) == 1 else grain.MapDataset.mix(each, [weight for _, weight in chosen])


@dataclass(frozen=True)
class _Draw:
    """Makes an example of a sample, or of another one of its source if the sample cannot be used."""

    source: Source
    maker: ExampleMaker

    def __call__(self, sample: Any, rng: np.random.Generator) -> Arrays:
        skipped, reason = 0, "no sample has expressions"
        for _ in range(DRAWS):
            # an image may show none of its data set's classes
            if not isinstance(sample, Video) or sample.expressions:
                try:
                    return {**self.maker(sample, rng), SKIPPED: np.array(skipped, np.int32)}
                except DoesNotFit as error:
                    skipped, reason = skipped + 1, str(error)
            sample = self.source[int(rng.integers(len(self.source)))]
        raise UserError(f"{sample.name}: no usable sample in {DRAWS} draws ({reason}); check the data set")


@dataclass(frozen=True)
class _Share:
    """The examples that one process reads: its rows of every batch, from batch `start` on."""

    examples: grain.MapDataset[Arrays]
    batch_size: int
    start: int
    process_index: int
    process_count: int

    def __len__(self) -> int:
        return min(len(self.examples), ENDLESS) // self.process_count - self.start * self.batch_size

    def __getitem__(self, index: int) -> Arrays:
        rows = self.batch_size // self.process_count
        batch, row = divmod(int(index), rows)
        example: Any = self.examples[(self.start + batch) * self.batch_size + self.process_index * rows + row]
        return example
