"""The training state and its step.

Axes: B examples of a batch.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax

from virst_jax.config import FLOAT, VirstConfig
from virst_jax.models.tree import flatten, unflatten
from virst_jax.ops.quantized import is_scale
from virst_jax.parallel.sharding import replicate
from virst_jax.training.integers import KIND, to_floats, to_integers
from virst_jax.training.losses import ANSWERS, finish, video_parts
from virst_jax.training.optim import Groups, OptimConfig, join, learning_rate, make_optimizer, split, update_ema
from virst_jax.training.tasks import Batch, LossFunction
from virst_jax.types import Params, PyTree

Metrics = dict[str, jax.Array]
LEARNING_RATE = "learning_rate"  # among the metrics of a step: before the factors of the groups


@flax.struct.dataclass
class TrainState:
    """What a step changes, and the frozen parameters."""

    step: jax.Array  # int32[], batches seen
    params: PyTree  # the trained parameters, float32
    frozen: PyTree  # the others, in the compute dtype or as integers with their scales
    opt_state: PyTree
    ema: PyTree  # averaged trained parameters float32, or None

    def all_params(self, averaged: bool = False) -> dict[str, PyTree]:
        """The parameters of `Virst`, in floating point; the averaged ones if there are any and they are asked for."""
        return join(self.ema if averaged and self.ema is not None else self.params, to_floats(self.frozen))


def init_state(
    cfg: VirstConfig, optim: OptimConfig, groups: Groups, params: Params, frozen_weights: str = FLOAT
) -> TrainState:
    """The state before the first step.

    Args:
      params: may be traced or abstract: the function works under eval_shape.
      frozen_weights: of recipe.FROZEN_WEIGHTS.
    """
    trained, frozen = split(params, groups)
    trained = jax.tree.map(lambda x: x.astype(jnp.float32), trained)
    integers = to_integers(frozen) if frozen_weights != FLOAT else frozen
    cast = lambda path, x: x if x.dtype == KIND or is_scale(path) else x.astype(cfg.compute.dtype)  # noqa: E731
    frozen = unflatten({path: cast(path, x) for path, x in flatten(integers).items()})
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=trained,
        frozen=frozen,
        opt_state=make_optimizer(optim, groups).init(trained),
        ema=jax.tree.map(jnp.copy, trained) if optim.ema else None,
    )


def batch_loss(
    cfg: VirstConfig,
    params: PyTree,
    batch: Batch,
    rng: jax.Array | None,
    loss: LossFunction,
    mesh_axes: tuple[str, ...] | None = None,
) -> tuple[jax.Array, Metrics]:
    """The mean loss over the examples of a batch.

    Args:
      batch: its arrays have a leading axis B.
      rng: of dropout; None: without.
      loss: of one example.
      mesh_axes: the mesh axes that B is split over.

    Returns:
      float32[], and the parts, float32[].
    """
    count = jax.tree.leaves(batch)[0].shape[0]

    def of_example(example: Batch, rng: jax.Array | None) -> tuple[jax.Array, Metrics]:
        value, parts = loss(cfg, params, example, rng)
        return value, {name: part for name, part in parts.items() if name != "masks"}

    rngs = None if rng is None else jax.random.split(rng, count)
    value, parts = jax.vmap(of_example, spmd_axis_name=mesh_axes)(batch, rngs)
    answers = {name: part for name, part in parts.items() if name == ANSWERS}
    means = {name: part.mean() for name, part in parts.items() if name != ANSWERS}
    return finish(cfg, params, (value.mean(), {**means, **answers}), count)


def make_train_step(
    cfg: VirstConfig,
    optim: OptimConfig,
    groups: Groups,
    loss: LossFunction = video_parts,
    *,
    seed: int = 0,
    mesh_axes: tuple[str, ...] | None = None,
    dropout: bool = True,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A pure function (state, batch) -> (state, metrics) for one kind of batch.

    A batch whose loss or gradient is not finite changes nothing but the count of steps.

    Args:
      loss: of one example.
      seed: of dropout.
      mesh_axes: the mesh axes that the batch is split over.
    """
    optimizer, rate = make_optimizer(optim, groups), learning_rate(optim)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step) if dropout else None

        def loss_of(trained: PyTree) -> tuple[jax.Array, Metrics]:
            return batch_loss(cfg, replicate(join(trained, state.frozen)), batch, rng, loss, mesh_axes)

        (value, parts), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        norm = optax.tree.norm(gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = None
        if state.ema is not None:
            count = (state.step + 1) // optim.accumulate
            # smaller at first, so that the first parameters soon weigh nothing
            decay = jnp.minimum(optim.ema, (1 + count) / (10 + count))
            moved = (state.step + 1) % optim.accumulate == 0
            ema = update_ema(state.ema, params, jnp.where(moved, decay, 1.0))
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        old = (state.params, state.opt_state, state.ema)
        params, opt_state, ema = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state, ema), old
        )
        metrics = {"loss": value, **parts, "grad_norm": norm, "finite": finite}
        metrics[LEARNING_RATE] = rate(state.step // optim.accumulate)
        return TrainState(state.step + 1, params, state.frozen, opt_state, ema), metrics

    return step
