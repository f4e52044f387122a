"""Functions of one example that a batch runs one example after another.

jax.vmap computes all examples of a batch at once. What takes most of a device's memory for one of them, or runs no
faster for several, is better done in turn.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from virst_jax.ops.splash import mesh_axes
from virst_jax.types import PyTree

Function = Callable[[PyTree, PyTree], Any]  # of what all examples share, and of an example's own


def one_at_a_time(function: Function) -> Function:
    """The same function, which jax.vmap over its second argument runs for one example after another.

    On a mesh every device runs its own examples, if the axes that parallel.sharding.use_mesh names divide the batch. It
    cannot be differentiated, as gradient_with_value and recomputed can.

    Raises:
      ValueError: jax.vmap over the first argument.
    """
    run = jax.custom_batching.custom_vmap(function)

    def in_turn(shared: PyTree, own: PyTree) -> Any:
        return jax.lax.map(lambda example: function(shared, example), own)

    @run.def_vmap
    def _(size: int, batched: Any, shared: PyTree, own: PyTree) -> tuple[Any, Any]:
        if any(jax.tree.leaves(batched[0])):
            raise ValueError("one_at_a_time: jax.vmap over what the examples share")
        own = jax.tree.map(lambda x, has: x if has else jnp.broadcast_to(x, (size, *x.shape)), own, batched[1])
        results = _on_devices(in_turn, size)(shared, own)
        return results, jax.tree.map(lambda _: True, results)

    return run


def _on_devices(in_turn: Function, size: int) -> Function:
    """Each device with its own of `size` examples, where a mesh has several that share them out."""
    axes = mesh_axes("batch", size)
    mesh = jax.sharding.get_abstract_mesh()
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes))
    if math.prod(sizes[axis] for axis in axes) == 1:
        return in_turn
    # kernels cannot run where the compiler has an axis left, even one of a single device
    manual = {axis for axis, count in sizes.items() if axis in axes or count == 1}
    rows = PartitionSpec(axes)
    return jax.shard_map(in_turn, in_specs=(PartitionSpec(), rows), out_specs=rows, axis_names=manual, check_vma=False)


def gradient_with_value(function: Function) -> Callable[[PyTree, PyTree, PyTree], Any]:
    """A loss of one example, one at a time, whose gradient is made together with its value.

    Nothing but the gradient is kept for the backward pass, so that examples in turn need the memory of one.

    Args:
      function: of (shared, (varied, fixed)) to a loss float32[] and a tree of other results, which have no gradient.

    Returns:
      A function of (shared, varied, fixed). It is differentiable by `shared` and `varied`; in float arrays alone.
    """

    def value(shared: PyTree, own: tuple[PyTree, PyTree]) -> Any:
        return function(shared, own)

    def both(shared: PyTree, own: tuple[PyTree, PyTree]) -> Any:
        by_both = jax.value_and_grad(lambda shared, varied: function(shared, (varied, own[1])), (0, 1), has_aux=True)
        return by_both(shared, own[0])

    alone, with_gradient = one_at_a_time(value), one_at_a_time(both)

    @jax.custom_vjp
    def loss(shared: PyTree, varied: PyTree, fixed: PyTree) -> Any:
        return alone(shared, (varied, fixed))

    def forward(shared: PyTree, varied: PyTree, fixed: PyTree) -> Any:
        return with_gradient(shared, (varied, fixed))

    def backward(gradients: tuple[PyTree, PyTree], scales: Any) -> tuple[PyTree, PyTree, None]:
        scaled = jax.tree.map(lambda x: (x * scales[0]).astype(x.dtype), gradients)
        return *scaled, None

    loss.defvjp(forward, backward)
    return loss


def recomputed(function: Function) -> Function:
    """A function of one example, one at a time, that the backward pass computes again for its gradient.

    Args:
      function: of (shared, own) to a tree of arrays.

    Returns:
      The same function. It is differentiable by `shared` alone.
    """

    def gradient(shared: PyTree, own: tuple[PyTree, PyTree]) -> PyTree:
        given, of_results = own
        (of_shared,) = jax.vjp(lambda shared: function(shared, given), shared)[1](of_results)
        return of_shared

    alone, gradient_alone = one_at_a_time(function), one_at_a_time(gradient)

    @jax.custom_vjp
    def run(shared: PyTree, own: PyTree) -> Any:
        return alone(shared, own)

    run.defvjp(
        lambda shared, own: (alone(shared, own), (shared, own)),
        lambda given, of_results: (gradient_alone(given[0], (given[1], of_results)), None),
    )
    return run
