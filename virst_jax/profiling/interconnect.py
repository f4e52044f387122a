"""What a chip's clock, links and network do, and how long a collective takes on them by its bytes.

Figures are those of Google Cloud's pages of the TPU versions: inter-chip interconnect (ICI) per chip, divided by its
ports, and the data-centre network of a pod, divided by its chips; of GPUs those of NVIDIA's data sheets. Of links to
hosts, Google publishes that of TPU v4, 16 GB/s each way. Those of v5e and v5p are taken to be alike, and that of v6e to
be twice as fast. Nothing here is measured.
"""

import math
import re
from dataclasses import dataclass

from virst_jax.errors import UserError

HOP = 1e-6  # seconds that a message takes from chip to chip, beside its bytes


@dataclass(frozen=True)
class Chip:
    clock: float  # Hz, by which the compiler's cycles become seconds
    link: float  # bytes a second of one link, one way
    wraps: int  # an axis of the slice is a ring if its length is a multiple of this
    network: float  # bytes a second to other slices
    host: float  # bytes a second to the host's memory, and as many from it


CHIPS = {
    "v5e": Chip(1.5e9, 50e9, 16, 3.125e9, 16e9),
    "v5p": Chip(1.75e9, 100e9, 4, 6.25e9, 16e9),
    "v6e": Chip(1.75e9, 100e9, 16, 12.5e9, 32e9),
}
# GPUs of one machine, as a ring of both directions at the rate with which a GPU sends
SWITCHED = {
    "a100": Chip(1.41e9, 150e9, 1, 25e9, 32e9),  # NVLink 3
    "h100": Chip(1.98e9, 225e9, 1, 50e9, 64e9),  # NVLink 4
    "h200": Chip(1.98e9, 225e9, 1, 50e9, 64e9),
    "l4": Chip(2.04e9, 16e9, 1, 12.5e9, 32e9),  # PCI Express 4.0 x16
    "rtx4090": Chip(2.52e9, 16e9, 1, 12.5e9, 32e9),
}


@dataclass(frozen=True)
class Fabric:
    """The chips of a slice and what joins them.

    Collectives are taken to run over the longest axes of the slice that hold their group, on all links of these axes,
    and one at a time. That neighbours of a mesh axis are neighbours on the wire is sharding.make_mesh's doing.
    """

    chip: Chip
    shape: tuple[int, ...]  # of the slice, chips along each axis

    @classmethod
    def of(cls, topology: str) -> "Fabric":
        """That of a topology such as v5e:4x4.

        Raises:
          UserError: nothing is known of it.
        """
        kind, _, shape = topology.partition(":")
        chips = CHIPS | SWITCHED
        if kind not in chips or not re.fullmatch(r"\d+(x\d+)*", shape):
            raise UserError(f"topology {topology}: no times are known of it, but of {', '.join(chips)}")
        return cls(chips[kind], tuple(int(n) for n in shape.split("x")))

    def _axes(self, group: int) -> list[int]:
        """Lengths of the axes that a group extends over; group 0: all."""
        lengths: list[int] = []
        for length in sorted((n for n in self.shape if n > 1), reverse=True):
            if group and math.prod(lengths) >= group:
                break
            lengths.append(length)
        return lengths or [1]

    def seconds(self, kind: str, payload: int, group: int) -> float:
        """How long a collective within the slice takes.

        Args:
          kind: of collectives.KINDS.
          payload: bytes, as of collectives.Traffic.
          group: chips that take part; 0: all.
        """
        axes = self._axes(group)
        rings = [length % self.chip.wraps == 0 for length in axes]
        hops = sum(length / 2 if ring else length - 1 for length, ring in zip(axes, rings))
        rate = self.chip.link * sum(2 if ring else 1 for ring in rings)
        count = group or math.prod(axes)
        share = (count - 1) / count
        if kind == "collective-permute":
            return payload / self.chip.link + HOP
        if kind == "all-to-all":  # a byte passes so many links of an axis on average
            passed = max(length / (4 if ring else 3) for length, ring in zip(axes, rings))
            return payload * share * max(1.0, passed) / (2 * rate) + hops * HOP
        passes = 2 if kind == "all-reduce" else 1
        return passes * (payload * share / rate + hops * HOP)

    def between_slices(self, payload: int) -> float:
        """How long a transfer to another slice takes, seconds."""
        return payload / self.chip.network
