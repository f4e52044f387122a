"""Writes a parity case, NAME.json and NAME.npz, whole or not at all; and compares two cases' arrays."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from virst_jax.errors import UserError
from virst_jax.io import atomic
from virst_jax.io.npz import read_npz

PREFIX = "e2e_"  # a kind of case is known by its name


def check_place(folder: Path, name: str) -> None:
    """Finds out before the long run whether the case can be written.

    Raises:
      UserError: the name is not one of an end-to-end case, or the case is there already.
    """
    if not re.fullmatch(PREFIX + r"[A-Za-z0-9_.-]+", name):
        raise UserError(f"--name {name!r}: give letters, digits, '_', '-' and '.' after {PREFIX!r}, say e2e_dog")
    above = folder
    while not above.exists():
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"{folder}: cannot be written to; give another folder of cases as --out")
    for path in _paths(folder, name):
        if path.exists():
            raise UserError(f"{path}: the case is there already; choose another --name, or remove it")


def write_case(
    folder: Path, name: str, facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> tuple[Path, Path]:
    """Writes both files whole, the JSON last: a case with a JSON is complete.

    Raises:
      UserError: the case is there already, or the folder cannot be written.
    """
    check_place(folder, name)
    as_json, as_npz = _paths(folder, name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise atomic.cannot_write(folder, error) from error
    atomic.write_npz(as_npz, arrays, compressed=True)
    try:
        atomic.write_json(as_json, facts)
    except BaseException:
        as_npz.unlink(missing_ok=True)
        raise
    return as_json, as_npz


def differences(
    arrays: Mapping[str, np.ndarray],
    strides: Mapping[str, list[int]],
    other: Path,
    other_strides: Mapping[str, list[int]],
) -> dict[str, float]:
    """Largest difference of each array that both cases hold alike, relative to the other's largest value.

    Packed masks are compared as the share of pixels that differ. An array of another shape gives inf.
    Arrays that only one of the two holds, or that are thinned differently, are left out.
    """
    out: dict[str, float] = {}
    for name, their in read_npz(other, "copy the case again").items():
        told = name in strides and name in other_strides
        if name == "frames" or name not in arrays or (told and strides[name] != other_strides[name]):
            continue
        mine = arrays[name]
        if mine.shape != their.shape:
            out[name] = float("inf")
        elif name.endswith("_bits"):
            out[name] = float(np.mean(np.unpackbits(mine) != np.unpackbits(their)))
        else:
            scale = float(np.abs(their).max()) or 1.0
            out[name] = float(np.abs(mine.astype(np.float64) - their.astype(np.float64)).max()) / scale
    return out


def _paths(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / f"{name}.json", folder / f"{name}.npz"
