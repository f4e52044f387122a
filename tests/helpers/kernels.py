"""What a traced program holds: its operations, and the kernels that it runs."""

from collections.abc import Iterator
from typing import Any

from jax.extend.core import jaxprs_in_params
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


def equations(program: Any) -> Iterator[Any]:
    """Of a traced program and of all that it holds."""
    for equation in program.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)
