"""Where a compiled TPU program spends its time: its schedule, played through with the compiler's own estimates.

The TPU compiler writes beside every operation of a scheduled module how many cycles it takes it for. Operations run one
after the other. Collectives and copies that have a start and a done run beside them, and what is not over at the done
is waited for. A loop takes its body's time as often as it turns.

How far to trust it (libtpu 0.0.42): a product of 4096 x 4096 x 4096 in bfloat16 comes out at 97 % of a v5e's rate.
Operations that only move data or work element by element come out two to three times slower than their bytes over the
bandwidth. There are therefore two figures: `estimated` takes the compiler's word and is an upper bound; `at_bandwidth`
takes such operations as fast as memory allows. Nothing here is measured.
"""

import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from virst_jax.profiling.collectives import BEGIN, DONE, KIND_BETWEEN_SLICES, KINDS, PIECE, collective, group_size
from virst_jax.profiling.flops import Device
from virst_jax.profiling.hlo import Array, Instruction, Module
from virst_jax.profiling.interconnect import Fabric

PRODUCTS, KERNELS, MOVES, MEMORY = "products", "kernels", "element-wise and moves", "waiting for memory"
HOST, ICI, NETWORK = "waiting for the host", "waiting for ICI", "waiting for the network"
WAITING = (MEMORY, HOST, ICI, NETWORK)
CATEGORIES = (PRODUCTS, KERNELS, MOVES, *WAITING)

KERNEL_SHARE = 0.6  # of the matrix units' rate that attention kernels are taken to reach
VECTOR_BYTES = 4096  # that a core's vector unit loads or stores in a cycle

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NO_ESTIMATE = 2**63 - 1
_COST = re.compile(r'"cost_estimate":\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"')
_LAYOUT = re.compile(r"operand_layout_constraints=\{(.*?)\}(?:, [a-z_]+=|$)")
_SEND = re.compile(r' (send|recv)\(.*_xla_host_transfer_handler_name="xla_megascale_runtime"')
_IN_PLACE = "output_to_operand_aliasing={{}: (0, {})}"
_TAKES_PART = frozenset({"dynamic-slice", "slice", "gather"})  # of their first operand
_FREE = frozenset({"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id"})

Key = tuple[str, str]  # op_name, category


@dataclass
class Spent:
    """Seconds of one run of a computation, and what they went into."""

    seconds: float = 0.0
    by: defaultdict[Key, float] = field(default_factory=lambda: defaultdict(float))
    hidden: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))  # transfers beside operations
    started_early: int = 0  # collectives that had a start and a done
    at_once: int = 0  # collectives that nothing runs beside
    unread_loops: int = 0
    operations: int = 0  # that were counted, turns of loops included
    without_estimate: Counter[str] = field(default_factory=Counter)  # runs of operations, by op_name

    def add(self, key: Key, seconds: float) -> None:
        self.seconds += seconds
        self.by[key] += seconds

    def include(self, other: "Spent", times: int) -> None:
        self.seconds += times * other.seconds
        for key, value in other.by.items():
            self.by[key] += times * value
        for category, value in other.hidden.items():
            self.hidden[category] += times * value
        self.started_early += times * other.started_early
        self.at_once += times * other.at_once
        self.unread_loops += other.unread_loops
        self.operations += times * other.operations
        for name, count in other.without_estimate.items():
            self.without_estimate[name] += times * count

    def category(self, name: str) -> float:
        return sum(seconds for (_, category), seconds in self.by.items() if category == name)


