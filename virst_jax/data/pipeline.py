"""Endless, seeded, resumable streams of training batches (grain).

Which samples make batch n, and all that is drawn for them, follows from the seed and n alone, so a restored iterator
goes on as if it had never stopped, with any number of threads.
"""

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from virst_jax.data.batches import Arrays, ExampleMaker, stack
from virst_jax.data.samples import Source, Video
from virst_jax.errors import UserError

DRAWS = 1000
ENDLESS = 2**48  # samples


class Mixture:
    """Several sources drawn by weight, as one: for index i the weights and the seed choose the source."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], seed: int = 0):
        if len(sources) != len(weights) or not sources or min(weights) < 0 or sum(weights) <= 0:
            raise UserError("a mixture needs sources with weights that are not negative, and not all of them 0")
        for i, source in enumerate(sources):
            if weights[i] > 0 and not len(source):
                raise UserError(f"source {i} of a mixture is empty; check its folder and split")
        self.sources, self.seed = list(sources), seed
        self.edges = np.cumsum(np.asarray(weights, float) / sum(weights))

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __getitem__(self, index: int) -> Any:
        rng = np.random.default_rng([self.seed, int(index)])
        which = min(int(np.searchsorted(self.edges, rng.random(), side="right")), len(self.sources) - 1)
        source = self.sources[which]
        return source[int(rng.integers(len(source)))]


def batches(
    source: Source,
    maker: ExampleMaker,
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 2,
    workers: int = 0,
) -> grain.DatasetIterator:
    """An iterator of batches, dictionaries of arrays with a leading axis of this process's share.

    Args:
      maker: its batch_size counts the samples of all processes together.
      threads: that read ahead.
      workers: processes that do, each with its threads; 0: none.

    Raises:
      UserError: the source is empty, or the batch cannot be shared out.
    """
    size = maker.batch.batch_size
    if not len(source):
        raise UserError("the training data is empty; check its folder and split")
    if size % process_count:
        raise UserError(f"a batch of {size} cannot be shared out over {process_count} processes; choose a multiple")

    def example(sample: Any, rng: np.random.Generator) -> Arrays:
        for _ in range(DRAWS):
            if not isinstance(sample, Video) or sample.expressions:
                return maker(sample, rng)
            # a picture may show none of its data set's classes
            sample = source[int(rng.integers(len(source)))]
        raise UserError(f"{sample.name}: no sample with expressions in {DRAWS} draws; check the data set")

    # endless in effect; grain's own endless length overflows for sources of some sizes
    data = grain.MapDataset.source(source).seed(seed).shuffle().repeat(-(-ENDLESS // len(source)))
    data = data.random_map(example)[process_index::process_count]
    data = data.batch(size // process_count, batch_fn=stack)
    stream = data.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))
    if workers:
        if not flags.FLAGS.is_parsed():  # grain's processes read flags of theirs, which nobody need have parsed
            flags.FLAGS.mark_as_parsed()
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(stream)
