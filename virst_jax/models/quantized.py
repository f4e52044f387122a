"""Parameters of a network with integer kernels, made from those of the same network in floating point."""

from collections.abc import Iterable, Iterator

import flax.linen as nn
import numpy as np

from virst_jax.config import VirstConfig
from virst_jax.models.tree import flatten, unflatten
from virst_jax.models.virst import boxed_shapes
from virst_jax.ops import quantized
from virst_jax.types import Params, PyTree


def quantized_leaves(cfg: VirstConfig, leaves: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """Rounds the kernels that `cfg` has as integers, and hands on all else: one after another, on the host.

    Args:
      cfg: of the network with integers, see config.quantized.
      leaves: names and values of the parameters of the network in floating point, without adapters on these kernels.

    Yields:
      Names and values of the parameters of `Virst(cfg)`.

    Raises:
      UserError: values that are not finite.
    """
    kinds = _kernels(cfg)
    for name, value in leaves:
        if name not in kinds:
            yield name, value
            continue
        kind, leading = kinds[name]
        values, scale = quantized.quantize(np.asarray(value), kind, leading, name)
        yield name, values
        yield _scale(name), scale


def quantize_params(cfg: VirstConfig, params: Params) -> dict[str, PyTree]:
    """As `quantized_leaves`, of a whole tree."""
    return unflatten(dict(quantized_leaves(cfg, flatten(params).items())))


def dequantize_params(cfg: VirstConfig, params: Params) -> dict[str, PyTree]:
    """The parameters in floating point that those of `Virst(cfg)` stand for; kernels in float32."""
    kinds, flat = _kernels(cfg), flatten(params)
    for name, (_, leading) in kinds.items():
        flat[name] = quantized.dequantize(np.asarray(flat[name]), np.asarray(flat.pop(_scale(name))), leading)
    return unflatten(flat)


def _scale(kernel: str) -> str:
    return kernel.rpartition("/")[0] + "/" + quantized.SCALE


def _kernels(cfg: VirstConfig) -> dict[str, tuple[str, int]]:
    """The integer kernels of `Virst(cfg)`: their kind, and how many axes of a stack come first."""
    found = {}
    for name, box in flatten(boxed_shapes(cfg)).items():
        kind = str(nn.meta.unbox(box).dtype)
        if kind in quantized.DTYPES:
            found[name] = (kind, list(box.names).count("layers"))
    return found
