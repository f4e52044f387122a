"""How long a compiled step will take, where the time goes, and what a stage of training costs. Not measured."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from virst_jax.profiling.flops import PEAKS
from virst_jax.profiling.interconnect import CHIPS, Fabric
from virst_jax.profiling.roofline import estimated, roofline
from virst_jax.profiling.schedule import (
    CATEGORIES,
    HOST,
    ICI,
    KERNELS,
    MEMORY,
    MOVES,
    NETWORK,
    PRODUCTS,
    WAITING,
    Schedule,
    Spent,
)

FORWARD, BACKWARD, AGAIN, REST = "forward", "backward", "again", "rest"
PASSES = (FORWARD, BACKWARD, AGAIN, REST)

_WRAPPERS = re.compile(r"^(jit|jvp|transpose|vmap|pjit|custom_jvp|custom_vjp|shard_map)\(.*\)$")
_PLUMBING = frozenset(
    ["while", "body", "cond", "closed_call", "checkpoint", "rematted_computation", "remat", "scan", "map", "shard_map"]
)
_DEPTH = 3  # levels of a module's path that are told apart


@dataclass(frozen=True)
class Prediction:
    """A step on one chip.

    slow: with the compiler's estimates; fast: with moves and element-wise operations at the memory's bandwidth. The
    truth is expected between the two. On a GPU both are the roofline, and the truth is above it.
    """

    topology: str
    chips: int
    slow: Spent
    fast: Spent
    flops: float  # of a step on one chip, forward and backward, by formula

    @property
    def is_roofline(self) -> bool:
        return self.slow is self.fast

    @property
    def seconds(self) -> float:
        """The upper of the two figures."""
        return self.slow.seconds

    def mfu(self, seconds: float) -> float:
        return self.flops / (seconds * PEAKS[self.topology.partition(":")[0]].flops)

    @property
    def bound(self) -> str:
        """The category that takes the most time, in words."""
        largest = max(CATEGORIES, key=self.slow.category)
        return {
            PRODUCTS: "the matrix units",
            KERNELS: "the attention kernels",
            MOVES: "element-wise operations and moves",
            MEMORY: "copies between memories",
            HOST: "copies to and from the host",
            ICI: "the links between chips",
            NETWORK: "the network between slices",
        }[largest]


def predicted(topology: str) -> bool:
    """Whether times can be predicted for a topology."""
    return topology.partition(":")[0] in CHIPS


def timed(topology: str) -> bool:
    """Whether times can be predicted for a topology, or bounded from below."""
    return predicted(topology) or estimated(topology)


def at_least(text: str, topology: str, flops: float = 0.0, chips: int = 1) -> Prediction:
    """The roofline of a step on GPUs of one machine; arguments as those of `predict`."""
    spent = roofline(text, topology)
    return Prediction(topology, chips, spent, spent, flops)


def predict(text: str, topology: str, flops: float = 0.0, chips: int = 1) -> Prediction:
    """Reads a step's time from its compiled text.

    Args:
      text: Compiled.as_text(), compiled with full effort: with little, a step comes out several times slower.
      topology: such as v5e:4x4, of one slice.
      flops: of a step on one chip.
      chips: of all slices.

    Raises:
      UserError: times are not predicted for this hardware.
    """
    fabric = Fabric.of(topology)
    schedule = Schedule(text, PEAKS[topology.partition(":")[0]], fabric)
    return Prediction(topology, chips, schedule.estimated(), schedule.at_bandwidth(), flops)


def part(op_name: str) -> tuple[str, str]:
    """The part of the network and the pass that an operation belongs to, by its op_name."""
    if "rematted_computation" in op_name:
        which = AGAIN
    elif "transpose(" in op_name:
        which = BACKWARD
    else:
        which = FORWARD if "jvp(" in op_name or "jit(" not in op_name else REST
    named = [step for step in _path(op_name)[:-1] if not re.fullmatch(r"[a-z]+[,a-z]*->[a-z]+", step)]
    named = [re.sub(r"^(layers|blocks)\d+$", r"\1", step) for step in named]
    if not named:
        return ("(no module)", REST if which == FORWARD else which)
    return "/".join(named[:_DEPTH]), which


def _path(op_name: str) -> list[str]:
    """Modules and operation, without loops and JAX's transformations."""
    return [step for step in _split(op_name) if not _WRAPPERS.match(step) and step not in _PLUMBING]


def dearest(spent: Spent, count: int) -> list[tuple[str, str, float]]:
    """The operations that take longest: modules and operation, category, and seconds of all its runs together."""
    found: dict[tuple[str, str], float] = {}
    for (op_name, category), seconds in spent.by.items():
        key = "/".join(_path(op_name)) or "(no module)", category
        found[key] = found.get(key, 0.0) + seconds
    rows = sorted(found.items(), key=lambda item: -item[1])[:count]
    return [(name, category, seconds) for (name, category), seconds in rows]


