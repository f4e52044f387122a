"""What a step took and gave, for the log and the progress line."""

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import jax
import numpy as np
from tqdm import tqdm

from virst_jax.data.batches import Arrays
from virst_jax.errors import UserError
from virst_jax.io import atomic
from virst_jax.profiling import flops
from virst_jax.training.log import TrainLog
from virst_jax.training.optim import Groups, group_factors
from virst_jax.training.step import LEARNING_RATE
from virst_jax.training.streams import Stream
from virst_jax.training.tasks import Batch
from virst_jax.training.time_use import TimeUse

if TYPE_CHECKING:
    from virst_jax.io.buckets import Place


class Meter:
    """Reads a step's numbers once the next one runs, so that nothing waits for them; logs, and watches for NaN.

    Args:
      folder: where a batch is written whose loss is not finite.
      count_flops: a stream and a batch of it -> operations of a step.
      bar: the progress line.
      log: None: another process logs.
      use: shown is the share of time that went into waiting for data.
      groups: of the stage; each one's learning rate is logged.
    """

    def __init__(
        self,
        folder: "Place",
        count_flops: Callable[[Stream, Batch], float],
        bar: tqdm,
        log: TrainLog | None,
        use: TimeUse,
        groups: Groups = (),
    ):
        self.factors = group_factors(groups)
        self.folder, self.count_flops, self.bar, self.log, self.use = folder, count_flops, bar, log, use
        self.pending: tuple[int, Stream, Mapping[str, jax.Array], Arrays] | None = None
        self.flops: dict[str, float] = {}  # of a step, by stream
        device = jax.devices()[0]
        # virtual devices of a CPU share its cores
        self.devices = 1 if device.platform == "cpu" else jax.device_count()
        self.peak, _ = flops.device_peak(device)
        self.restart()

    def restart(self) -> None:
        """Leaves out the time until now, such as that of an evaluation."""
        self.last = time.perf_counter()

    def add(self, step: int, stream: Stream, metrics: Mapping[str, jax.Array], arrays: Arrays, batch: Batch) -> None:
        """Takes the metrics of a step that was started, and logs those of the step before."""
        self.flush()
        if stream.name not in self.flops:
            self.flops[stream.name] = self.count_flops(stream, batch)
        self.pending = (step, stream, metrics, arrays)

    def flush(self) -> None:
        """Logs the last step.

        Raises:
          UserError: the loss or the gradient was not finite; the batch is saved.
        """
        if self.pending is None:
            return
        (step, stream, metrics, arrays), self.pending = self.pending, None
        name = stream.name
        values = {key: float(value) for key, value in jax.device_get(metrics).items()}
        if not values.pop("finite"):
            path = self.folder / f"nan_batch_{step}_{jax.process_index()}.npz"
            atomic.write_npz(path, arrays)
            raise UserError(
                f"step {step} ({name}): the loss or its gradient is not finite (loss {values['loss']}, gradient norm "
                f"{values['grad_norm']}); the batch is in {path} and changed nothing: lower learning_rate or "
                "clip_norm, and run the same command to go on from the last checkpoint"
            )
        rate = values.pop(LEARNING_RATE)
        rates = {f"{LEARNING_RATE}/{group}": rate * factor for group, factor in self.factors.items()}
        now = time.perf_counter()
        seconds, self.last = max(now - self.last, 1e-6), now
        mfu = flops.utilisation(self.flops[name], seconds, self.devices, self.peak)
        if stream.skipped:
            values["skipped"] = stream.skipped
        if self.log:
            scalars = {f"{name}/{key}": value for key, value in values.items()}
            self.log.write(step, {**scalars, f"{name}/seconds": seconds, f"{name}/mfu": mfu, **rates})
        frames = int(np.prod(arrays["clips"].shape[:3])) * jax.process_count() if "clips" in arrays else 0
        self.bar.set_postfix_str(
            f"{name} loss {values['loss']:.3f}, {seconds:.2f} s/step, {frames / seconds:.1f} frames/s, MFU {mfu:.1%}, "
            f"data {self.use.share('data'):.0%}"
        )
        self.bar.update()
