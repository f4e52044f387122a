"""Building blocks that carry logical axis names, shared by all modules.

Every parameter names its axes with names from AXES; parallel/sharding.py maps these to mesh axes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from virst_jax.config import FLOAT, Compute
from virst_jax.ops.dropout import drop, drop_relu
from virst_jax.ops.platform import target_platform
from virst_jax.ops.quantized import DTYPES, SCALE, Quantized, stored_shapes
from virst_jax.ops.strided import folded_convolution, strided_convolution

AXES = frozenset(
    {
        "layers",  # stacked layers of a scan
        "vocab",
        "embed",  # residual stream
        "mlp",
        "heads",  # heads times head width
        "kv_heads",
        "qkv",  # the three of a fused projection
        "lora",
        "norm",
        "token",  # rows of small learned tables
        "grid",  # positions of learned position tables
        "kernel",  # a convolution's spatial extent
        "group",  # input rows that share a scale
        "conv_in",
        "conv_out",
    }
)

# PyTorch's default for linear layers and convolutions: uniform in +-1/sqrt(fan_in).
default_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


LAYER_INPUT = "layer_input"  # for jax.checkpoint_policies: what a layer of a stack is given
PART = 2**20  # numbers of the widest array that `in_parts` makes at a time: 4 MiB in float32
STRIDED_KERNEL = 4  # the largest for which ops.strided is faster: it gathers kernel x kernel copies


def with_axes(init: Callable[..., Any], *axes: str) -> Callable[..., Any]:
    """An initializer whose parameter carries logical axis names; an unknown name raises."""
    unknown = set(axes) - AXES
    if unknown:
        raise ValueError(f"unknown logical axis {sorted(unknown)}; known are {sorted(AXES)}")
    return nn.with_logical_partitioning(init, axes)


def quantized_kernel(module: nn.Module, weights: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> Quantized:
    """The integer kernel of a compact module: its parameters `kernel` and `kernel_scale`, which keeps float32.

    shape: of the kernel, input rows first.
    """
    stored, scales = stored_shapes(shape, weights)
    rows, *outputs = axes
    grouped = (rows, "group", *outputs) if len(stored) > len(shape) else axes
    values = module.param("kernel", with_axes(nn.initializers.zeros, *grouped), stored, DTYPES[weights])
    of_scales = outputs if len(scales) == len(outputs) else axes
    return Quantized(values, module.param(SCALE, with_axes(nn.initializers.ones, *of_scales), scales, jnp.float32))


class QuantizedDense(nn.Module):
    """A linear layer with an integer kernel. The bias is added before the product is rounded, once, to compute.dtype.

    wide: hands the sums on as they are, in float32.
    """

    compute: Compute
    features: int
    axes: tuple[str, str]
    weights: str  # of config.WEIGHTS
    use_bias: bool = True
    wide: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """dtype[..., in] -> dtype[..., features]"""
        dtype = jnp.dtype(self.compute.dtype)
        x = x.astype(dtype)
        y = quantized_kernel(self, self.weights, (x.shape[-1], self.features), self.axes).product(x)
        if self.use_bias:
            init = with_axes(nn.initializers.zeros, self.axes[-1])
            bias = self.param("bias", init, (self.features,), jnp.dtype(self.compute.param_dtype))
            y = y + bias.astype(y.dtype)
        return y if self.wide else y.astype(dtype)


def dense(
    compute: Compute,
    features: int,
    axes: tuple[str, str],
    *,
    weights: str = FLOAT,
    use_bias: bool = True,
    init: Callable[..., Any] = default_init,
    name: str | None = None,
) -> nn.Dense | QuantizedDense:
    """A linear layer; weights: of config.WEIGHTS."""
    if weights != FLOAT:
        return QuantizedDense(compute, features, axes, weights, use_bias, name=name)
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=jnp.dtype(compute.dtype),
        param_dtype=jnp.dtype(compute.param_dtype),
        kernel_init=with_axes(init, *axes),
        bias_init=with_axes(nn.initializers.zeros, axes[-1]),
        name=name,
    )


class Projections(nn.Module):
    """Queries, keys and values by one stacked kernel; accelerators slice the kernel rather than the larger result."""

    compute: Compute
    features: int
    use_bias: bool = True
    weights: str = FLOAT  # of config.WEIGHTS

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """dtype[..., C] -> three of dtype[..., features]"""
        dtype, param_dtype = jnp.dtype(self.compute.dtype), jnp.dtype(self.compute.param_dtype)
        shape, axes = (x.shape[-1], 3, self.features), ("embed", "qkv", "heads")
        x = x.astype(dtype)
        if self.weights != FLOAT:
            integers = quantized_kernel(self, self.weights, shape, axes)
            q, k, v = (integers.outputs(i).product(x).astype(dtype) for i in range(3))
            return self._biased(q, k, v)
        kernel = self.param("kernel", with_axes(default_init, *axes), shape, param_dtype).astype(dtype)
        if target_platform() == "cpu":  # one product is faster, and slices are free
            qkv = x @ kernel.reshape(x.shape[-1], -1)
            q, k, v = jnp.split(qkv, 3, axis=-1)
        else:
            q, k, v = (x @ kernel[:, i] for i in range(3))
        return self._biased(q, k, v)

    def _biased(self, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        if self.use_bias:
            dtype, param_dtype = q.dtype, jnp.dtype(self.compute.param_dtype)
            init = with_axes(nn.initializers.zeros, "qkv", "heads")
            bias = self.param("bias", init, (3, self.features), param_dtype).astype(dtype)
            q, k, v = q + bias[0], k + bias[1], v + bias[2]
        return q, k, v


def layer_norm(compute: Compute, eps: float = 1e-5, *, name: str | None = None) -> nn.LayerNorm:
    return nn.LayerNorm(
        epsilon=eps,
        # in one pass E[x^2] - E[x]^2 in float32 loses digits, but fewer than bfloat16 lacks
        use_fast_variance=jnp.dtype(compute.dtype) != jnp.float32,
        dtype=jnp.dtype(compute.dtype),
        param_dtype=jnp.dtype(compute.param_dtype),
        scale_init=with_axes(nn.initializers.ones, "norm"),
        bias_init=with_axes(nn.initializers.zeros, "norm"),
        name=name,
    )


def conv(
    compute: Compute,
    features: int,
    kernel: int,
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    name: str | None = None,
) -> nn.Conv:
    """2-D convolution over [B, H, W, C] with explicit symmetric padding, as PyTorch pads."""
    implementation: Callable[..., jax.Array] | None = None
    if kernel == stride == groups == 1:
        implementation = _pointwise
    elif stride > 1 and groups == 1 and kernel <= STRIDED_KERNEL and target_platform() == "cpu":
        implementation = _strided
    elif stride > 2 and groups == 1 and target_platform() == "tpu":
        implementation = _folded
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        feature_group_count=groups,
        dtype=jnp.dtype(compute.dtype),
        param_dtype=jnp.dtype(compute.param_dtype),
        kernel_init=with_axes(default_init, "kernel", "kernel", "conv_in", "conv_out"),
        bias_init=with_axes(nn.initializers.zeros, "conv_out"),
        conv_general_dilated=implementation,
        name=name,
    )


def _pointwise(x: jax.Array, kernel: jax.Array, *_: object, precision: Any = None, **__: Any) -> jax.Array:
    """A 1 x 1 convolution as a product: three times as fast on CPUs."""
    return jnp.einsum("bhwc,cd->bhwd", x, kernel[0, 0], precision=precision)


def _strided(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, *_: object, precision: Any = None, **__: Any
) -> jax.Array:
    return strided_convolution(x, kernel, strides[0], padding[0][0])


def _folded(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, *_: object, precision: Any = None, **__: Any
) -> jax.Array:
    return folded_convolution(x, kernel, strides[0], padding[0][0])


def in_parts(
    module: nn.Module, method: Callable[[Any, jax.Array], jax.Array], x: jax.Array, width: int, flat: bool = False
) -> jax.Array:
    """`method(module, x)` for dtype[N, ...], where the N do not depend on each other; on a CPU a few at a time.

    What lies between one product and the next then stays in the cache, and its memory is not asked for anew.

    Args:
      module: that is being applied.
      method: of the module; creates no random numbers and keeps nothing.
      width: numbers that the widest array in between has for each position, which are all axes but the last.
      flat: no position depends on another: N is all axes but the last. Elsewhere than on a CPU the axes stay what they
        are, for to join them would change the layout of windows on a TPU.
    """
    wanted = x.size // x.shape[-1] * width // PART
    if target_platform() != "cpu" or wanted < 2 or jax.sharding.get_abstract_mesh().size > 1:
        return method(module, x)
    rows = x.reshape(-1, x.shape[-1]) if flat else x
    count = max(n for n in range(1, min(wanted, len(rows)) + 1) if len(rows) % n == 0)
    scan = nn.scan(
        lambda module, carry, part: (carry, method(module, part)),
        variable_broadcast="params",
        split_rngs={"params": False},
    )
    _, out = scan(module, (), rows.reshape(count, -1, *rows.shape[1:]))
    return out.reshape(*x.shape[:-1], out.shape[-1]) if flat else out.reshape(-1, *out.shape[2:])


class Mlp(nn.Module):
    """Linear layers with an activation between them (SAM 2's MLP).

    Source: model/sam2/modeling/sam2_utils.py, class MLP.
    """

    compute: Compute
    widths: Sequence[int]  # of every layer's output
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    sigmoid_output: bool = False
    weights: str = FLOAT  # of config.WEIGHTS

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """dtype[..., D] -> dtype[..., widths[-1]]"""
        last = len(self.widths) - 1
        for i, width in enumerate(self.widths):
            axes = ("mlp", "embed") if i == last else ("embed", "mlp")
            x = dense(self.compute, width, axes, weights=self.weights, name=f"layer{i}")(x)
            if i < last:
                x = self.activation(x)
        return nn.sigmoid(x) if self.sigmoid_output else x


def gelu(x: jax.Array) -> jax.Array:
    """x times the normal distribution function of x, as PyTorch computes it."""
    # in float32 the left tail has digits enough; erf is a polynomial that compilers fuse into products, unlike erfc
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * y * (1 + jax.lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)


class Dropout(nn.Module):
    """As nn.Dropout, from fewer random bits (ops.dropout); draws from the "dropout" rng when not deterministic."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool, relu: bool = False) -> jax.Array:
        """dtype[...] -> dtype[...]; relu: of what is positive in `x`."""
        if deterministic or self.rate == 0:
            return drop_relu(x, 0.0, None) if relu else x
        return (drop_relu if relu else drop)(x, self.rate, self.make_rng("dropout"))


def remat(module: type[nn.Module], policy: str, names: tuple[str, ...] = (), **kwargs: Any) -> type[nn.Module]:
    """`module`, a layer of a stack, with its activations recomputed in the backward pass as `policy` says.

    policy: of config.REMAT. "none" keeps all, "full" keeps a layer's input, "dots" also the outputs of matrix products
      with weights, "offload" keeps the input in the host's memory if the layer names it LAYER_INPUT.
    names: those that "dots" keeps, of jax.ad_checkpoint.checkpoint_name; none: all such outputs.
    """
    if policy == "none":
        return module
    keep = jax.checkpoint_policies
    policies: dict[str, Callable[..., Any] | None] = {
        "full": None,
        "dots": keep.save_only_these_names(*names) if names else keep.dots_with_no_batch_dims_saveable,
        # A link to the host takes longer for the output of a product than a chip takes to make it again.
        "offload": keep.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }
    return nn.remat(module, policy=policies[policy], prevent_cse=False, **kwargs)
