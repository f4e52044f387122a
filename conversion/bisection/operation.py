"""One operation of the network with its named inputs and outputs, and how far its outputs may be from another's.

Tensors have the names of docs/parity.md, one item of a batch first and channels last.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray
Outputs = tuple[Any, ...]

# An operation's rounding errors are as large as what one rounding of every input and parameter does to its output,
# times the square root of how many roundings follow each other: about 16 between two recorded tensors. Two programs
# both have them.
MARGIN = 8.0
TRIALS = 4  # of such roundings: one alone may leave a single number where it is


@dataclass(frozen=True)
class Operation:
    """A step of the computation.

    Attributes:
      name: "stage / part", as the table shows it.
      inputs: names of the tensors that it takes.
      outputs: names of those that it gives; an operation may give a tensor that another has given before it, by
        another way.
      run: of the parameters and the inputs; a tuple as long as `outputs`.
      params: trees of arrays.
      whole: of a stage that is computed at once after it was walked in parts: what the parts' names begin with.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    run: Callable[..., Outputs]
    params: Any = None
    whole: str = ""


def relative_error(ours: Any, theirs: Any) -> float:
    """L2 norm of the difference over that of `theirs`; infinite for another shape, for integers that differ, or NaN."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    if ours.shape != theirs.shape:
        return float("inf")
    if np.issubdtype(theirs.dtype, np.integer) or theirs.dtype == bool:
        return 0.0 if np.array_equal(ours, theirs) else float("inf")
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    error, norm = float(np.linalg.norm(ours - theirs)), float(np.linalg.norm(theirs))
    if not np.isfinite(error):
        return float("inf")
    return error / norm if norm else error


def epsilon(*dtypes: str) -> float:
    """The distance from 1 to the next number in the coarsest of some float types."""
    return max(float(jnp.finfo(jnp.dtype(dtype)).eps) for dtype in dtypes)


def jitter(tree: Any, size: float, seed: int) -> Any:
    """Every float of a tree times 1 + size or 1 - size, by chance; integers as they are."""
    random = np.random.default_rng(seed)

    def change(x: Any) -> Any:
        values = np.asarray(x)
        if not jnp.issubdtype(values.dtype, jnp.floating):
            return x
        signs = random.integers(0, 2, values.shape, np.int8) * np.float32(2) - 1
        changed = values.astype(np.float32) * (1 + np.float32(size) * signs)
        return changed if values.dtype.name in ("float32", "float64") else jnp.asarray(changed, values.dtype)

    return jax.tree.map(change, tree)


def explained(operation: Operation, inputs: Sequence[Array], outputs: Outputs, eps: float) -> list[float]:
    """The relative error of each output that rounding explains, where two programs compute it from the same inputs."""
    largest = [eps] * len(outputs)
    for seed in range(TRIALS):
        params, changed = jitter((operation.params, list(inputs)), eps, seed)
        moved = operation.run(params, *changed)
        largest = [max(x, relative_error(a, b)) for x, a, b in zip(largest, moved, outputs, strict=True)]
    return [MARGIN * x for x in largest]


def conditioning(operation: Operation, inputs: Sequence[Array], outputs: Outputs, eps: float) -> float | None:
    """By how much an operation magnifies a small relative error of its inputs; None without inputs."""
    if not inputs:
        return None
    size = 64 * eps
    moved = operation.run(operation.params, *jitter(list(inputs), size, seed=1))
    return max(relative_error(a, b) for a, b in zip(moved, outputs, strict=True)) / size


def apply(module: nn.Module, params: Any, *args: Any, **kwargs: Any) -> Any:
    """A module applied with its parameters."""
    return module.apply({"params": params}, *args, **kwargs)


def layer_of(params: Mapping[str, Any], index: int | None) -> Any:
    """One layer's parameters out of a stack's; None: there is no stack."""
    return params if index is None else jax.tree.map(lambda x: x[index], params)


Interceptor = Callable[[Any, Any, Any, Any], Any]


Which = type[nn.Module] | str  # modules of a class, or of a name


def replacing(which: Which, give: Callable[..., Any]) -> Interceptor:
    """For flax.linen.intercept_methods: such modules give `give(*args)` and compute nothing."""

    def intercept(following: Any, args: Any, kwargs: Any, context: Any) -> Any:
        return give(*args) if _meant(which, context) else following(*args, **kwargs)

    return intercept


def hearing(which: Which, heard: list[Any]) -> Interceptor:
    """For flax.linen.intercept_methods: appends the arguments of every call of such modules to `heard`."""

    def intercept(following: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if _meant(which, context):
            heard.append((args, kwargs))
        return following(*args, **kwargs)

    return intercept


def keeping(which: Which, kept: list[Any]) -> Interceptor:
    """For flax.linen.intercept_methods: appends what every call of such modules gives to `kept`."""

    def intercept(following: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = following(*args, **kwargs)
        if _meant(which, context):
            kept.append(out)
        return out

    return intercept


def _meant(which: Which, context: Any) -> bool:
    if context.method_name != "__call__":
        return False
    return context.module.name == which if isinstance(which, str) else isinstance(context.module, which)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled anew, whatever was compiled of it before."""

    @functools.wraps(function)
    def fresh(*args: Any) -> Any:
        return function(*args)

    return jax.jit(fresh)
