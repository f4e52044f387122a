"""Checkpoints of a training run: Orbax, asynchronous; the latest ones and the best are kept.

WORKDIR/STAGE/checkpoints/STEP/{state,metrics}   trained parameters, optimizer, average and step; a score

The frozen parameters are not among them: they come from where the run started. All that is drawn, and the position in
the data, follows from the seed and the step, so neither a generator's nor a data iterator's state has to be kept, and
a run goes on with another number of processes. Those of earlier versions hold iterators too, which are left unread.
"""

from typing import TYPE_CHECKING, Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from virst_jax.errors import UserError
from virst_jax.io import atomic, buckets
from virst_jax.parallel import processes
from virst_jax.training.step import TrainState
from virst_jax.training.uploads import METRICS, UploadedCheckpoints
from virst_jax.types import PyTree

if TYPE_CHECKING:
    from virst_jax.io.buckets import Place

METRIC = "j_and_f"  # what "best" means


class TrainCheckpoints:
    """Saves and restores a stage's state.

    Args:
      folder: made if it is not there.
      keep: latest checkpoints that are kept, beside the best one.
    """

    def __init__(self, folder: "Place", keep: int = 2):
        keepers = [
            policies.LatestN(n=keep),
            policies.BestN(get_metric_fn=lambda metrics: metrics[METRIC], n=1, keep_checkpoints_without_metrics=False),
        ]
        self.folder, kept = folder, policies.AnyPreservationPolicy(keepers)
        self.manager: ocp.CheckpointManager | UploadedCheckpoints
        if buckets.takes_orbax(folder):
            options = ocp.CheckpointManagerOptions(
                preservation_policy=kept, enable_async_checkpointing=True, create=True
            )
            self.manager = ocp.CheckpointManager(buckets.absolute(folder), options=options)
        else:
            self.manager = UploadedCheckpoints(folder, kept)

    def save(self, state: TrainState, score: float | None = None, wait: bool = False) -> None:
        """Begins to save; the write goes on in the background, `state` may be donated at once.

        Args:
          score: by which the best checkpoint is found; None: unknown.
          wait: until it is written.

        Raises:
          UserError: the disk is full or the folder cannot be written.
        """
        step = int(state.step)
        try:
            if step in self.manager.all_steps():
                return
            self.manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(_saved(state))),
                metrics=None if score is None else {METRIC: score},
                force=True,
            )
        except (OSError, ValueError) as error:
            raise _unwritable(self.folder, error) from error
        if wait:
            self.wait()

    def latest_step(self) -> int | None:
        """The step of the latest whole checkpoint; None: there is none."""
        return self.manager.latest_step()

    def restore(self, step: int, abstract: TrainState, frozen: PyTree) -> TrainState:
        """The checkpoint of a step.

        Args:
          abstract: ShapeDtypeStructs with the shardings to restore to.
          frozen: the frozen parameters.

        Raises:
          UserError: the checkpoint is broken, or of another recipe.
        """
        target = _saved(abstract)
        try:
            stored = self._shapes(step)
            if (differ := _difference(stored, target)) is None:
                arguments = ocp.args.Composite(state=ocp.args.StandardRestore(target))
                restored = self.manager.restore(step, args=arguments)["state"]
                return TrainState(frozen=frozen, **{"ema": None, **restored})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._broken(step, error) from error
        raise UserError(
            f"{self.folder / str(step)}: this checkpoint is of another recipe ({differ}); go on with the recipe that "
            "it was made by, or choose another --workdir"
        )

    def score(self, step: int) -> float | None:
        """The score of a checkpoint; None: without one, or no such checkpoint."""
        if step not in self.manager.all_steps():
            return None
        metrics = self.manager.metrics(step)
        return None if metrics is None else metrics.get(METRIC)

    def add_score(self, step: int, score: float) -> None:
        """Gives a score to a checkpoint that was saved before its evaluation, which may take long and be cut short.

        Raises:
          UserError: the disk is full or the folder cannot be written.
        """
        self.wait()
        try:
            if processes.is_main():
                item = self.folder / str(step) / METRICS
                item.mkdir(exist_ok=True)
                atomic.write_json(item / METRICS, {METRIC: score}, indent=None)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        processes.barrier("score")
        self.manager.reload()

    def wait(self) -> None:
        """Waits until what has begun to be saved is on the disk.

        Raises:
          UserError: the disk is full or the folder cannot be written.
        """
        try:
            self.manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise _unwritable(self.folder, error) from error

    def close(self) -> None:
        """Waits for what is being written."""
        try:
            self.manager.wait_until_finished()
            self.manager.close()
        except (OSError, ValueError) as error:
            raise _unwritable(self.folder, error) from error

    def _shapes(self, step: int) -> PyTree:
        folder = self.folder / str(step) / "state"
        if isinstance(self.manager, UploadedCheckpoints):
            folder = self.manager.fetch(step)
        with ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.metadata(buckets.absolute(folder)).item_metadata
        if stored is None:
            raise ValueError("it does not say what it holds")
        return stored.tree if hasattr(stored, "tree") else stored

    def _broken(self, step: int, error: Exception) -> UserError:
        earlier = [s for s in self.manager.all_steps() if s < step]
        then = f"go on from step {max(earlier)}" if earlier else "begin this stage again"
        return UserError(
            f"{self.folder / str(step)}: cannot go on from this checkpoint ({_reason(error)}); its files are damaged "
            f"or missing: bring them back, or remove this folder to {then}"
        )


def _saved(state: TrainState) -> dict[str, PyTree]:
    kept = {"step": state.step, "params": state.params, "opt_state": state.opt_state}
    return kept if state.ema is None else {**kept, "ema": state.ema}


def _difference(stored: PyTree, wanted: PyTree) -> str | None:
    """What differs first between the shapes of two trees of arrays."""
    trees = (jax.tree_util.tree_leaves_with_path(tree) for tree in (stored, wanted))
    have, want = ({_path(path): x.shape for path, x in tree} for tree in trees)
    for name in sorted(have.keys() | want.keys()):
        if name not in have:
            return f"{name} is not in it"
        if name not in want:
            return f"it holds {name}"
        if tuple(have[name]) != tuple(want[name]):
            return f"{name} {list(have[name])} in it, {list(want[name])} now"
    return None


def _path(keys: Any) -> str:
    # Orbax gives tuples and named tuples back as dicts
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _unwritable(folder: "Place", error: Exception) -> UserError:
    return UserError(
        f"{folder}: cannot be written ({_reason(error)}); free disk space or check the folder, and run it again"
    )