class Schedule:
    """A module's schedule on a chip.

    Args:
      text: Compiled.as_text().
      device: the chip's data sheet.
      fabric: what joins the chips.
    """

    def __init__(self, text: str, device: Device, fabric: Fabric):
        self.module = Module.parse(text)
        self.device, self.fabric = device, fabric
        self.has_products = functools.cache(self._has_products)

    def estimated(self) -> Spent:
        """By the compiler's estimates, or by bytes over bandwidth where that takes longer."""
        return _Play(self, at_bandwidth=False).run(self.module.entry)

    def at_bandwidth(self) -> Spent:
        """The same, with operations without products as fast as memory and vector unit allow."""
        return _Play(self, at_bandwidth=True).run(self.module.entry)

    def operation(self, one: Instruction, computation: str, at_bandwidth: bool) -> tuple[str, float] | None:
        """Category and seconds of an operation; None: nothing is known of it."""
        chip = self.fabric.chip
        # a piece of a collective hands on the collective's buffers, which it does not move
        hbm, fast = (0.0, 0.0) if self.holds_piece(one) else self.moved(one, computation)
        by_bytes = hbm / self.device.bandwidth
        if 'custom_call_target="tpu_custom_call"' in one.line:
            flops = kernel_flops(one)
            if (cost := _COST.search(one.line)) and flops is None:
                flops, by_bytes = float(cost[1]), float(cost[2]) / self.device.bandwidth
            if flops is None:
                return None
            return KERNELS, max(flops / (KERNEL_SHARE * self.device.flops), by_bytes)
        found = _CYCLES.search(one.line)
        if not found:
            return None
        # the largest integer says that the compiler has no estimate; its bytes are counted then
        estimate = 0.0 if int(found[1]) == _NO_ESTIMATE else int(found[1]) / chip.clock
        if one.opcode in ("convolution", "dot") or any(map(self.has_products, calls(one))):
            return PRODUCTS, max(estimate, by_bytes)
        if at_bandwidth:
            return MOVES, max(by_bytes, (hbm + fast) / VECTOR_BYTES / chip.clock)
        return MOVES, max(estimate, by_bytes)

    def _has_products(self, computation: str) -> bool:
        found = self.module.instructions.get(computation, {}).values()
        return any(
            one.opcode in ("convolution", "dot") or any(self.has_products(called) for called in calls(one))
            for one in found
        )

    def holds_piece(self, one: Instruction) -> bool:
        """Whether an operation is fused with a part of a collective that runs beside it."""
        return any(PIECE.search(line) for called in calls(one) for line in self.module.bodies.get(called, ()))

    def moved(self, one: Instruction, computation: str) -> tuple[float, float]:
        """Bytes that an operation reads from and writes to HBM, and those in fast memory; none of the host's."""
        around = self.module.instructions[computation]
        inner = self.module.instructions.get(next(iter(calls(one)), ""), {}) if one.opcode == "fusion" else {}
        sizes = list(self._written(one, inner))
        for place, name in enumerate(one.operands):
            if name in around:
                sizes += self._read(around[name].result, place, inner)
        sizes = [(array, size) for array, size in sizes if not array.on_host]
        return _sum(sizes, on_chip=False), _sum(sizes, on_chip=True)

    def _written(self, one: Instruction, inner: dict[str, Instruction]) -> list[tuple[Array, float]]:
        def through_bitcasts(name: str) -> Instruction | None:
            found = inner.get(name)
            while found is not None and found.opcode == "bitcast" and found.operands[0] in inner:
                found = inner[found.operands[0]]
            return found

        root = through_bitcasts(next((x.name for x in inner.values() if x.is_root), ""))
        makers: list[Instruction | None] = [root]
        if root is not None and root.opcode == "tuple":
            makers = [through_bitcasts(name) for name in root.operands]
        written = [(array, array.size) for array in one.result]
        for i, maker in enumerate(makers):
            if maker is not None and maker.opcode == "dynamic-update-slice" and maker.operands[1] in inner:
                written[i] = one.result[i], inner[maker.operands[1]].result[0].size  # in its place: the rest stays
        return written

    def _read(self, result: tuple[Array, ...], place: int, inner: dict[str, Instruction]) -> list[tuple[Array, float]]:
        read = self._part_read(inner, place)
        if read is None:
            return [(array, array.size) for array in result]
        return [(array, min(read, array.size) if i == 0 else 0.0) for i, array in enumerate(result)]

    def _part_read(self, inner: dict[str, Instruction], place: int) -> float | None:
        """Bytes that a computation reads of a parameter of which it takes slices; None: it reads all of it."""
        names = [one.name for one in inner.values() if f" parameter({place})" in one.line]
        total, found = 0.0, False
        while names:
            name = names.pop()
            for user in inner.values():
                if name not in user.operands:
                    continue
                found = True
                if user.opcode in _TAKES_PART and user.operands[0] == name:
                    total += sum(array.size for array in user.result)
                elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                    continue  # what is not overwritten stays
                elif user.opcode == "bitcast" or (user.opcode == "fusion" and _IN_PLACE in user.line):
                    names.append(user.name)  # integers are read in other tiles, where they lie
                elif user.opcode == "fusion":  # stacked weights are sliced within the product that takes them
                    called = self.module.instructions.get(next(iter(calls(user)), ""), {})
                    for index, operand in enumerate(user.operands):
                        part = self._part_read(called, index) if operand == name else 0.0
                        if part is None:
                            return None
                        total += part
                else:
                    return None
        return total if found else None


