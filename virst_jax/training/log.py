"""What a training run tells: a CSV file, TensorBoard curves and a progress line."""

import contextlib
import csv
import io
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from tensorboardX import SummaryWriter

from virst_jax.io import atomic, buckets
from virst_jax.training.tracking import Tracker

if TYPE_CHECKING:
    from virst_jax.io.buckets import Place

TABLE, BOARD = "metrics.csv", "tensorboard"
SECONDS = 30.0  # between two times that a log is sent to a bucket


class TrainLog:
    """Writes scalars of steps to `folder`/metrics.csv and to TensorBoard files beside it.

    After a restart, rows of steps that will come again are dropped. Objects of a bucket cannot grow: there both are
    written to a local folder, and sent with every checkpoint and twice a minute.

    Args:
      start: the step that the run goes on from.
      tracker: a service that is told the scalars too.
    """

    def __init__(self, folder: "Place", start: int = 0, tracker: Tracker | None = None):
        self.tracker = tracker
        self.mirror = None
        if buckets.is_bucket(folder):
            self.mirror = buckets.Mirror(folder, (TABLE, BOARD))
            self.mirror.pull()
            folder = self.mirror.folder
        self.sent = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / TABLE
        self.columns: list[str] = ["step"]
        self._rewrite([row for row in self._rows() if int(row["step"]) <= start])
        self.board = SummaryWriter(str(folder / BOARD), purge_step=start + 1 if start else None)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds a step's scalars; a new name adds a column."""
        if new := [name for name in scalars if name not in self.columns]:
            rows = self._rows()
            self.columns += new
            self._rewrite(rows)
        with self.file.open("a", newline="") as f:
            csv.DictWriter(f, self.columns).writerow({"step": step, **{k: f"{v:.6g}" for k, v in scalars.items()}})
        for name, value in scalars.items():
            if math.isfinite(value):
                self.board.add_scalar(name, value, step)
        if self.tracker:
            self.tracker.write(step, scalars)
        if time.monotonic() - self.sent > SECONDS:
            self.send()

    def send(self) -> None:
        """Brings what was written to the bucket, if the run's folder is in one.

        Raises:
          WriteError: the bucket cannot be written.
        """
        self.sent = time.monotonic()
        if self.mirror is not None:
            self.board.flush()
            self.mirror.push()

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """An image uint8[H, W, 3] for TensorBoard."""
        self.board.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        self.board.close()
        if self.tracker:
            self.tracker.close()
        if self.mirror is not None:
            self.send()
            self.mirror.close()

    def _rows(self) -> list[dict[str, str]]:
        """The rows that are there, and their columns. What a kill or a crash has damaged is left out."""
        rows: list[dict[str, str]] = []
        if not self.file.is_file():
            return rows
        with self.file.open(newline="", encoding="utf-8", errors="replace") as f, contextlib.suppress(csv.Error):
            reader = csv.DictReader(f)
            if reader.fieldnames and reader.fieldnames[0] == "step":
                self.columns = list(reader.fieldnames)
                for row in reader:
                    if row["step"].isascii() and row["step"].isdigit() and len(row["step"]) < 16:
                        rows.append(row)
        return rows

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, self.columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        atomic.write_text(self.file, table.getvalue())
