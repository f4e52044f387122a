"""Digests of a model folder: one of each parameter's values, and one of each small file. A flipped bit does not pass.

MODEL/digests.json   {"tensors": {name: digest}, "files": {path: digest}}, BLAKE2b of 16 bytes in hexadecimal digits

The digest of a parameter is of its values as they were in memory, with dtype and shape: it does not depend on how Orbax
lays them out.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import numpy as np

from virst_jax.errors import UserError
from virst_jax.io import atomic, buckets, regular

if TYPE_CHECKING:
    import jax

    from virst_jax.io.buckets import Place

FILE = "digests.json"
AGAIN = "convert or copy the model again"
SMALL = 4 << 20  # larger files hold parameters, whose values are checked
THREADS = min(4, os.cpu_count() or 1)  # hashlib lets others run meanwhile; each holds a parameter
_SIZE = 16
_SKIPPED = (".part", ".lock")


@dataclass(frozen=True)
class Digests:
    """What a digests.json holds: names of parameters, keys joined by "/", and paths below the folder."""

    tensors: Mapping[str, str]
    files: Mapping[str, str]


def of_tensor(value: np.ndarray | jax.Array) -> str:
    """The digest of an array on the host or on a device."""
    array = np.asarray(value)
    digest = hashlib.blake2b(f"{array.dtype.name}{list(array.shape)}".encode(), digest_size=_SIZE)
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def of_file(path: Place) -> str:
    """The digest of a file's bytes."""
    digest = hashlib.blake2b(digest_size=_SIZE)
    regular.require_file(path, AGAIN)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def of_tensors(values: Iterable[tuple[str, np.ndarray | jax.Array]]) -> Iterator[tuple[str, str]]:
    """Names and digests of parameters, by several threads; a few values are held at a time."""
    with ThreadPoolExecutor(THREADS, thread_name_prefix="digest") as pool:
        waiting: list[tuple[str, Future[str]]] = []
        for name, value in values:
            waiting.append((name, pool.submit(of_tensor, value)))
            if len(waiting) > THREADS:
                first, digest = waiting.pop(0)
                yield first, digest.result()
        for name, digest in waiting:
            yield name, digest.result()


def write(folder: Place, tensors: Iterable[tuple[str, np.ndarray | jax.Array]], parts: Iterable[str]) -> None:
    """Writes digests.json.

    Args:
      tensors: names and values of all parameters.
      parts: files and folders in `folder` that belong to the model.
    """
    found = dict(of_tensors(tensors))
    atomic.write_json(
        folder / FILE, {"tensors": found, "files": {n: of_file(folder / n) for n in _files(folder, parts)}}
    )


def read(folder: str | PurePath) -> Digests | None:
    """The digests of a model folder; None of one that was written before there were any.

    Raises:
      UserError: the file is damaged.
    """
    path = Path(folder) / FILE
    try:
        if not os.path.lexists(path):
            return None
        content = json.loads(regular.read_text(path, AGAIN))
        tensors, files = content["tensors"], content["files"]
        if not all(isinstance(x, str) for part in (tensors, files) for pair in part.items() for x in pair):
            raise ValueError("not digests")
        return Digests(tensors, files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({atomic.reason(error)}); {AGAIN}") from error


def check_files(folder: str | PurePath, stated: Digests, limit: int | None = SMALL) -> int:
    """Compares files with their digests, those of at most `limit` bytes; gives how many.

    Raises:
      UserError: one is missing or has changed.
    """
    count = 0
    for name, digest in stated.files.items():
        path = Path(folder) / name
        if ".." in path.parts or Path(name).is_absolute():
            raise UserError(f"{Path(folder) / FILE}: names {name!r}, which is not in the folder; copy the model again")
        try:
            if limit is not None and regular.require_file(path, AGAIN) > limit:
                continue
            found = of_file(path)
        except OSError as error:
            raise UserError(f"{path}: missing or unreadable ({atomic.reason(error)}); copy the model again") from error
        if found != digest:
            raise UserError(
                f"{path}: is not as it was saved: damaged or edited; convert or copy the model again "
                f"(if you edited it, remove {FILE})"
            )
        count += 1
    return count


def check_tensors(
    folder: str | PurePath, stated: Digests, tensors: Iterable[tuple[str, np.ndarray | jax.Array]]
) -> int:
    """Compares parameters with their digests; gives how many.

    Raises:
      UserError: values have changed.
    """
    count, wrong = 0, []
    for name, digest in of_tensors(tensors):
        count += 1
        if stated.tensors.get(name) != digest:
            wrong.append(name)
    if wrong:
        what = "a parameter is" if len(wrong) == 1 else f"{len(wrong)} parameters are"
        raise UserError(f"{folder}: {what} not as saved, first {wrong[0]}: damaged; convert or copy the model again")
    return count


def _files(folder: Place, parts: Iterable[str]) -> list[str]:
    found: list[Place] = []
    for part in parts:
        path = folder / part
        found += [path] if path.is_file() else buckets.files_below(path)
    return sorted(p.relative_to(folder).as_posix() for p in found if not p.name.endswith(_SKIPPED))