def _sum(sizes: Iterable[tuple[Array, float]], on_chip: bool) -> float:
    return sum(size for array, size in sizes if array.on_chip == on_chip)


def calls(one: Instruction) -> list[str]:
    """Computations that are fused in an operation."""
    return re.findall(r"calls=%?([\w.\-]+)", one.line)


class _Play:
    """One way of counting, played through the computations of a schedule."""

    def __init__(self, schedule: Schedule, at_bandwidth: bool):
        self.of, self.at_bandwidth = schedule, at_bandwidth
        self.known: dict[str, Spent] = {}

    def run(self, name: str) -> Spent:
        if name not in self.known:
            self.known[name] = _Run(self, name).play()
        return self.known[name]


class _Run:
    """A computation with a clock. Transfers of one kind of link follow one another; all links are idle at first."""

    def __init__(self, play: _Play, name: str):
        self.play_, self.name = play, name
        self.here = play.of.module.instructions[name]
        self.spent = Spent()
        self.busy: dict[str, float] = {}  # until when, by link
        self.flying: dict[object, tuple[str, str, float, float]] = {}  # what it is for, category, seconds, its end

    def play(self) -> Spent:
        for one in self.here.values():
            if one.opcode not in _FREE:
                self._take(one)
        for key in list(self.flying):  # what nobody waits for ends with the computation at the latest
            self._wait(key)
        return self.spent

    def _take(self, one: Instruction) -> None:
        module, spent = self.play_.of.module, self.spent
        if one.opcode == "while":
            times = module.trip_counts.get(one.line)
            spent.unread_loops += times is None
            spent.include(self.play_.run(_attribute(one, "body")), times or 1)
        elif one.opcode == "conditional":
            branches = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", one.line)
            if listed := re.search(r"branch_computations=\{([^}]*)\}", one.line):
                branches += [name.strip().lstrip("%") for name in listed[1].split(",")]
            runs = [self.play_.run(branch) for branch in branches if branch in module.bodies]
            if runs:
                spent.include(max(runs, key=lambda run: run.seconds), 1)
        elif one.opcode == "call":
            spent.include(self.play_.run(_attribute(one, "to_apply")), 1)
        elif one.opcode.endswith("-done"):
            self._wait(one.operands[0] if one.operands else "")
        elif one.opcode.endswith("-start") or _SEND.search(one.line):
            self._start(one)
        elif one.opcode in KINDS:
            found = collective(one.line)
            assert found is not None
            spent.at_once += 1
            spent.add((one.op_name, ICI), self._of_collective(one.line, found))
        else:
            self._operate(one)

    def _operate(self, one: Instruction) -> None:
        """An operation of the core; a piece of a collective may stand in its fusion."""
        begins = ends = None
        for called in calls(one):
            lines = self.play_.of.module.bodies.get(called, ())
            for inner in self.play_.of.module.instructions.get(called, {}).values():
                if (found := collective(inner.line)) is None:
                    continue
                if piece := PIECE.search(inner.line):
                    key = ("piece", piece[1], piece[2])
                    ends = key if any(DONE in line for line in lines) else None
                    begins = (key, inner.line, found) if any(BEGIN in line for line in lines) else None
                else:  # a collective that the fusion holds whole
                    self.spent.at_once += 1
                    self.spent.add((one.op_name, ICI), self._of_collective(inner.line, found))
        if begins:
            key, line, found = begins
            self._fly(key, one.op_name, ICI, "ici", self._of_collective(line, found))
        if ends:
            self._wait(ends)
        taken = self.play_.of.operation(one, self.name, self.play_.at_bandwidth)
        if taken is not None:
            self.spent.operations += 1
            self.spent.add((one.op_name or one.name, taken[0]), taken[1])
        if _has_no_estimate(one, known=taken is not None):
            self.spent.without_estimate[one.op_name or one.name] += 1

    def _of_collective(self, line: str, found: tuple[str, int, int]) -> float:
        kind, payload, _ = found
        return self.play_.of.fabric.seconds(kind, payload, group_size(line))

    def _start(self, one: Instruction) -> None:
        schedule = self.play_.of
        if _SEND.search(one.line):
            if one.opcode == "send" and (found := collective(one.line)):
                self._fly(one.name, one.op_name, NETWORK, "network", schedule.fabric.between_slices(found[1]))
            return
        if found := collective(one.line):
            assert found[0] != KIND_BETWEEN_SLICES
            pairs = re.search(r"source_target_pairs=(\{\{.*?\}\})", one.line)
            link = pairs[1] if pairs else "ici"  # permutes of other pairs take other links, or other directions
            self._fly(one.name, one.op_name, ICI, link, self._of_collective(one.line, found))
        elif any(array.on_host for array in one.result):
            # a slice of what lies there, beside scalars that say where; both directions at once
            size = min(array.size for array in one.result if array.dims)
            link = "from host" if one.opcode.startswith("dynamic-slice") else "to host"
            self._fly(one.name, one.op_name, HOST, link, size / schedule.fabric.chip.host)
        else:  # between HBM and fast memory: the source or the target counts, whichever is in HBM
            size = max((array.size for array in one.result if array.dtype not in ("u32", "s32")), default=0.0)
            if one.opcode == "slice-start":
                size = min((array.size for array in one.result if len(array.dims) > 1), default=size)
            self._fly(one.name, one.op_name, MEMORY, "memory", size / schedule.device.bandwidth)

    def _fly(self, key: object, op_name: str, category: str, link: str, seconds: float) -> None:
        end = max(self.spent.seconds, self.busy.get(link, 0.0)) + seconds
        self.busy[link] = end
        self.flying[key] = (op_name, category, seconds, end)
        self.spent.started_early += category not in (MEMORY, HOST)

    def _wait(self, key: object) -> None:
        if key not in self.flying:
            return
        op_name, category, seconds, end = self.flying.pop(key)
        waited = max(0.0, end - self.spent.seconds)
        self.spent.add((op_name, category), waited)
        self.spent.hidden[category] += max(0.0, seconds - waited)


