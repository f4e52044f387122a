"""Gathers parameters on disk while they are assembled, and writes them with Orbax: together they may exceed memory."""

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from virst_jax.io import model_folder
from virst_jax.models.tree import flatten, unflatten

from .assemble import assemble
from .rules import Target
from .samples import Samples

DTYPES = ("bfloat16", "float32", "source")
SCRATCH = "scratch"


@dataclass(frozen=True)
class Converted:
    """What a conversion tells of itself."""

    name: str
    checked: int  # values that were read again from the new folder, and are those of the sources
    digest: str  # of these values: equal conversions have equal ones
    warnings: tuple[str, ...] = ()


def stored_dtype(dtype: str, keep_float32: str) -> Callable[[str, np.dtype], np.dtype]:
    """How a parameter is stored, from its path and the dtype of its source.

    Args:
      dtype: one of DTYPES.
      keep_float32: beginning of paths that stay float32 unless `dtype` is "source".
    """

    def store(path: str, given: np.dtype) -> np.dtype:
        if dtype == "source":
            return given
        return np.dtype("float32" if path.startswith(keep_float32) else dtype)

    return store


def write_assembled(
    folder: Path,
    table: Mapping[str, Target],
    names: Collection[str],
    read: Callable[[str], np.ndarray],
    *,
    where: str,
    shapes: Mapping[str, tuple[int, ...]],
    store: Callable[[str, np.dtype], np.dtype],
    more: Mapping[str, Any] | None = None,
    describe: Callable[[Mapping[str, Any]], None] = lambda params: None,
    progress: bool = True,
) -> Samples:
    """Writes FOLDER/params from named tensors.

    Args:
      table, names, read, where: as in `assemble`.
      shapes: of the whole tree.
      store: as `stored_dtype` makes.
      more: parameters to write besides.
      describe: called with all parameters once they are written.

    Returns:
      Values to find again in what was written.

    Raises:
      UserError: as `assemble`.
    """
    samples = Samples()
    with (
        scratch_arrays(folder / SCRATCH) as allocate,
        tqdm(total=len(names), unit="tensor", desc="reading", disable=not progress) as bar,
    ):

        def counted(name: str) -> np.ndarray:
            bar.update()
            return read(name)

        params = assemble(
            table,
            names,
            counted,
            where=where,
            expected=shapes,
            dtype=store,
            allocate=allocate,
            on_value=samples.add,
        )
        besides = {path: x.astype(store(path, np.dtype(x.dtype))) for path, x in flatten(more or {}).items()}
        for path, value in besides.items():
            samples.add(path, None, value, value.dtype)
        bar.set_description("writing")
        bar.refresh()
        params |= unflatten(besides)
        model_folder.write_parameters(folder / model_folder.PARAMS, params)
        describe(params)
        del params
    return samples


@contextmanager
def scratch_arrays(folder: Path) -> Iterator[Callable[[str, tuple[int, ...], np.dtype], np.ndarray]]:
    """Makes arrays that lie in files of a folder, which is removed at the end."""
    folder.mkdir()

    def allocate(path: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        if not shape or 0 in shape:
            return np.empty(shape, dtype)
        raw = np.dtype(f"u{dtype.itemsize}")  # memory maps of bfloat16 cannot be made directly
        return np.memmap(folder / path.replace("/", "."), raw, mode="w+", shape=shape).view(dtype)

    yield allocate
    shutil.rmtree(folder)
