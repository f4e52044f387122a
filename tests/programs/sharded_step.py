"""Two steps of a small language model on a mesh, which reads rows and packed rows; arguments as on_meshes.py says."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import on_meshes
import optax
from jax.sharding import Mesh, NamedSharding

from virst_jax.config import Compute, LoraConfig, QwenConfig
from virst_jax.models.qwen2 import Qwen2
from virst_jax.parallel import sharding

MODEL = Qwen2(QwenConfig(64, 32, 64, 2, 4, 2, lora=LoraConfig(rank=4)), Compute(remat="full"))
OPTIMIZER = optax.adam(1e-2, eps=1e-2)


def loss_of_row(ids: Any, weight: Any, places: Any, params: Any) -> Any:
    embeds: Any = MODEL.apply({"params": params}, ids, method=Qwen2.embed)
    hidden = MODEL.apply({"params": params}, embeds, None)
    behind = (embeds[:1, :4], embeds[1:].reshape(1, -1, embeds.shape[-1]), places >= 0, True, places)
    packed: Any = MODEL.apply({"params": params}, *behind, method=Qwen2.after_prefix)[1]
    logits: Any = MODEL.apply({"params": params}, hidden, method=Qwen2.logits)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])
    return (loss * weight[:, 1:]).mean() + jnp.square(packed.reshape(2, -1) * weight[1:, :1]).mean()


def step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, Any]:
    def loss(params: Any) -> Any:
        params = sharding.replicate(params, ("norm",))
        of_rows = jax.vmap(loss_of_row, (0, 0, 0, None), spmd_axis_name=sharding.BATCH_AXES)
        return of_rows(batch["ids"], batch["weight"], batch["places"], params).mean()

    value, gradients = jax.value_and_grad(loss)(params)
    updates, opt_state = OPTIMIZER.update(gradients, opt_state)
    return optax.apply_updates(params, updates), opt_state, value


def program(mesh: Mesh) -> tuple[Any, dict[str, Any]]:
    boxed = jax.eval_shape(lambda: MODEL.init(jax.random.key(0), jnp.zeros((1, 4, 32)), None))["params"]
    params = flax.linen.unbox(boxed)
    rng = np.random.default_rng(0)
    host = jax.tree.map(lambda x: (0.1 * rng.standard_normal(x.shape)).astype(np.float32), params)
    batch = {"ids": rng.integers(64, size=(8, 3, 10)).astype(np.int32), "weight": rng.random((8, 3, 10), np.float32)}
    lengths = rng.integers(1, 7, size=(8, 3, 1))  # of packed rows
    places = np.arange(6) + np.cumsum(lengths, 1) - lengths
    batch["places"] = np.where(np.arange(6) < lengths, places, -1).astype(np.int32)
    boxes = flax.traverse_util.flatten_dict(boxed, is_leaf=lambda _, x: isinstance(x, flax.linen.meta.AxisMetadata))
    specs = {
        path: sharding.partition("/".join(path), leaf.shape, boxes[path].names, mesh, 0)
        for path, leaf in flax.traverse_util.flatten_dict(params).items()
    }
    shardings = flax.traverse_util.unflatten_dict({path: NamedSharding(mesh, spec) for path, spec in specs.items()})
    opt_shardings = sharding.state_shardings(jax.eval_shape(OPTIMIZER.init, params), shardings, params, mesh)
    placed = sharding.put_global(host, shardings)
    opt_state = jax.jit(OPTIMIZER.init, out_shardings=opt_shardings)(placed)
    local = on_meshes.rows_of_process(batch, mesh)
    run = jax.jit(step, out_shardings=(shardings, opt_shardings, sharding.replicated(mesh)))
    for _ in range(2):
        placed, opt_state, value = run(placed, opt_state, sharding.global_batch(local, mesh))
        jax.block_until_ready(value)
    return placed, {"loss": np.asarray(value)}


if __name__ == "__main__":
    on_meshes.run(program)
