"""The cross-entropy of a batch's answers: the language model's head, applied where there is something to predict.

It is applied to a batch as a whole (ops.cross_entropy), because its kernel is large: on a mesh it is gathered once, in
the compute dtype, and its gradient leaves a device once.

Axes: B examples, N positions of one, D width, V words of the vocabulary.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from virst_jax.config import VirstConfig
from virst_jax.ops.cross_entropy import Gradients, cross_entropy
from virst_jax.parallel.sharding import BATCH_AXES, partition
from virst_jax.types import Params


@flax.struct.dataclass
class Answers:
    """Positions, and what each is to predict; in a batch with a leading axis B."""

    hidden: jax.Array  # dtype[N, D]
    target: jax.Array  # int32[N]
    weight: jax.Array  # float32[N], by which a position's cross-entropy counts; 0: there is nothing to predict


@flax.struct.dataclass
class Wanted:
    """Of what a gradient is wanted."""

    kernel: bool = flax.struct.field(pytree_node=False)
    hidden: bool = flax.struct.field(pytree_node=False)


def answers_loss(cfg: VirstConfig, params: Params, answers: Answers) -> jax.Array:
    """The weighted sum of next-token cross-entropies, float32[].

    Args:
      params: of `Virst(cfg)`; of them the head's kernel float[D, V].
      answers: of one example or of a batch.
    """
    kernel = params["llm"]["lm_head"]["kernel"]
    of_batch = jax.tree.map(lambda x: x if answers.hidden.ndim == 3 else x[None], answers)
    compute = functools.partial(_on_devices, cfg)

    @jax.custom_vjp
    def loss(kernel: jax.Array, hidden: jax.Array, target: jax.Array, weight: jax.Array) -> jax.Array:
        return compute(kernel, Answers(hidden, target, weight), (False, False))[0]

    def forward(kernel: Any, hidden: Any, target: Any, weight: Any) -> tuple[jax.Array, Any]:
        wanted = (kernel.perturbed, hidden.perturbed)
        given = Answers(hidden.value, target.value, weight.value)
        return compute(kernel.value, given, (False, False))[0], (kernel.value, given, Wanted(*wanted))

    def backward(kept: Any, scale: Any) -> tuple[Any, ...]:
        kernel, given, wanted = kept
        if isinstance(scale, jax.custom_derivatives.SymbolicZero):
            return None, None, None, None
        # From logits that are computed again, of a few positions: made with the loss, the kernel's gradient would be
        # there while all that the tracker keeps for its backward pass is there too.
        _, of_kernel, of_hidden = compute(kernel, given, (wanted.kernel, wanted.hidden))
        of_kernel = None if of_kernel is None else (of_kernel * scale).astype(kernel.dtype)
        return of_kernel, None if of_hidden is None else (of_hidden * scale).astype(of_hidden.dtype), None, None

    loss.defvjp(forward, backward, symbolic_zeros=True)
    return loss(kernel, of_batch.hidden, of_batch.target, jax.lax.stop_gradient(of_batch.weight))


def _on_devices(cfg: VirstConfig, kernel: jax.Array, answers: Answers, wanted: tuple[bool, bool]) -> Gradients:
    """Loss and gradients, every device with its examples and its share of the kernel."""
    mesh, dtype = jax.sharding.get_abstract_mesh(), jnp.dtype(cfg.compute.dtype)

    def of_rows(kernel: jax.Array, answers: Answers) -> Gradients:
        shape = answers.hidden.shape
        rows = (answers.hidden.reshape(-1, shape[-1]), answers.target.reshape(-1), answers.weight.reshape(-1))
        rounds = cfg.compute.rounding == "release"
        total, of_kernel, of_hidden = cross_entropy(kernel.astype(dtype), *rows, wanted, rounds=rounds)
        return total, of_kernel, None if of_hidden is None else of_hidden.reshape(shape)

    ways = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if mesh.empty or mesh.size == 1 or answers.hidden.shape[0] % ways:
        return of_rows(kernel, answers)
    spec = partition("llm/lm_head/kernel", kernel.shape, ("embed", "vocab"), mesh)
    split = [() if axes is None else (axes,) if isinstance(axes, str) else tuple(axes) for axes in spec]
    copies = tuple(axis for axis in BATCH_AXES if axis not in {name for axes in split for name in axes})

    def of_device(kernel: jax.Array, answers: Answers) -> Gradients:
        whole = kernel.astype(dtype)
        for place, axes in enumerate(split):
            whole = jax.lax.all_gather(whole, axes, axis=place, tiled=True) if axes else whole
        total, of_kernel, of_hidden = of_rows(whole, answers)
        if of_kernel is not None:
            of_kernel = of_kernel.astype(
                dtype
            )  # as gradients of other kernels travel; half of the bytes and of the room
            for place, axes in enumerate(split):
                if axes:
                    of_kernel = jax.lax.psum_scatter(of_kernel, axes, scatter_dimension=place, tiled=True)
                    # devices that differ on another axis than the batch's have the same examples
                    of_kernel = of_kernel / math.prod(mesh.shape[axis] for axis in axes if axis not in BATCH_AXES)
            of_kernel = jax.lax.psum(of_kernel, copies) if copies else of_kernel
        return jax.lax.psum(total, BATCH_AXES), of_kernel, of_hidden

    rows = PartitionSpec(BATCH_AXES)
    results = (PartitionSpec(), spec if wanted[0] else None, rows if wanted[1] else None)
    run: Callable[..., Gradients] = jax.shard_map(of_device, in_specs=(spec, rows), out_specs=results, check_vma=False)
    return run(kernel, answers)
