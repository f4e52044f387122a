"""Checkpoints of a training run: Orbax, asynchronous; the latest ones and the best are kept.

WORKDIR/STAGE/checkpoints/STEP/{state,<data>...}   trained parameters, optimizer, average and step; data iterators

The frozen parameters are not among them: they come from where the run started. All that is drawn follows from the
seed and the step, so no generator's state has to be kept.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from virst_jax.errors import UserError
from virst_jax.training.step import TrainState

METRIC = "j_and_f"  # what "best" means


class TrainCheckpoints:
    """Saves and restores a stage's state with its data iterators.

    Args:
      folder: made if it is not there.
      keep: latest checkpoints that are kept, beside the best one.
    """

    def __init__(self, folder: Path, keep: int = 2):
        keepers = [
            policies.LatestN(n=keep),
            policies.BestN(get_metric_fn=lambda metrics: metrics[METRIC], n=1, keep_checkpoints_without_metrics=False),
        ]
        self.folder = folder
        self.manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keepers),
                enable_async_checkpointing=True,
                create=True,
            ),
        )

    def save(
        self,
        state: TrainState,
        iterators: Mapping[str, grain.DatasetIterator],
        score: float | None = None,
        wait: bool = False,
    ) -> None:
        """Begins to save; the write goes on in the background, `state` may be donated at once.

        Raises:
          UserError: the disk is full or the folder cannot be written.
        """
        step = int(state.step)
        try:
            if step in self.manager.all_steps():
                return
            items = {name: grain.checkpoint.CheckpointSave(it) for name, it in iterators.items()}
            self.manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(_saved(state)), **items),
                metrics=None if score is None else {METRIC: score},
                force=True,
            )
            if wait:
                self.manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise _unwritable(self.folder, error) from error

    def restore(self, state: TrainState, iterators: Mapping[str, grain.DatasetIterator]) -> TrainState | None:
        """The latest whole checkpoint, on the mesh of `state`; the iterators are set where they stood.

        Args:
          state: arrays or ShapeDtypeStructs with shardings; its frozen parameters are kept.

        Returns:
          None where there is no checkpoint yet.

        Raises:
          UserError: the checkpoint is broken, or of another recipe.
        """
        step = self.manager.latest_step()
        if step is None:
            return None
        where = self.folder / str(step)
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _saved(state))
        items = {name: grain.checkpoint.CheckpointRestore(it) for name, it in iterators.items()}
        try:
            restored = self.manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target), **items)
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{where}: cannot go on from this checkpoint ({reason}); it is broken or of another recipe: use "
                "another --workdir, or remove this folder to go on from the one before"
            ) from error
        return dataclasses.replace(state, **restored["state"])

    def close(self) -> None:
        """Waits for what is being written."""
        try:
            self.manager.wait_until_finished()
            self.manager.close()
        except (OSError, ValueError) as error:
            raise _unwritable(self.folder, error) from error


def _saved(state: TrainState) -> dict[str, Any]:
    kept = {"step": state.step, "params": state.params, "opt_state": state.opt_state}
    return kept if state.ema is None else {**kept, "ema": state.ema}


def _unwritable(folder: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(f"{folder}: cannot be written ({reason}); free disk space or check the folder, and run it again")
