"""Metrics of a run to Weights & Biases or trackio, as a recipe's `tracking` asks."""

import importlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from virst_jax.errors import UserError
from virst_jax.io import atomic, buckets

if TYPE_CHECKING:
    from virst_jax.io.buckets import Place

SERVICES = {"wandb": "'virst-jax[tracking]'", "trackio": "trackio"}  # and what pip installs
ID = "tracking_id"  # file of a stage's folder


class Tracker:
    """A run of a tracking service. A stage that goes on in the same folder goes on in the same run.

    Steps that a killed run had taken, and that are taken again, appear in the service twice.
    """

    def __init__(self, service: Any, name: str):
        self.service, self.name = service, name

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        if self.name == "trackio":
            self.service.log(dict(scalars), step=step)
        else:  # its own steps only rise, but those after a checkpoint are taken again
            self.service.log({"step": step, **scalars})

    def close(self) -> None:
        self.service.finish()


def open_tracker(asked: Mapping[str, str], folder: "Place", config: Mapping[str, Any]) -> Tracker | None:
    """The tracker that a recipe asks for; None: none.

    Args:
      asked: the recipe's `tracking`.
      folder: the stage's.
      config: what is shown as the run's settings.

    Raises:
      UserError: an unknown service, one that is not installed, or one that refuses.
    """
    name = asked.get("to", "")
    if not name:
        return None
    if name not in SERVICES:
        raise UserError(f"--config.tracking.to={name}: unknown; give {' or '.join(SERVICES)}")
    try:
        service = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; pip install {SERVICES[name]}") from error
    run, project = _identity(folder), asked.get("project") or "virst"
    label = f"{folder.parent.name}-{folder.name}"
    options: dict[str, Any] = {"project": project, "config": dict(config), "resume": "allow"}
    if name == "wandb":
        options |= {"name": label, "id": run}
        if "WANDB_DIR" not in os.environ and isinstance(folder, Path):
            options["dir"] = str(folder)
    else:
        options["name"] = f"{label}-{run}"  # by which a run is resumed
    try:
        started = service.init(**options)
        if name == "wandb":
            started.define_metric("*", step_metric="step")
    except Exception as error:  # each service has errors of its own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--config.tracking.to={name}: it does not start ({reason})") from error
    return Tracker(service, name)


def _identity(folder: "Place") -> str:
    """The run's name at the service, kept in the folder."""
    file = folder / ID
    if file.exists() and (kept := file.read_text().strip()).isalnum():
        return kept
    made = secrets.token_hex(4)
    if not buckets.is_bucket(folder):
        folder.mkdir(parents=True, exist_ok=True)
    atomic.write_text(file, made + "\n")
    return made