def _split(op_name: str) -> list[str]:
    """At the slashes that stand in no parentheses."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(op_name):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == "/" and not depth:
            parts.append(op_name[start:place])
            start = place + 1
    return [*parts, op_name[start:]]


def by_part(spent: Spent) -> dict[str, dict[str, float]]:
    """Seconds of every part of the network by pass and by category, the dearest part first."""
    parts: dict[str, dict[str, float]] = {}
    for (op_name, category), seconds in spent.by.items():
        name, which = part(op_name)
        row = parts.setdefault(name, dict.fromkeys((*PASSES, *CATEGORIES), 0.0))
        row[which] += seconds
        row[category] += seconds
    return dict(sorted(parts.items(), key=lambda item: -_together(item[1])))


def _together(row: Mapping[str, float]) -> float:
    return sum(row[which] for which in PASSES)


def print_prediction(prediction: Prediction, samples: int, console: Console | None = None, rows: int = 14) -> None:
    """Where a step's time goes, as tables.

    samples: of a step, on all chips.
    """
    console = console or Console()
    slow, fast = prediction.slow, prediction.fast
    title, columns = "predicted for {}: between the two figures", {"compiler's estimate, ms": slow}
    if prediction.is_roofline:
        title, columns = "roofline of {}: a step takes longer", {"data sheet's rates, ms": slow}
    else:
        columns["moves at bandwidth, ms"] = fast
    headings, figures = list(columns), list(columns.values())
    table = Table(title=title.format(prediction.topology), title_justify="left")
    for heading in ("", *headings):
        table.add_column(heading, justify="right" if heading else "left")
    for category in CATEGORIES:
        if any(spent.category(category) for spent in figures):
            table.add_row(category, *(f"{1e3 * spent.category(category):.1f}" for spent in figures))
    table.add_section()
    table.add_row("step", *(f"{1e3 * spent.seconds:.1f}" for spent in figures))
    at_most = ", at most" if prediction.is_roofline else ""
    if prediction.flops:
        table.add_row(f"MFU{at_most}", *(f"{prediction.mfu(spent.seconds):.1%}" for spent in figures))
    rates = (f"{samples / spent.seconds / prediction.chips:.3f}" for spent in figures)
    table.add_row(f"samples/s/chip{at_most}", *rates)
    for category in (HOST, ICI, NETWORK):
        if hidden := slow.hidden[category]:
            table.add_row(f"{category.removeprefix('waiting for ')} behind operations", f"{1e3 * hidden:.1f}")
    console.print(table)
    console.print(f"most of the time goes to {prediction.bound}")
    if slow.unread_loops or slow.without_estimate:
        console.print(
            f"not counted in full: {slow.unread_loops} loops of unknown length (once), "
            f"{sum(slow.without_estimate.values())} runs of operations without an estimate"
        )
    where = Table(title=f"by part of the network, {headings[0]}", title_justify="left")
    where.add_column("")
    for heading in ("together", *PASSES, "products", "moves", "waiting"):
        where.add_column(heading, justify="right")
    parts = by_part(slow)
    shown, rest = list(parts.items())[:rows], list(parts.values())[rows:]
    if rest:
        shown.append((f"{len(rest)} more", {key: sum(row[key] for row in rest) for key in rest[0]}))
    for name, row in shown:
        numbers = [_together(row), *(row[which] for which in PASSES)]
        numbers += [row[PRODUCTS] + row[KERNELS], row[MOVES], sum(row[name] for name in WAITING)]
        where.add_row(name, *(f"{1e3 * number:.1f}" for number in numbers))
    console.print(where)


@dataclass(frozen=True)
class StageCost:
    """A stage of training on a number of chips, by the predicted steps of its kinds of batch."""

    steps: int
    chips: int
    samples: float  # of a step, on average
    slow: float  # seconds of a step, on average
    fast: float

    @classmethod
    def of(cls, steps: int, kinds: Sequence[tuple[float, int, Prediction]]) -> "StageCost":
        """kinds: weight, samples of a step, and the step, of every kind of batch."""
        total = sum(weight for weight, _, _ in kinds)
        mean = lambda values: sum(w * v for (w, _, _), v in zip(kinds, values)) / total  # noqa: E731
        return cls(
            steps,
            kinds[0][2].chips,
            mean([samples for _, samples, _ in kinds]),
            mean([step.slow.seconds for _, _, step in kinds]),
            mean([step.fast.seconds for _, _, step in kinds]),
        )

    def hours(self, seconds: float) -> float:
        return self.steps * seconds / 3600

    def line(self) -> str:
        """One line: hours and chip-hours, without evaluations, checkpoints and compilation."""
        low, high = self.hours(self.fast), self.hours(self.slow)
        if low == high:
            return (
                f"{self.steps} steps on {self.chips} chips: at least {low:.1f} hours, {low * self.chips:.0f} "
                f"chip-hours; at most {self.samples / self.fast / self.chips:.3f} samples/s/chip"
            )
        return (
            f"{self.steps} steps on {self.chips} chips: {low:.1f} to {high:.1f} hours, {low * self.chips:.0f} to "
            f"{high * self.chips:.0f} chip-hours; {self.samples / self.slow / self.chips:.3f} to "
            f"{self.samples / self.fast / self.chips:.3f} samples/s/chip"
        )


# Weak scaling


SLICES: Mapping[str, tuple[str, ...]] = {
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16"),
}
FSDP_LIMIT = 32  # shares of the parameters in the formula; with more chips there are copies


@dataclass(frozen=True)
class Scaled:
    """A step with as many samples a chip, on another number of chips."""

    slices: int
    shape: str
    data: int  # of a slice
    fsdp: int
    seconds: float

    @property
    def mesh(self) -> str:
        return f"data={self.data} x fsdp={self.fsdp}" + (f", dcn_data={self.slices}" if self.slices > 1 else "")


def weak_scaling(
    prediction: Prediction, traffic: Mapping[str, int], fsdp: int, gradients: float, most: int = 4096
) -> dict[int, Scaled]:
    """A compiled step's time with the same samples a chip on 4 chips to `most`, by formula.

    Operations take what they take. Time on the links changes as that of the gathered bytes does, and the share of it
    that is waited for stays. The sums of gradients over copies of the parameters come to it, and nothing hides them:
    within a slice on its links, between slices on the network. Whether it fits the memory is not looked at.

    Args:
      traffic: payload of the compiled step by kind of collective, bytes; see collectives.Traffic.
      fsdp: of its mesh, in one slice without copies of the parameters.
      gradients: bytes of all trained parameters' gradients.
    """
    kind = prediction.topology.partition(":")[0]
    waited = prediction.slow.category(ICI)
    busy = prediction.slow.seconds - waited
    here = _links(Fabric.of(prediction.topology), traffic, fsdp)
    found: dict[int, Scaled] = {}
    slices, place = 1, 0
    while True:
        shape = SLICES[kind][place]
        fabric = Fabric.of(f"{kind}:{shape}")
        each = math.prod(fabric.shape)
        if slices * each > most:
            return found
        shares = min(each, FSDP_LIMIT)
        copies = each // shares
        seconds = busy + waited * _links(fabric, traffic, shares) / here
        if copies > 1:
            seconds += fabric.seconds("all-reduce", round(gradients / shares), copies)
        if slices > 1:
            seconds += fabric.between_slices(round(2 * (slices - 1) / slices * gradients / each))
        found[slices * each] = Scaled(slices, shape, copies, shares, seconds)
        if place + 1 < len(SLICES[kind]):
            place += 1
        else:
            slices *= 2


def mean_scaling(kinds: Sequence[tuple[float, Mapping[int, Scaled]]]) -> dict[int, Scaled]:
    """Of several kinds of batch by their weights."""
    total = sum(weight for weight, _ in kinds)
    mean = {chips: sum(weight * each[chips].seconds for weight, each in kinds) / total for chips in kinds[0][1]}
    return {chips: dataclasses.replace(one, seconds=mean[chips]) for chips, one in kinds[0][1].items()}


def _links(fabric: Fabric, traffic: Mapping[str, int], group: int) -> float:
    return sum(fabric.seconds(kind, payload, group) for kind, payload in traffic.items() if kind != "between slices")


def print_scaling(scaled: Mapping[int, Scaled], samples_a_chip: float, console: Console | None = None) -> None:
    """The table of weak scaling; efficiency is relative to the fewest chips."""
    console = console or Console()
    table = Table(title="weak scaling by formula, compiler's estimate", title_justify="left")
    for heading in ("chips", "slices", "mesh", "ms a step", "samples/s", "efficiency"):
        table.add_column(heading, justify="left" if heading == "mesh" else "right")
    first = next(iter(scaled.values())).seconds
    for chips, one in scaled.items():
        speed = samples_a_chip * chips / one.seconds
        numbers = (f"{1e3 * one.seconds:.0f}", f"{speed:.1f}", f"{first / one.seconds:.0%}")
        table.add_row(str(chips), f"{one.slices} x {one.shape}", one.mesh, *numbers)
    console.print(table)
