"""train.py on one, two or four processes, which have four devices together, so that the mesh is the same."""

import os
import time
from pathlib import Path

import jax
import numpy as np

from helpers.process_cases import Group
from helpers.train_cases import SMALL, command, losses
from virst_jax.api import EMBEDDED
from virst_jax.config import override, tiny
from virst_jax.io import model_folder

DEVICES = 4
STOPPED = 130  # exit status
ENDED = "interrupted; run the same command to go on"
# some parameters are split over the devices of two processes, and over those of four
MESH = ("--config.mesh.data=2", "--config.mesh.fsdp=2")


def start_model(folder: Path) -> Path:
    """A model folder to start from: quicker than to compile the drawing of random parameters."""
    cfg = override(tiny(), SMALL, "overrides")
    rng = np.random.default_rng(0)
    shapes = model_folder.parameter_shapes(cfg)
    params = jax.tree.map(lambda x: np.asarray(0.05 * rng.standard_normal(x.shape), np.float32), shapes)
    model_folder.save_model(folder, cfg, params, EMBEDDED["tiny"] / model_folder.TOKENIZER)
    return folder


def training(workdir: Path, start: Path, count: int, *flags: str, kind: str = "image_text", steps: int = 6) -> Group:
    """`count` processes that train at `workdir`."""
    given = [*MESH, *flags, f"--config.model.init={start}", f"--config.stage.steps={steps}"]
    given += ["--config.stage.data.shapes.batch_size=4"]
    given += ["--config.distributed=True"] if count > 1 else []
    arguments = command(workdir, *given, config=f"tests/helpers/train_cases.py:{kind}")[1:]
    logs = workdir.with_name(f"{workdir.name}_logs_{time.monotonic_ns()}")
    # one of JAX's own would be used by all tests; each number of processes has programs of its own
    cache = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", str(start.parent / "compiled")))
    return Group(
        logs,
        count,
        arguments,
        devices=DEVICES // count,
        JAX_COMPILATION_CACHE_DIR=str(cache),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
    )


def complete(
    workdir: Path,
    start: Path,
    count: int,
    *flags: str,
    kind: str = "image_text",
    steps: int = 6,
    seconds: float = 600,
) -> None:
    """Trains to the end."""
    with training(workdir, start, count, *flags, kind=kind, steps=steps) as group:
        assert group.wait(seconds) == [0] * count, group.outputs()
    assert model_folder.is_whole(workdir / "stage" / "model")


def checkpoints(workdir: Path) -> list[int]:
    """Steps of the whole checkpoints."""
    folder = workdir / "stage" / "checkpoints"
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()) if folder.is_dir() else []


def largest_difference(workdir: Path, expected: dict[int, str]) -> float:
    """Of a run's losses from those of another, relative; the steps must be the same."""
    found = losses(workdir)
    assert list(found) == list(expected)
    return max(abs(float(found[step]) / float(loss) - 1) for step, loss in expected.items())
