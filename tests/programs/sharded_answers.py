"""The cross-entropy of a batch's answers and its gradients on a mesh; arguments as on_meshes.py says."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import on_meshes
from jax.sharding import Mesh, NamedSharding

from virst_jax.config import get_preset
from virst_jax.parallel import sharding
from virst_jax.training.answers import Answers, answers_loss

WIDTH, VOCABULARY = 64, 1024  # just large enough to be split
EXAMPLES, POSITIONS = 8, 12
CFG = get_preset("tiny")


def program(mesh: Mesh) -> tuple[Any, dict[str, Any]]:
    rng = np.random.default_rng(0)
    kernel = (rng.standard_normal((WIDTH, VOCABULARY)) / WIDTH).astype(np.float32)
    batch = {
        "hidden": rng.standard_normal((EXAMPLES, POSITIONS, WIDTH)).astype(np.float32),
        "target": rng.integers(VOCABULARY, size=(EXAMPLES, POSITIONS)).astype(np.int32),
        "weight": (rng.random((EXAMPLES, POSITIONS)) * (rng.random((EXAMPLES, POSITIONS)) < 0.5)).astype(np.float32),
    }
    spec = sharding.partition("llm/lm_head/kernel", kernel.shape, ("embed", "vocab"), mesh)
    split = NamedSharding(mesh, spec)
    placed = sharding.put_global({"kernel": kernel}, {"kernel": split})
    rows = sharding.batch_sharding(mesh)

    def loss(kernel: jax.Array, hidden: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
        answers = Answers(hidden, batch["target"], batch["weight"])
        # the factor shows that the gradients take over what comes after the loss
        return 3 * answers_loss(CFG, {"llm": {"lm_head": {"kernel": kernel}}}, answers) + jnp.square(kernel).sum()

    given = sharding.global_batch(on_meshes.rows_of_process(batch, mesh), mesh)
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), out_shardings=(None, (split, rows)))
    value, (of_kernel, of_hidden) = run(placed["kernel"], given["hidden"], given)
    whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))(of_hidden)
    return {"kernel": of_kernel}, {"loss": np.asarray(value), "hidden": np.asarray(whole)}


if __name__ == "__main__":
    on_meshes.run(program)
