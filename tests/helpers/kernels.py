"""Which kernels a traced program runs."""

from typing import Any

from jax.interpreters import partial_eval


def kernels(jaxpr: Any) -> list[str]:
    """The kernels of a program without what nobody reads, through all inner programs."""
    found: list[str] = []
    for equation in partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0].eqns:
        if equation.primitive.name == "pallas_call":
            found.append(equation.params["name"])
            continue
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += kernels(inner)
    return found
