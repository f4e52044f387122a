"""Low-rank adapters of linear layers.

Source: the release wraps its language model with peft.LoraConfig (eval.py); peft/tuners/lora/layer.py.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from virst_jax.config import FLOAT, Compute, LoraConfig
from virst_jax.errors import UserError
from virst_jax.models.layers import Dropout, default_init, quantized_kernel, with_axes
from virst_jax.ops.constrain import constrain
from virst_jax.ops.few_rows import with_rows
from virst_jax.ops.quantized import SCALE, frozen_product
from virst_jax.ops.rounding import rounded
from virst_jax.types import Params, PyTree

ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# how the axes of a kernel are split while it is multiplied: as those of activations
WHOLE = {"embed": "width", "heads": "heads", "kv_heads": "heads", "mlp": "hidden"}
PROJECTED = "projected"  # for jax.checkpoint_policies: what a linear layer gives


class LoraDense(nn.Module):
    """A linear layer and, when the rank is above 0, an adapter: x W + b + scale * (dropout(x) A) B.

    The parameters `kernel` and `bias` are where nn.Dense puts them, so adapters can come and go without a change of
    path. `lora_a` starts as in PEFT (uniform in +-1/sqrt(in)), `lora_b` with zeros. Training may hold a frozen kernel
    as integers, with their scales as `kernel_scale` (training.integers).
    """

    compute: Compute
    features: int
    axes: tuple[str, str]
    lora: LoraConfig
    use_bias: bool = True
    kernel_init: Callable[..., Any] = default_init
    weights: str = FLOAT  # of config.WEIGHTS; integers have no adapter

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        """dtype[..., in] -> dtype[..., features]; draws from the "dropout" rng when not deterministic."""
        dtype, param_dtype = jnp.dtype(self.compute.dtype), jnp.dtype(self.compute.param_dtype)
        width, rank = x.shape[-1], self.lora.rank
        x = jnp.asarray(x, dtype)
        shape = (width, self.features)
        quantized: jax.Array | None = None
        if self.weights != FLOAT:
            quantized = with_rows(quantized_kernel(self, self.weights, shape, self.axes).product, x)
        else:
            kernel = self.param("kernel", with_axes(self.kernel_init, *self.axes), shape, param_dtype)
        bias: jax.Array | None = None
        if self.use_bias:
            bias = self.param("bias", with_axes(nn.initializers.zeros, self.axes[-1]), (self.features,), param_dtype)
        if quantized is not None:
            return rounded(quantized if bias is None else quantized + bias.astype(quantized.dtype), dtype)
        held: Any = self.get_variable("params", SCALE)  # of a kernel that training holds as integers
        if held is not None:
            # split over devices, integers are gathered, and not what is made of them
            whole = constrain(kernel, *(WHOLE.get(axis) for axis in self.axes))
            y = with_rows(lambda x: frozen_product(x, whole, held), x)
            y = y if bias is None else y + bias.astype(dtype)
        elif self.compute.rounding == "release":  # PyTorch adds the bias before it rounds
            wide = jnp.matmul(x, kernel.astype(dtype), preferred_element_type=jnp.promote_types(dtype, jnp.float32))
            y = rounded(wide if bias is None else wide + bias.astype(wide.dtype), dtype)
        else:
            y = with_rows(lambda x: x @ kernel.astype(dtype), x)
            y = y if bias is None else y + bias.astype(dtype)
        if rank == 0:
            return checkpoint_name(y, PROJECTED)
        a = self.param("lora_a", with_axes(default_init, self.axes[0], "lora"), (width, rank), param_dtype)
        zeros = with_axes(nn.initializers.zeros, "lora", self.axes[1])
        b = self.param("lora_b", zeros, (rank, self.features), param_dtype)
        narrow = Dropout(self.lora.dropout)(x, deterministic) @ a.astype(dtype)
        # the sum is kept for the backward pass, rather than both products
        return checkpoint_name(y + narrow @ b.astype(dtype) * self.lora.scale, PROJECTED)


def add_lora(params: Params, have: LoraConfig, want: LoraConfig, seed: int) -> dict[str, PyTree]:
    """Parameters of the network with fresh adapters in the language model, if it has none yet.

    Args:
      params: of Virst.
      have, want: the adapters of `params`, and those of the network that will use them.

    Raises:
      UserError: `params` has adapters of another rank.
    """
    if have.rank == want.rank:
        return dict(params)
    if have.rank:
        raise UserError(
            f"the model to start from has adapters of rank {have.rank}, the recipe asks for {want.rank}: convert it "
            "with --lora merge, or set the recipe's rank to the model's"
        )
    key = jax.random.key(seed)

    def add(node: Params, path: str) -> dict[str, PyTree]:
        out = {name: add(x, f"{path}/{name}") if isinstance(x, Mapping) else x for name, x in node.items()}
        if path.rsplit("/", 1)[-1] in ADAPTED:
            *layers, width, features = node["kernel"].shape
            place = zlib.crc32(path.encode())
            # the fan-in counts one layer
            bound = width**-0.5
            draw = jax.random.uniform(jax.random.fold_in(key, place), (*layers, width, want.rank), minval=-1)
            out["lora_a"] = (draw * bound).astype(node["kernel"].dtype)
            out["lora_b"] = jnp.zeros((*layers, want.rank, features), node["kernel"].dtype)
        return out

    return {**params, "llm": add(params["llm"], "llm")}


def merge_lora(params: Params, scale: float) -> dict[str, PyTree]:
    """The same nested parameters with every adapter added to its kernel and removed.

    Args:
      params: arrays without boxes; kernels may carry leading axes, [..., in, out], as their adapters do.
      scale: LoraConfig.scale.

    Returns:
      A new dictionary; kernel + scale * A B is computed in float32 and cast to the kernel's dtype.

    Raises:
      UserError: an adapter without its other half or its kernel.
    """
    return _merge(params, scale, ())


def _merge(node: Params, scale: float, path: tuple[str, ...]) -> dict[str, PyTree]:
    adapter = {"lora_a", "lora_b"} & set(node)
    if adapter and not {"kernel", "lora_a", "lora_b"} <= set(node):
        raise UserError(
            f"merging adapters: {'/'.join(path) or 'the root'} has {', '.join(sorted(node))}; an adapter is kernel, "
            "lora_a and lora_b: convert the checkpoint again"
        )
    merged = {
        key: _merge(value, scale, (*path, key)) if isinstance(value, Mapping) else value
        for key, value in node.items()
        if key not in adapter
    }
    if adapter:
        merged["kernel"] = add_adapter(node["kernel"], node["lora_a"], node["lora_b"], scale)
    return merged


def add_adapter(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """kernel + scale * a b, computed in float32 and cast to the kernel's dtype; any leading axes."""
    product = jnp.matmul(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return (jnp.asarray(kernel, jnp.float32) + scale * product).astype(kernel.dtype)
