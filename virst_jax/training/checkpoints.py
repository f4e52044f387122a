"""Checkpoints of a training run: Orbax, asynchronous; the latest ones and the best are kept.

WORKDIR/STAGE/checkpoints/STEP/state   trained parameters, optimizer, average and step

The frozen parameters are not among them: they come from where the run started. All that is drawn, and the position in
the data, follows from the seed and the step, so neither a generator's nor a data iterator's state has to be kept.
"""

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from virst_jax.errors import UserError
from virst_jax.training.step import TrainState

METRIC = "j_and_f"  # what "best" means


class TrainCheckpoints:
    """Saves and restores a stage's state.

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
            if wait:
                self.manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise _unwritable(self.folder, error) from error

    def latest_step(self) -> int | None:
        """The step of the latest whole checkpoint; None: there is none."""
        return self.manager.latest_step()

    def restore(self, step: int, abstract: TrainState, frozen: Any) -> TrainState:
        """The checkpoint of a step.

        Args:
          abstract: ShapeDtypeStructs with the shardings to restore to.
          frozen: the frozen parameters.

        Raises:
          UserError: the checkpoint is broken, or of another recipe.
        """
        where = self.folder / str(step)
        try:
            restored = self.manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(_saved(abstract)))
            )["state"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{where}: cannot go on from this checkpoint ({reason}); it is broken or of another recipe: use "
                "another --workdir, or remove this folder to go on from the one before"
            ) from error
        return TrainState(frozen=frozen, **{"ema": None, **restored})

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
