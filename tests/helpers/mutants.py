"""Faults put into the network on purpose, each with the operation where it has to be found first.

A fault replaces names of the package's modules while a `with` block lasts, or changes parameters or the config.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import types
import unittest.mock
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from conversion.bisect import load_blocks
from conversion.bisection import encoders
from conversion.bisection.operation import epsilon
from conversion.bisection.walk import Row, Walk, first_difference, operations
from conversion.cases import network as cases
from conversion.cases.case import BLOCKS, load_case
from virst_jax.inference.steps import Network
from virst_jax.models import projector, qwen2, st_fusion, umt
from virst_jax.models.sam2 import hiera, mask_decoder, memory, sam2, tracker

Replacement = Callable[[Any], Any]  # of the old value


@dataclass(frozen=True)
class Mutant:
    name: str
    expected: str  # the operation that is to be named
    patches: tuple[tuple[Any, str, Replacement], ...] = ()
    params: tuple[str, Replacement] | None = None  # path within the parameters
    config: Replacement | None = None

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for owner, name, replace in self.patches:
                old = getattr(owner, name)
                stack.callback(setattr, owner, name, old)
                setattr(owner, name, replace(old))
            yield

    def network(self, network: Network) -> Network:
        cfg = self.config(network.cfg) if self.config else network.cfg
        params = network.params
        if self.params:
            path, replace = self.params
            params = _changed(params, path.split("/"), replace)
        return Network(cfg, params)


def _changed(tree: Any, path: list[str], replace: Replacement) -> Any:
    key, *rest = path
    return {**tree, key: _changed(tree[key], rest, replace) if rest else jnp.asarray(replace(np.asarray(tree[key])))}


@dataclass(frozen=True)
class Recorded:
    """A case, its network, and the tensors of its operations."""

    case: cases.Case
    network: Network
    tensors: dict[str, np.ndarray]


def open_recorded(path: Path) -> Recorded:
    """What helpers.bisect_case has written."""
    case = load_case(path.parent, path.name)
    return Recorded(case, cases.open_network(case), load_blocks(path.parent / f"{path.name}{BLOCKS}"))


def first_named(mutant: Mutant, recorded: Recorded, count: int | None = None, begin: str = "") -> Row | None:
    """The row of the first operation that differs from the recorded tensors.

    count: of the first so many ones only.
    begin: only of those from the first one on whose name begins so; on recorded inputs, none needs those before it.
    """
    with mutant.applied(), jax.default_matmul_precision("highest"):
        network = mutant.network(recorded.network)
        walk = Walk(recorded.tensors, epsilon("float32"), accumulate=False)
        steps = operations(recorded.case, network, recorded.tensors.get("anchors"))
        later = itertools.dropwhile(lambda step: not step.name.startswith(begin), steps)
        return first_difference(walk.rows(itertools.islice(later, count)))


def _given(**changes: Any) -> Replacement:
    """The same function, called with other keyword arguments."""
    return lambda old: lambda *args, **kwargs: old(*args, **{**kwargs, **changes})


def _norm(wrong: float, only: float | None = None) -> Replacement:
    """layer_norm with a wrong epsilon; of those with the epsilon `only`."""

    def replace(old: Any) -> Any:
        def norm(compute: Any, eps: float = 1e-5, **kwargs: Any) -> Any:
            return old(compute, wrong if only in (None, eps) else eps, **kwargs)

        return norm

    return replace


def _constant(value: Any) -> Replacement:
    return lambda old: value


TANH_GELU = _constant(functools.partial(nn.gelu, approximate=True))


def _pairs_of_neighbours(old: Any) -> Any:
    """Rotary pairs (2i, 2i + 1) instead of (i, i + W / 2)."""

    def rotate(x: jax.Array, *rotary: Any) -> jax.Array:
        halves = jnp.concatenate([x[..., ::2], x[..., 1::2]], -1)
        y = old(halves, *rotary)
        first, second = jnp.split(y, 2, -1)
        return jnp.stack([first, second], -1).reshape(x.shape)

    return rotate


def _swapped_heads(old: Any) -> Any:
    return lambda q, k, v, **kwargs: old(q, k[:, :, ::-1], v[:, :, ::-1], **kwargs)


def _without_value_bias(old: Any) -> Any:
    def project(*args: Any, **kwargs: Any) -> Any:
        return old(*args, **({**kwargs, "use_bias": False} if kwargs.get("name") == "v_proj" else kwargs))

    return project


def _channels_first_patches(old: Any) -> Any:
    return lambda x, pattern, **sizes: old(x, pattern.replace("(p q c)", "(c p q)"), **sizes)


def _next_anchor(old: Any) -> Any:
    def select(frame: Any, frames: Any, available: Any, limit: int) -> Any:
        slots, chosen = old(frame, frames, available, limit + 1)
        return slots[1:], chosen[1:]

    return select


def _one_later(old: Any) -> Any:
    def after_cache(self: Any, embeds: Any, mask: Any, cache: Any, *args: Any) -> Any:
        return old(self, embeds, mask, dataclasses.replace(cache, length=cache.length + 1), *args)

    return after_cache


def _float32_memories(old: Any) -> Any:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        old(self, *args, **kwargs)
        self.memory_dtype = jnp.dtype(jnp.float32)

    return init


def _least_iou(old: Any) -> Any:
    return lambda masks: old(dataclasses.replace(masks, ious=-masks.ious))


def _sam2(**changes: Any) -> Replacement:
    return lambda cfg: dataclasses.replace(cfg, sam2=dataclasses.replace(cfg.sam2, **changes))


def _other_layer(index: int, change: Replacement) -> Replacement:
    def replace(stacked: np.ndarray) -> np.ndarray:
        out = stacked.copy()
        out[index] = change(stacked[index])
        return out

    return replace


def _last(value: Any) -> Replacement:
    """The same function, called with another last argument."""
    return lambda old: lambda *args: old(*args[:-1], value)


def _filled(value: float) -> Replacement:
    return lambda x: np.full_like(x, value)


def _reversed_tokens(old: Any) -> Any:
    return lambda x, *args: old(x[:, ::-1], *args)[:, ::-1]


def _one_earlier(old: Any) -> Any:
    return lambda *args: [max(i - 1, 0) for i in old(*args)]


def _rolled(old: Any) -> Any:
    return lambda *args: np.roll(old(*args), 1, 0)


def _halved(old: Any) -> Any:
    return lambda *args: 0.5 * old(*args)


def _ten_epsilons(old: Any) -> Any:
    return lambda compute, eps, **kwargs: old(compute, 10 * eps, **kwargs)


def _shifted_windows(old: Any) -> Any:
    return lambda x, side: old(jnp.roll(x, 1, 1), side)


def _mean_of_extremes(old: Any) -> Any:
    return lambda x: 0.5 * (old(x) - old(-x))


def _zero(old: Any) -> Any:
    return lambda x: 0 * old(x)


def _flipped_kernel(old: Any) -> Any:
    return lambda x, kernel: old(x, kernel[::-1])


def _backward(old: Any) -> Any:
    return lambda time, width: old(-time, width)


def _turned_back(old: Any) -> Any:
    return lambda x, angles: old(x, -angles)


def _transposed(kernel: np.ndarray) -> np.ndarray:
    return kernel.swapaxes(1, 2)


def _tanh_inside(old: Any) -> Any:
    def call(self: Any, x: jax.Array) -> Any:
        with unittest.mock.patch.object(memory, "gelu", functools.partial(nn.gelu, approximate=True)):
            return old(self, x)

    return call


SECOND_ZERO, SECOND_TURNED = _other_layer(1, np.zeros_like), _other_layer(1, np.transpose)
SAM, SAM_BLOCK = "sam2/mask_decoder", "sam2/mask_decoder/blocks_1"
TRUNK, O_PROJ = "sam2/image_encoder/trunk", "llm/layers/attn/o_proj/kernel"
MERGING = "video / token merging"
NO_SCALE = types.SimpleNamespace(sqrt=lambda x: 1.0, isqrt=math.isqrt)
FIRST, LAYER0 = "image / block 0", "language / layer 0"
MEMORIES, MEMORY0 = "frame 1 / memories", "frame 1 / memory layer 0"
DECODER, ENCODER = "anchor 0 / decoder", "anchor 0 / memory encoder"  # what the operations' names begin with

MUTANTS = [
    Mutant("frames resized bicubic", "image / pixels", ((encoders, "sam_pixels", _last("bicubic")),)),
    Mutant("position table bilinear", "image / patches", ((hiera, "resize_matrix", _last("bilinear")),)),
    Mutant("windows shifted by one", FIRST, ((hiera, "to_windows", _shifted_windows),)),
    Mutant("layer norm's epsilon 1e-5 for 1e-6", FIRST, ((hiera, "layer_norm", _norm(1e-5)),)),
    Mutant("tanh-GELU in Hiera", FIRST, ((hiera, "gelu", TANH_GELU),)),
    Mutant("mean pooling", "image / block 1", ((hiera, "max_pool_2x", _mean_of_extremes),)),
    Mutant("bias of one block dropped", "image / block 3", params=(f"{TRUNK}/blocks3/attn/qkv/bias", np.zeros_like)),
    Mutant("pyramid without its top", "image / pyramid", ((hiera, "upsample_nearest_2x", _zero),)),
    Mutant("patches with channels first", "video / patches", ((umt, "rearrange", _channels_first_patches),)),
    Mutant("frame positions shifted by one", "video / patches", ((umt, "sinusoid_table", _rolled),)),
    Mutant("tanh-GELU in UMT", "video / block 0", ((umt, "gelu", TANH_GELU),)),
    Mutant("value bias of one block dropped", "video / block 1", params=("vision/layers/attn/v_bias", SECOND_ZERO)),
    Mutant("final norm's epsilon 1e-5 for 1e-12", "video / final norm", ((umt, "layer_norm", _norm(1e-5, 1e-12)),)),
    Mutant("tokens merged from the other end", MERGING, ((projector, "merge_tokens", _reversed_tokens),)),
    Mutant("tanh-GELU in the projector", "video / projector", ((projector, "gelu", TANH_GELU),)),
    Mutant("gate as initialised", "language / initial fusion", params=("initial_fusion/gate", _filled(0.1))),
    Mutant("RMS norm's epsilon 1e-5 for 1e-6", LAYER0, ((qwen2, "RmsNorm", _ten_epsilons),)),
    Mutant("rotary pairs of neighbours", LAYER0, ((qwen2, "rotate_halves", _pairs_of_neighbours),)),
    Mutant("rotary base 10,000", LAYER0, ((qwen2, "rotary_table", _last(1e4)),)),
    Mutant("swapped key and value heads", LAYER0, ((qwen2, "attention", _swapped_heads),)),
    Mutant("not causal", LAYER0, ((qwen2, "attention", _given(causal=False, q_positions=None)),)),
    Mutant("value bias dropped", LAYER0, ((qwen2, "LoraDense", _without_value_bias),)),
    Mutant("one layer's kernel transposed", "language / layer 1", params=(O_PROJ, SECOND_TURNED)),
    Mutant("final norm's scale not loaded", "language / final norm", params=("llm/norm/scale", np.ones_like)),
    Mutant("text one position late", "language / video, then text", ((qwen2.Qwen2, "after_cache", _one_later),)),
    Mutant("half the distance in time", "fusion / layer 0", ((st_fusion, "spacetime_angles", _halved),)),
    Mutant("logits not scaled", "fusion / layer 0", ((st_fusion, "math", _constant(NO_SCALE)),)),
    Mutant("anchors one frame early", "anchors / choice", ((cases, "eval_anchors", _one_earlier),)),
    Mutant("tracked frames resized bilinear", "frame 0 / features", ((encoders, "resize_frames", _last("bilinear")),)),
    Mutant("no-memory embedding dropped", f"{DECODER} entry", params=("sam2/no_memory_embed", np.zeros_like)),
    Mutant(
        "decoder norm's epsilon 1e-6 for 1e-5", f"{DECODER} block 0", ((mask_decoder, "layer_norm", _norm(1e-6, 1e-5)),)
    ),
    Mutant("second block's bias dropped", f"{DECODER} block 1", params=(f"{SAM_BLOCK}/mlp/layer1/bias", np.zeros_like)),
    Mutant("final norm's bias dropped", f"{DECODER} attention", params=(f"{SAM}/final_norm/bias", np.zeros_like)),
    Mutant("upscaling kernel flipped", f"{DECODER} masks", params=(f"{SAM}/upscale0/kernel", lambda x: x[:, ::-1])),
    Mutant("upscaling kernel transposed", f"{DECODER} masks", params=(f"{SAM}/upscale1/kernel", _transposed)),
    Mutant("tanh-GELU in upscaling", f"{DECODER} masks", ((mask_decoder, "gelu", TANH_GELU),)),
    Mutant("IoU without sigmoid", f"{DECODER} scores", ((mask_decoder, "Mlp", _given(sigmoid_output=False)),)),
    Mutant("mask of the least predicted IoU", f"{DECODER} choice", ((sam2, "best_mask", _least_iou),)),
    Mutant("pointer bias dropped", f"{DECODER} choice", params=("sam2/pointer_proj/layer2/bias", np.zeros_like)),
    Mutant("mask bias -9.5 for -10", f"{ENCODER} mask", config=_sam2(mem_sigmoid_bias=-9.5)),
    Mutant("tanh-GELU in the mask's convolutions", f"{ENCODER} mask", ((memory, "gelu", TANH_GELU),)),
    Mutant("image bias dropped", f"{ENCODER} sum", params=("sam2/memory_encoder/image_proj/bias", np.zeros_like)),
    Mutant("depthwise kernel flipped", f"{ENCODER} fuser 0", ((memory, "shifted_depthwise", _flipped_kernel),)),
    Mutant("tanh-GELU in the fuser", f"{ENCODER} fuser 0", ((memory.ConvNextBlock, "__call__", _tanh_inside),)),
    Mutant(
        "second scale not loaded",
        f"{ENCODER} fuser 1",
        params=("sam2/memory_encoder/fuser1/gamma", np.ones_like),
    ),
    Mutant("memories in float32", f"{ENCODER} output", ((tracker.Tracker, "__init__", _float32_memories),)),
    Mutant("the next anchor", MEMORIES, ((tracker, "select_anchors", _next_anchor),)),
    Mutant("temporal codes off by one", MEMORIES, params=("sam2/time_embed", lambda x: np.roll(x, 1, 0))),
    Mutant("pointers' time with the other sign", MEMORIES, ((sam2, "sine_1d", _backward),)),
    Mutant("memory norm's epsilon 1e-4 for 1e-5", MEMORY0, ((memory, "layer_norm", _norm(1e-4, 1e-5)),)),
    Mutant("memory rotation reversed", MEMORY0, ((memory, "rotate_halves", _turned_back),)),
]
