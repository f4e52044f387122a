"""Builds our parameter tree from named tensors of the release, and takes it apart again."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from virst_jax.errors import UserError
from virst_jax.models.tree import unflatten

from .names import listing, nearest
from .rules import TRANSFORMS, Target

Allocate = Callable[[str, tuple[int, ...], np.dtype], np.ndarray]


def assemble(
    table: Mapping[str, Target],
    names: Iterable[str],
    read: Callable[[str], np.ndarray],
    *,
    where: str,
    partial: bool = False,
    expected: Mapping[str, tuple[int, ...]] | None = None,
    dtype: Callable[[str, np.dtype], np.dtype] = lambda path, given: given,
    allocate: Allocate = lambda path, shape, dtype: np.empty(shape, dtype),
    on_value: Callable[[str, int | None, np.ndarray, np.dtype], None] = lambda path, slot, value, dtype: None,
) -> dict[str, Any]:
    """Fills a parameter tree; every name is used once and every place filled once.

    Args:
      table: from `rules.rule_table`.
      names: of the tensors at hand.
      read: gives one of them; it is called once a name.
      where: named in errors.
      partial: names may be missing, but not slots of a stacked target.
      expected: shapes of the whole tree by path; a tensor of another shape raises.
      dtype: (path, dtype of the tensor) -> dtype to store.
      allocate: where the tree lies.
      on_value: called with every tensor in our layout: its path, its slot of a stacked target, its values, and
        the dtype in which they are stored.

    Raises:
      UserError: unknown or missing names, or a wrong shape; lists the names, with the nearest known ones.
    """
    names = list(names)
    unknown = [name for name in names if name not in table]
    missing = set(table) - set(names)
    if unknown:
        raise UserError(
            f"{where}: {len(unknown)} names belong to no parameter of this config: {listing(unknown)}"
            f"{nearest(unknown, missing or table)}"
        )
    if missing and not partial:
        raise UserError(f"{where}: {len(missing)} parameters are missing: {listing(missing)}")
    slots: dict[str, list[int | None]] = {}
    for name in names:
        slots.setdefault(table[name].path, []).append(table[name].slot)
    for path, filled in slots.items():
        if filled != [None] and sorted(s for s in filled if s is not None) != list(range(len(filled))):
            raise UserError(f"{where}: {path} has gaps or repeats among its layers: {filled}")

    flat: dict[str, np.ndarray] = {}
    for name in names:
        target = table[name]
        try:
            value = TRANSFORMS[target.transform].to_jax(read(name))
        except (ValueError, IndexError) as error:
            raise UserError(
                f"{where}: {name} has a shape that cannot be right ({error}; rule: {target.transform} to {target.path})"
            ) from error
        shape = value.shape if target.slot is None else (len(slots[target.path]), *value.shape)
        if expected is not None and expected[target.path] != shape:
            raise UserError(
                f"{where}: {name} gives {target.path} the shape {list(shape)} (rule: {target.transform}), but the "
                f"config asks for {list(expected[target.path])}: choose the config that the checkpoint was trained with"
            )
        if target.path not in flat:
            flat[target.path] = allocate(target.path, shape, dtype(target.path, value.dtype))
        whole = flat[target.path]
        if whole.shape != shape:
            raise UserError(f"{where}: {name} has another shape than its sister layers")
        _copy(whole if target.slot is None else whole[target.slot], value)
        on_value(target.path, target.slot, value, whole.dtype)
    return unflatten(flat)


def _copy(target: np.ndarray, value: np.ndarray, block: int = 512) -> None:
    """target[...] = value, fast where that means to transpose a big matrix."""
    if target.dtype != value.dtype:
        value = value.astype(target.dtype)
    if value.ndim != 2 or value.flags.c_contiguous:
        target[...] = value
        return
    # numpy copies bfloat16 value by value, and a whole transposed matrix against the cache
    raw = np.dtype(f"u{value.itemsize}")
    source, sink = value.view(raw), target.view(raw)
    for i in range(0, value.shape[0], block):
        for j in range(0, value.shape[1], block):
            sink[i : i + block, j : j + block] = source[i : i + block, j : j + block]


def take_apart(
    table: Mapping[str, Target], parameters: Iterable[tuple[str, Any]]
) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """The release's names of a parameter tree, each with a function that gives its tensor in the release's layout.

    Args:
      parameters: path and value of each; taken one by one, so that they need not all be held.
    """
    by_path: dict[str, list[str]] = {}
    for name, target in table.items():
        by_path.setdefault(target.path, []).append(name)
    for path, value in parameters:
        whole = np.asarray(value)
        for name in by_path[path]:

            def tensor(target: Target = table[name], whole: np.ndarray = whole) -> np.ndarray:
                part = whole if target.slot is None else whole[target.slot]
                return np.require(TRANSFORMS[target.transform].to_torch(part), requirements="C")

            yield name, tensor
