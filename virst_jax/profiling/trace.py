"""Traces of training steps, for xprof and TensorBoard's profiler."""

from pathlib import Path

import jax

from virst_jax.types import PyTree

MEMORY = "memory.prof"  # of the devices, for pprof


class Trace:
    """Traces some steps of a stage with JAX's profiler, in every process on its own host.

    Args:
      folder: plugins/profile/DATE/HOST.xplane.pb and memory.prof are written below it.
      first: how many steps are done before the trace begins; the very first ones compile.
      steps: how many are traced; 0: none.
    """

    def __init__(self, folder: Path, first: int, steps: int):
        self.folder, self.first, self.steps = folder, first, steps
        self.running = False

    def before(self, done: int) -> None:
        """Begins the trace, if `done` steps of this run are those to leave out."""
        if self.steps and done == self.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self.folder))
            self.running = True

    def after(self, done: int, state: PyTree) -> None:
        """Ends the trace after its last step, once the devices have finished it.

        Args:
          done: steps of this run.
          state: what the step gives.
        """
        if self.running and done >= self.first + self.steps:
            jax.block_until_ready(state)
            jax.profiler.save_device_memory_profile(str(self.folder / MEMORY))
            self.close()

    def close(self) -> None:
        """Ends a trace that is still running."""
        if self.running:
            self.running = False
            jax.profiler.stop_trace()
