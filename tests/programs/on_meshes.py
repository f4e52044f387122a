"""What the programs on several devices share: their arguments, their meshes, and what they leave.

    python PROGRAM MESH [...] [--processes N --process I --port P] --out PATTERN

A MESH is DATAxFSDPxTENSOR; one of a single device takes the first of those that are there. The file of each mesh has
its name in place of {} in PATTERN.
"""

import argparse
from collections.abc import Callable
from typing import Any

import flax
import jax
import numpy as np
from jax.sharding import Mesh

from virst_jax.parallel import sharding


def run(program: Callable[[Mesh], tuple[Any, dict[str, Any]]]) -> None:
    """Runs a program on each mesh.

    Args:
      program: gives the parameters after training, split as they are, and further values.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("meshes", nargs="+")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--port", type=int)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    if args.processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{args.port}", num_processes=args.processes, process_id=args.process)
    for name in args.meshes:
        data, fsdp, tensor = (int(size) for size in name.split("x"))
        mesh = sharding.make_mesh(data, fsdp, tensor, devices=jax.devices()[: data * fsdp * tensor])
        with sharding.use_mesh(mesh):
            params, values = program(mesh)
            whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))(params)
        if args.process == 0:
            arrays: dict[str, Any] = {"devices": mesh.size, "share": share(params), **values, **flat(whole)}
            np.savez(args.out.format(name), **arrays)


def share(params: Any) -> float:
    """How much of a large kernel one device holds."""
    if "kernel" in params:
        kernel = params["kernel"]
    elif "llm" not in params and "sam2" in params:
        kernel = params["sam2"]["memory_attention"]["layers"]["linear1"]["kernel"]
    else:
        kernel = params.get("llm", params)["layers"]["mlp"]["up_proj"]["kernel"]
    return kernel.addressable_shards[0].data.size / kernel.size


def flat(params: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in flax.traverse_util.flatten_dict(params, sep="/").items()}


def rows_of_process(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, np.ndarray]:
    """This process's share of a batch."""
    index, count = sharding.process_share(mesh)
    rows = {name: len(x) // count for name, x in batch.items()}
    return {name: x[index * rows[name] : (index + 1) * rows[name]] for name, x in batch.items()}