def _has_no_estimate(one: Instruction, known: bool) -> bool:
    """Whether an operation's time is not known, or by its bytes alone."""
    if 'custom_call_target="tpu_custom_call"' in one.line:
        return not known
    return f'"estimated_cycles":"{_NO_ESTIMATE}"' in one.line


def _attribute(one: Instruction, name: str) -> str:
    found = re.search(rf"\b{name}=%?([\w.\-]+)", one.line)
    return found[1] if found else ""


def kernel_flops(one: Instruction) -> float | None:
    """Of an attention kernel, by the shapes of its operands; None: it is none.

    The products of a forward kernel are two (scores, weighted values); of the kernel of its gradient five (scores,
    their gradient, those of queries, keys and values).
    """
    layout = _LAYOUT.search(one.line)
    if not layout:
        return None
    shapes = [[int(n) for n in dims.split(",")] for dims in re.findall(r"\w+\[([\d,]+)\]", layout[1])]
    for q, k, v in zip(shapes, shapes[1:], shapes[2:]):
        # a batch is another axis before the heads
        if len(q) == len(k) == len(v) >= 3 and q[-1] == k[-1] and k[-2] == v[-2] and min(q[-2], k[-2]) >= 64:
            pairs = float(max(math.prod(q[:-2]), math.prod(k[:-2])) * q[-2] * k[-2])
            of_scores, of_values = 2 * pairs * q[-1], 2 * pairs * v[-1]
            if "dkv" in one.line.split("=")[0] or "_dkv" in one.op_name:
                return 3 * of_scores + 2 * of_values
            return of_scores + of_values
    return None
