"""SAM 2.1 alone on disk: a folder with Orbax parameters and tracker.json, without language model and tokenizer.

TRACKER/params/       Orbax, one array a parameter of `Sam2`
TRACKER/tracker.json  the Sam2Config
"""

import functools
from collections.abc import Iterator
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from virst_jax.config import Compute, Sam2Config, kind_from_json
from virst_jax.errors import UserError
from virst_jax.io import model_folder
from virst_jax.models.sam2.sam2 import Sam2
from virst_jax.types import PyTree

CONFIG = "tracker.json"
FLOAT32 = "prompt_encoder/"  # as model_folder.FLOAT32


@functools.cache
def parameter_shapes(cfg: Sam2Config) -> PyTree:
    """Shape and dtype of every parameter, computing none: a tree of jax.ShapeDtypeStruct."""
    image = jnp.zeros((cfg.image_size, cfg.image_size, 3))
    boxed = jax.eval_shape(lambda: Sam2(cfg, Compute()).init(jax.random.key(0), image))["params"]
    return nn.meta.unbox(boxed)


def read_config(path: str | Path) -> Sam2Config:
    """The config of a tracker's folder.

    Raises:
      UserError: no such folder, or a broken config.
    """
    file = Path(path) / CONFIG
    try:
        return kind_from_json(Sam2Config, file.read_text(), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: no tracker (cannot read {CONFIG}); give a folder that `virst convert --sam2` wrote"
        ) from error


def read_parameters(path: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """All parameters as stored, one after another, by path. Raises UserError: broken."""
    folder = (Path(path) / model_folder.PARAMS).absolute()
    yield from model_folder.read_arrays(folder, model_folder.stored_arrays(folder, parameter_shapes(read_config(path))))


def load_tracker(path: str | Path, dtype: str | None = None, shardings: PyTree = None) -> tuple[Sam2Config, PyTree]:
    """Reads a tracker's folder.

    Args:
      dtype: of the parameters, but of those under FLOAT32, which keep theirs; None: as stored.
      shardings: a tree of jax.sharding.Sharding like the parameters; None: the first device of this process.

    Returns:
      The config and the parameters of `Sam2`.

    Raises:
      UserError: no such folder, a broken one, or parameters that do not fit its config.
    """
    cfg = read_config(path)
    folder = (Path(path) / model_folder.PARAMS).absolute()
    stored = model_folder.stored_arrays(folder, parameter_shapes(cfg))
    return cfg, model_folder.load_arrays(folder, model_folder.array_target(stored, dtype, shardings, FLOAT32))
