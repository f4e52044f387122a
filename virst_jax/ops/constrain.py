"""Where activations may be split: modules name logical axes, a mesh gives them a meaning.

Without rules in force, on one device, all of this does nothing.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

ACTIVATIONS = frozenset(
    {
        "width",  # residual stream, channels
        "heads",
        "hidden",  # units of an MLP
        "vocab",
    }
)

_rules: contextvars.ContextVar[Mapping[str, tuple[str, ...]] | None] = contextvars.ContextVar("rules", default=None)


@contextlib.contextmanager
def activation_rules(rules: Mapping[str, tuple[str, ...]]) -> Iterator[None]:
    """What is traced inside splits the axes of activations over mesh axes; needs a mesh set by jax.set_mesh.

    Args:
      rules: the mesh axes of every name in ACTIVATIONS; an empty tuple: not split.

    Raises:
      ValueError: a name is missing or unknown.
    """
    if set(rules) != ACTIVATIONS:
        raise ValueError(f"activation rules for {sorted(set(rules) ^ ACTIVATIONS)} are missing or unknown")
    token = _rules.set(dict(rules))
    try:
        yield
    finally:
        _rules.reset(token)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """x, split as the rules in force say; x itself where there are none.

    The compiler would otherwise let the weights decide: it splits the residual stream as they are split, and every
    device computes a slice of every row. Within jax.vmap the mapped axis has no name: give its mesh axes to vmap as
    `spmd_axis_name`.

    Args:
      x: dtype[...].
      axes: a name from ACTIVATIONS for every axis of x, which is split over that name's mesh axes if they divide it and
        else stays whole; None: the compiler decides.

    Raises:
      ValueError: an unknown name, or not one for every axis.
    """
    if len(axes) != x.ndim or not set(axes) <= ACTIVATIONS | {None}:
        raise ValueError(f"axes {axes} do not fit an array of shape {x.shape}; known are {sorted(ACTIVATIONS)}")
    rules = _rules.get()
    if rules is None:
        return x
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types)
    sizes = {name: size for name, size, kind in kinds if kind != AxisType.Manual}  # a device has its share of others
    if all(size == 1 for size in sizes.values()):
        return x
    spec: list[Any] = []
    for axis, length in zip(axes, x.shape):
        names = () if axis is None else tuple(name for name in rules[axis] if name in sizes)
        fits = names and length % math.prod(sizes[name] for name in names) == 0
        spec.append(PartitionSpec.UNCONSTRAINED if axis is None else names if fits else None)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))
