"""The least that a compiled GPU program can take: its schedule, played through with data sheets.

The GPU compiler writes no estimates. Every operation is given the longer of two times: its products at the rate of the
matrix units, and the bytes that it reads and writes at the memory's bandwidth. Loops count as often as they turn. What
comes out is a roofline: real kernels reach a part of it, and the time between two kernels, some microseconds, is not in
it. Two things can be faster than that: what one operation leaves in the second-level cache for the next, and fused
attention, which the compiler has only where a GPU is. Nothing here is measured.
"""

import math
import re

from virst_jax.profiling.flops import PEAKS
from virst_jax.profiling.hlo import Array, Instruction
from virst_jax.profiling.interconnect import SWITCHED, Fabric
from virst_jax.profiling.schedule import MOVES, PRODUCTS, Schedule, Spent, calls

GPUS_OF_A_MACHINE = 8

_CONTRACTED = re.compile(r'lhs_contracting_(?:dims=\{|dimensions":\[)([\d,"]*)')
_KERNEL_LABELS = re.compile(r"dim_labels=\w+_(\w+)->\w+")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_NARROW = ("bf16", "f16", "f8", "s8")


def estimated(topology: str) -> bool:
    """Whether there is a roofline of a topology: GPUs of one machine."""
    kind, _, count = topology.partition(":")
    return kind in SWITCHED and count.isdigit() and 1 <= int(count) <= GPUS_OF_A_MACHINE


def roofline(text: str, topology: str) -> Spent:
    """The least time of a program on one GPU of a topology such as h100:1.

    Args:
      text: Compiled.as_text().
    """
    return Roofline(text, PEAKS[topology.partition(":")[0]], Fabric.of(topology)).estimated()


class Roofline(Schedule):
    """See Schedule; operations take what products and bytes take at least."""

    def operation(self, one: Instruction, computation: str, at_bandwidth: bool) -> tuple[str, float] | None:
        hbm, _ = self.moved(one, computation)
        by_products = self.product_seconds(one, computation)
        return (PRODUCTS if by_products else MOVES), max(by_products, hbm / self.device.bandwidth)

    def product_seconds(self, one: Instruction, computation: str) -> float:
        """Of the products and convolutions of an operation, those that are fused in it included."""
        around = self.module.instructions[computation]
        count = product_flops(one, around)
        total = count / self._rate(one, around) if count else 0.0
        for called in calls(one):
            total += sum(self.product_seconds(x, called) for x in self.module.instructions.get(called, {}).values())
        return total

    def _rate(self, one: Instruction, around: dict[str, Instruction]) -> float:
        given = [x.result[0].dtype for name in one.operands[:2] if (x := around.get(name)) and x.result]
        if given and all(dtype.startswith(_NARROW) for dtype in given):
            return self.device.flops
        # float32 is multiplied as TF32, at half the rate, unless full precision is asked for
        full = "HIGHEST" in one.line or "highest" in one.line or any(dtype == "f64" for dtype in given)
        return self.device.vector if full else self.device.flops / 2

    def _written(self, one: Instruction, inner: dict[str, Instruction]) -> list[tuple[Array, float]]:
        sizes = list(super()._written(one, inner))
        if one.opcode == "custom-call" and len(sizes) > 1 and _is_workspace(sizes[-1][0]):
            sizes.pop()  # room that a library may use
        return sizes


def _is_workspace(array: Array) -> bool:
    return array.dtype in ("s8", "u8") and len(array.dims) == 1


def product_flops(one: Instruction, around: dict[str, Instruction]) -> float:
    """Operations of a product or a convolution, also where a library computes it; 0: it is neither.

    Args:
      around: instructions of the computation that it stands in.
    """
    target = found[1] if (found := _TARGET.search(one.line)) else ""
    arrays = [around[name].result[0] if name in around and around[name].result else None for name in one.operands]
    if one.opcode == "dot" or target.startswith("__cublas"):
        contracted, left = _CONTRACTED.search(one.line), arrays[0] if arrays else None
        if contracted is None or left is None:
            return 0.0
        places = [int(n) for n in re.findall(r"\d+", contracted[1])]
        return 2.0 * math.prod(one.result[0].dims) * math.prod(left.dims[n] for n in places)
    labels = _KERNEL_LABELS.search(one.line)
    if labels is None or len(arrays) < 2 or (one.opcode != "convolution" and not target.startswith("__cudnn$conv")):
        return 0.0
    # each output takes the kernel's size, per output channel; backward passes exchange the three arrays
    out, kernel = one.result[0], arrays[1]
    if "BackwardInput" in target:
        out = arrays[0] or out
    elif "BackwardFilter" in target:
        out, kernel = arrays[1] or out, one.result[0]
    if kernel is None:
        return 0.0
    channels = kernel.dims[labels[1].index("o")]
    return 2.0 * math.prod(out.dims) * math.prod(kernel.dims) / max(1, channels)
