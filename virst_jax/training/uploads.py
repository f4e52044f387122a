"""Checkpoints in s3://, where Orbax does not write: every process writes its shards to its disk, and sends them.

WORKDIR/STAGE/checkpoints/STEP/state    in zarr's layout, in which a shard is a file
                              /metrics  a score
                              /commit_success.txt  sent last: without it nothing of a step counts

Nothing is gathered: the files that all processes send are one checkpoint. In gs:// Orbax ends its own in the same way.
"""

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from virst_jax.errors import WriteError
from virst_jax.io import atomic, buckets, model_folder, remote
from virst_jax.parallel import processes
from virst_jax.types import PyTree

if TYPE_CHECKING:
    from virst_jax.io.buckets import Place

STATE, METRICS = "state", "metrics"  # Orbax's names of the items; that of the file in the second one is the same
WHOLE = "commit_success.txt"


@dataclass(frozen=True)
class _Checkpoint:
    """What a policy of Orbax judges."""

    step: int
    metrics: Mapping[str, float] | None
    time: datetime


class UploadedCheckpoints:
    """What `TrainCheckpoints` uses of an ocp.CheckpointManager, for a folder in s3://. All processes call it together.

    Args:
      folder: of the checkpoints.
      policy: says which of them are kept.

    Raises:
      UserError: the bucket cannot be read.
    """

    def __init__(self, folder: "Place", policy: policies.PreservationPolicy):
        self.folder, self.policy = folder, policy
        model_folder.quiet_shards()
        options = model_folder.one_process()
        handler = ocp.StandardCheckpointHandler(use_ocdbt=False, multiprocessing_options=options)
        # else processes tell each other by keys without their names when a folder is there: the first that has
        # written removes the key, and one that has not looked at it yet waits for it in vain
        own_folders = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        self._writer = ocp.AsyncCheckpointer(handler, async_options=own_folders, multiprocessing_options=options)
        self._open = contextlib.ExitStack()
        self._outbox: Path | None = None
        self._upload: threading.Thread | None = None
        self._error: Exception | None = None
        self._metrics: dict[int, Mapping[str, float] | None] = {}
        if processes.is_main():
            whole = {str(step) for step, _ in self._found()}
            for name in set(buckets.folders(folder)) - whole:
                buckets.remove(folder / name)  # of a run that was killed while it sent this one
        self.reload()

    def reload(self) -> None:
        """Reads anew which checkpoints there are, and their scores."""
        found = json.dumps(self._found()) if processes.is_main() else None
        self._metrics = dict(json.loads(processes.from_main("checkpoints", found)))

    def _found(self) -> list[tuple[int, Mapping[str, float] | None]]:
        """Whole checkpoints and their scores, by step."""
        found: list[tuple[int, Mapping[str, float] | None]] = []
        try:
            files = {file.relative_to(self.folder).as_posix() for file in buckets.files_below(self.folder)}
            for step in sorted(int(step) for step, _, name in (f.partition("/") for f in files) if name == WHOLE):
                scores = f"{step}/{METRICS}/{METRICS}"
                found.append((step, json.loads((self.folder / scores).read_text()) if scores in files else None))
        except (OSError, ValueError) as error:
            raise buckets.unreadable(self.folder, error) from error
        return found

    def all_steps(self) -> list[int]:
        self._join()
        return list(self._metrics)

    def latest_step(self) -> int | None:
        return max(self.all_steps(), default=None)

    def metrics(self, step: int) -> Mapping[str, float] | None:
        return self._metrics[step]

    def save(self, step: int, args: ocp.args.Composite, metrics: Mapping[str, float] | None = None, **_: Any) -> None:
        """Begins to save; the arrays may be donated when this returns. Waits for an earlier checkpoint."""
        self.wait_until_finished()
        if self._outbox is None:
            self._outbox = self._open.enter_context(remote.outbox(self.folder, jax.process_index()))
        place = self._outbox / str(step)
        with _on_disk(place):
            self._writer.save(place / STATE, args=args[STATE])
        self._upload = threading.Thread(target=self._finish, args=(step, place, metrics), name="upload", daemon=True)
        self._upload.start()

    def _finish(self, step: int, place: Path, metrics: Mapping[str, float] | None) -> None:
        target = self.folder / str(step)
        try:
            with _on_disk(place):
                self._writer.wait_until_finished()
            buckets.send(place, target, buckets.files_below(place))
            processes.barrier("checkpoint sent", buckets.PATIENCE)
            if processes.is_main():
                if metrics is not None:
                    atomic.write_json(target / METRICS / METRICS, metrics, indent=None)
                atomic.write_text(target / WHOLE, "all that was sent before belongs to a whole checkpoint\n")
            self._metrics[step] = metrics
            self._remove_old()
        except Exception as error:
            self._error = error
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _remove_old(self) -> None:
        now = datetime.now(UTC)
        known = [_Checkpoint(step, metrics, now) for step, metrics in sorted(self._metrics.items())]
        keep = self.policy.should_preserve(known, context=policies.PreservationContext())
        for step in [checkpoint.step for checkpoint, kept in zip(known, keep) if not kept]:
            del self._metrics[step]
            if processes.is_main():
                buckets.remove(self.folder / str(step) / WHOLE)  # what is left by a kill from here on does not count
                buckets.remove(self.folder / str(step))

    def wait_until_finished(self) -> None:
        """Waits until what has begun to be saved is in the bucket.

        Raises:
          WriteError: the bucket, or the disk, cannot be written.
        """
        self._join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _join(self) -> None:
        if self._upload is not None:
            self._upload.join()
            self._upload = None

    def fetch(self, step: int) -> Path:
        """A copy on this machine of what `restore` reads. Raises UserError: it cannot be read, or there is no room."""
        return remote.fetch(self.folder / str(step) / STATE)

    def restore(self, step: int, args: ocp.args.Composite) -> dict[str, PyTree]:
        """Every process reads the shards that `args` asks for, on any mesh."""
        copy = self.fetch(step)
        with model_folder.open_reader() as reader:
            restored = reader.restore(copy, args[STATE].item)
        processes.barrier("restored", buckets.PATIENCE)  # processes of one machine share the copy
        remote.drop(copy)
        return {STATE: restored}

    def close(self) -> None:
        try:
            self.wait_until_finished()
        finally:
            self._writer.close()
            self._open.close()


@contextlib.contextmanager
def _on_disk(place: Path) -> Iterator[None]:
    """Tells that it is the disk of this machine which cannot be written."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise WriteError(
            f"{place}: cannot be written ({reason}); free disk space, or name a larger disk by {buckets.CACHE}"
        ) from error
