"""Trees of parameters by path."""

from flax.traverse_util import flatten_dict, unflatten_dict

from virst_jax.types import Params, PyTree


def flatten(tree: Params) -> dict[str, PyTree]:
    """{"a": {"b": x}} -> {"a/b": x}"""
    return flatten_dict(tree, sep="/")


def unflatten(flat: Params) -> dict[str, PyTree]:
    """{"a/b": x} -> {"a": {"b": x}}"""
    return unflatten_dict(dict(flat), sep="/")
