"""Prints what a small step needs on eight virtual devices: python aot_report.py HLO_FILE"""

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from virst_jax.parallel import sharding
from virst_jax.profiling import aot


def step(state: Any, batch: Any) -> Any:
    def loss(weights: Any) -> Any:
        def layer(hidden: Any, weight: Any) -> Any:
            return jax.lax.with_sharding_constraint(hidden, P(("data", "fsdp"))) @ weight, None

        return (jax.lax.scan(layer, batch, weights)[0] ** 2).mean()

    value, gradient = jax.value_and_grad(loss)(state["w"])
    return {"w": state["w"] - gradient, "m": state["m"]}, {"loss": value}


def main(hlo_path: str) -> None:
    mesh = sharding.make_mesh(2, 4, 1, devices=aot.topology_devices("cpu:8"))
    state = {
        "w": jax.ShapeDtypeStruct((5, 64, 64), jnp.float32),
        "m": jax.ShapeDtypeStruct((100,), jnp.float32),
    }
    with sharding.use_mesh(mesh):
        report = aot.compile_report(
            step,
            state,
            jax.ShapeDtypeStruct((16, 64), jnp.float32),
            {"w": NamedSharding(mesh, P(None, "fsdp")), "m": sharding.replicated(mesh)},
            sharding.batch_sharding(mesh),
            "cpu:8",
            flops=8e6,
            hlo_path=hlo_path,
            parts=lambda state: {"parameters": state["w"], "optimizer": state["m"]},
        )
    gathers = report.traffic["all-gather"]
    costs = [report.flops, report.xla_flops, report.temporary, report.peak]
    print(json.dumps([report.parts, report.num_devices, *costs, gathers.count, gathers.payload]))


if __name__ == "__main__":
    main(*sys.argv[1:])
