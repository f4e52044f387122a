"""What a compiled program sends between devices, read from its HLO text.

XLA has no count of its own. A collective in a loop counts as often as the loop runs (its trip count), which can be read
where the loop's condition compares with a constant, as that of lax.scan does.

TPUs hide a collective behind products by spreading it over pieces of several fusions, also of loops that it outlasts;
the pieces of one collective share a channel and a chain, and the one that begins it counts. What crosses the network
between slices is no collective in the text of a TPU's program, but a transfer to the host (KIND_BETWEEN_SLICES).
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass

from virst_jax.profiling.hlo import Module, callees, dims, width

KIND_BETWEEN_SLICES = "between slices"
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", KIND_BETWEEN_SLICES)

BEGIN, DONE = '"AsyncCollectiveStart"', '"AsyncCollectiveDone"'  # in the computations of a chain's first and last piece
PIECE = re.compile(r'channel_id=(\d+).*chain_id="(\d+)"')
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_OPCODE = re.compile(r"(?:^|\s)(?P<op>[a-z][a-z0-9\-]*)\(")
_ARRAY = re.compile(r"\b(?P<dtype>[a-z][a-z0-9]*)\[(?P<dims>[\d,<=]*)\]")
_BETWEEN_SLICES = re.compile(r" send\(.*_xla_host_transfer_handler_name=\"xla_megascale_runtime\"")


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in one step, on one device."""

    count: int  # executed
    payload: int  # bytes of the gathered, reduced or permuted arrays
    sent: int  # bytes that a device sends when the group forms a ring


def collective_traffic(hlo: str) -> tuple[dict[str, Traffic], int]:
    """Counts the collectives of a compiled module.

    Args:
      hlo: Compiled.as_text(), of one device (partitioned).

    Returns:
      Traffic of every kind that occurs, and the number of loops with collectives whose length could not be read
      (counted once).
    """
    module = Module.parse(hlo)
    bodies, trip_counts = module.bodies, module.trip_counts
    per_kind: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    unknown: set[str] = set()
    own: dict[str, list[tuple[str, int, int]]] = {}  # collectives of a computation: kind, payload, sent
    pieces: dict[str, dict[tuple[str, str], tuple[str, int, int]]] = {}  # of a computation, by channel and chain
    calls: dict[str, list[tuple[str, int, bool, str]]] = {}
    begun = {
        (piece[1], piece[2])
        for lines in bodies.values()
        if any(BEGIN in line for line in lines)
        for line in lines
        if (piece := PIECE.search(line))
    }
    for name, lines in bodies.items():
        own[name], calls[name], pieces[name] = [], [], {}
        begins = any(BEGIN in line for line in lines)
        for line in lines:
            found = collective(line)
            if found and (piece := PIECE.search(line)):
                if begins or (piece[1], piece[2]) not in begun:
                    pieces[name][piece[1], piece[2]] = found
            elif found:
                own[name].append(found)
            for callee in callees(line):
                if callee not in bodies:
                    continue
                is_body = f"body=%{callee}" in line or f"body={callee}" in line
                trip_count = trip_counts.get(line) if is_body else 1
                unread = callee if is_body and trip_count is None else ""
                calls[name].append((callee, trip_count or 1, is_body, unread))

    reached: dict[str, bool] = {}

    def has_collectives(name: str) -> bool:
        """Whether a computation, or one that it calls, has a collective."""
        if name not in reached:
            reached[name] = False
            reached[name] = bool(own[name] or pieces[name]) or any(
                has_collectives(callee) for callee, *_ in calls[name]
            )
        return reached[name]

    def add(found: tuple[str, int, int], times: int) -> None:
        kind, payload, sent = found
        for i, value in enumerate((1, payload, sent)):
            per_kind[kind][i] += times * value

    def visit(name: str, times: int, counted: set[tuple[str, str]]) -> None:
        """counted: chains of which a piece was met before in the same run of the enclosing loop's body."""
        for found in own[name]:
            add(found, times)
        for chain, found in pieces[name].items():
            if chain not in counted:
                counted.add(chain)
                add(found, times)
        for callee, trip_count, is_loop, unread in calls[name]:
            if has_collectives(callee):
                if unread:
                    unknown.add(unread)
                visit(callee, times * trip_count, set() if is_loop else counted)

    visit(module.entry, 1, set())
    return {kind: Traffic(*per_kind[kind]) for kind in KINDS if kind in per_kind}, len(unknown)


def collective(line: str) -> tuple[str, int, int] | None:
    """Kind, payload and bytes sent of an instruction, if it is a collective."""
    match = _INSTRUCTION.match(line)
    if not match or not (op := _OPCODE.search(match["rest"])):
        return None
    if _BETWEEN_SLICES.search(line):
        array = _ARRAY.search(match["rest"])
        size = _size(array["dtype"], array["dims"]) if array else 0
        return KIND_BETWEEN_SLICES, size, size
    opcode = op["op"].removesuffix("-start")
    if opcode not in KINDS:
        return None
    result = match["rest"][: op.start()]
    sizes = [_size(m["dtype"], m["dims"]) for m in _ARRAY.finditer(re.sub(r"\{[^{}]*\}", "", result))]
    group = group_size(line)
    if op["op"].endswith("-start") and opcode != "all-reduce":  # whose result alone is named
        names = re.sub(r"[\[{][^\]}]*[\]}]", "", match["rest"][op.end() :])
        operands = names.split(")")[0].count(",") + 1
        sizes = sizes[operands : 2 * operands]  # operands, results, contexts
    payload = sum(sizes)
    if opcode == "reduce-scatter":
        payload *= group  # of the operand
    share = (group - 1) / group if group else 1.0
    factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(opcode, share)
    return opcode, payload, round(payload * factor)


def _size(dtype: str, shape: str) -> int:
    return round(width(dtype) * math.prod(dims(shape)))


def group_size(line: str) -> int:
    """Devices that take part together; 0: not said, all of them."""
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return listed[1].count(",") + 1
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", named[2]) if axis in sizes)
    return 0
