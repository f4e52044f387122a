"""SAM 2.1 alone on disk: a folder with Orbax parameters and tracker.json, without language model and tokenizer.

TRACKER/params/       Orbax, one array a parameter of `Sam2`
TRACKER/tracker.json  the Sam2Config
TRACKER/digests.json  of parameters and files, compared when they are loaded; older folders have none
"""

import functools
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from virst_jax.config import Compute, Sam2Config, kind_from_json, to_json
from virst_jax.errors import UserError
from virst_jax.io import atomic, buckets, digests, model_folder, regular
from virst_jax.models.sam2.sam2 import Sam2
from virst_jax.types import Params, PyTree

if TYPE_CHECKING:
    from virst_jax.io.buckets import Place

CONFIG = "tracker.json"
FLOAT32 = "prompt_encoder/"  # as model_folder.FLOAT32


@functools.cache
def parameter_shapes(cfg: Sam2Config) -> PyTree:
    """Shape and dtype of every parameter, computing none: a tree of jax.ShapeDtypeStruct."""
    image = jnp.zeros((cfg.image_size, cfg.image_size, 3))
    boxed = jax.eval_shape(lambda: Sam2(cfg, Compute()).init(jax.random.key(0), image))["params"]
    return nn.meta.unbox(boxed)


def is_tracker(path: str | Path) -> bool:
    """Whether a folder holds SAM 2.1 alone."""
    return (Path(path) / CONFIG).is_file() and not (Path(path) / model_folder.CONFIG).is_file()


def read_config(path: str | PurePath) -> Sam2Config:
    """The config of a tracker's folder.

    Raises:
      UserError: no such folder, or a broken config.
    """
    file = buckets.place(path) / CONFIG
    if not file.is_file():
        raise UserError(f"{path}: no tracker ({CONFIG} is missing); give a folder that `virst convert --sam2` wrote")
    return kind_from_json(Sam2Config, regular.read_text(file, digests.AGAIN), str(file))


def save_tracker(path: "Place", cfg: Sam2Config, params: Params) -> None:
    """As `model_folder.save_model`, of a tracker.

    Raises:
      UserError: the folder exists or cannot be written.
    """
    model_folder.save_folder(path, params, lambda part, written: write_description(part, cfg, written))


def write_description(folder: "Place", cfg: Sam2Config, params: Params | None) -> None:
    """Writes what a folder needs beside the parameters: tracker.json and, last, digests.json.

    params: what was written; None: it is read from the folder.
    """
    atomic.write_text(folder / CONFIG, to_json(cfg))
    tensors = read_parameters(folder) if params is None else model_folder.named(params)
    digests.write(folder, tensors, (CONFIG, model_folder.PARAMS))


def stored_shapes(path: str | PurePath) -> tuple[Sam2Config, PyTree]:
    """As `model_folder.stored_shapes`."""
    return model_folder.stored_of(path, read_config(path), parameter_shapes, CONFIG)


def read_parameters(path: str | PurePath) -> Iterator[tuple[str, np.ndarray]]:
    """All parameters as stored, one after another, by path. Raises UserError: broken."""
    _, stored = stored_shapes(path)
    yield from model_folder.read_arrays(buckets.absolute(buckets.place(path) / model_folder.PARAMS), stored)


def check_tracker(path: str | Path) -> tuple[int, int] | None:
    """As `model_folder.check_folder`, of a tracker's folder."""
    return model_folder.check_folder(path, read_parameters(path))


def load_tracker(
    path: str | Path, dtype: str | None = None, shardings: PyTree = None, *, check: bool = True
) -> tuple[Sam2Config, PyTree]:
    """Reads a tracker's folder.

    Args:
      dtype: of the parameters, but of those under FLOAT32, which keep theirs; None: as stored.
      shardings: a tree of jax.sharding.Sharding like the parameters; None: the first device of this process.
      check: as of `model_folder.load_model`.

    Returns:
      The config and the parameters of `Sam2`.

    Raises:
      UserError: no such folder, a broken or damaged one, or parameters that do not fit its config.
    """
    cfg, stored = stored_shapes(path)
    return cfg, model_folder.load_parameters(path, stored, dtype, shardings, FLOAT32, check=check)
