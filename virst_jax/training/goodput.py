"""A run's use of time, told to Google's ml-goodput-measurement, whose monitor charts it over restarts."""

import datetime
import time
from collections.abc import Mapping
from typing import Any

from virst_jax.errors import UserError
from virst_jax.training.time_use import CHECKPOINT, COMPILE, DATA, EVALUATION, STEPS

CUSTOM = {CHECKPOINT: "checkpoint", EVALUATION: "eval_step", "export": "export"}  # kinds of badput of our own


class Goodput:
    """What TimeUse tells, as the library's events. One object serves all stages of a run.

    Args:
      job: the run's name.
      store: in place of Google Cloud Logging, for tests.

    Raises:
      UserError: the library is missing, or there is no access to Google Cloud Logging.
    """

    def __init__(self, job: str, store: Any = None):
        try:
            from ml_goodput_measurement import goodput
        except ModuleNotFoundError as error:
            raise UserError(
                "ml-goodput-measurement is not installed; pip install 'virst-jax[goodput]', or leave goodput.job empty"
            ) from error
        try:
            self.recorder = goodput.GoodputRecorder(job, f"goodput_{job}", True, cloud_logger=store)
        except Exception as error:  # google.auth's, and what the network raises
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--config.goodput.job={job}: no access to Google Cloud Logging ({reason})") from error
        self.before = self.step = 0
        self.recorder.record_job_start_time()

    def go_on(self, step: int) -> None:
        """Counts steps from `step` of a stage on; `before` has those of the stages before it."""
        self.step = self.before + step

    def __call__(self, kind: str, start: float, end: float) -> None:
        """A listener of TimeUse, whose clock is time.perf_counter."""
        began, ended = _date(start), _date(end)
        if kind == DATA:
            self.recorder.record_data_loading_start_time(began)
            self.recorder.record_data_loading_end_time(ended)
            self.recorder.record_step_start_time(self.step, ended)  # a step follows every wait for data
            self.step += 1
        elif kind == "start":
            self.recorder.record_training_preparation_start_time(began)
            self.recorder.record_training_preparation_end_time(ended)
        elif kind in CUSTOM:
            self.recorder.record_custom_badput_event_start_time(began, CUSTOM[kind])
            self.recorder.record_custom_badput_event_end_time(ended, CUSTOM[kind])
        else:
            assert kind in (STEPS, COMPILE), kind

    def close(self) -> None:
        """Ends the job, and sends what is left."""
        self.recorder.record_job_end_time()
        self.recorder.flush()


def open_goodput(asked: Mapping[str, str]) -> Goodput | None:
    """What a recipe's `goodput` asks for; None: nothing."""
    return Goodput(asked["job"]) if asked.get("job") else None


def _date(clock: float) -> datetime.datetime:
    """The time of day of a reading of time.perf_counter."""
    ago = time.perf_counter() - clock
    return datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=ago)
