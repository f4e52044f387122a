"""What a compiled program sends between devices, read from its HLO text.

XLA has no count of its own. A collective in a loop counts as often as the loop runs (its trip count), which can be read
where the loop's condition compares with a constant, as that of lax.scan does.

TPUs hide a collective behind products by spreading it over pieces of several fusions; the pieces of one collective
share a channel and a chain, and count once. What crosses the network between slices is no collective in the text of a
TPU's program, but a transfer to the host (KIND_BETWEEN_SLICES).
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass

KIND_BETWEEN_SLICES = "between slices"
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", KIND_BETWEEN_SLICES)

_BYTES = {"pred": 1, "token": 0, "opaque": 0, "bf16": 2}
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_OPCODE = re.compile(r"(?:^|\s)(?P<op>[a-z][a-z0-9\-]*)\(")
_ARRAY = re.compile(r"\b(?P<dtype>[a-z][a-z0-9]*)\[(?P<dims>[\d,<=]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation|async_execution_thread)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_PIECE = re.compile(r'channel_id=(\d+).*chain_id="(\d+)"')
_BETWEEN_SLICES = re.compile(r" send\(.*_xla_host_transfer_handler_name=\"xla_megascale_runtime\"")
_TRIP = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


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
    entry, bodies = _computations(hlo)
    trip_counts = _trip_counts(bodies)
    per_kind: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    unknown: set[str] = set()
    own: dict[str, list[tuple[str, int, int]]] = {}  # collectives of a computation: kind, payload, sent
    pieces: dict[str, dict[tuple[str, str], tuple[str, int, int]]] = {}  # of a computation, by channel and chain
    calls: dict[str, list[tuple[str, int, bool, str]]] = {}
    for name, lines in bodies.items():
        own[name], calls[name], pieces[name] = [], [], {}
        for line in lines:
            found = _collective(line)
            if found and (piece := _PIECE.search(line)):
                pieces[name][piece[1], piece[2]] = found
            elif found:
                own[name].append(found)
            for callee in _callees(line):
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

    visit(entry, 1, set())
    return {kind: Traffic(*per_kind[kind]) for kind in KINDS if kind in per_kind}, len(unknown)


def _computations(hlo: str) -> tuple[str, dict[str, list[str]]]:
    """The name of the entry computation, and every computation's instructions."""
    entry, name = "", ""
    bodies: dict[str, list[str]] = {}
    for line in hlo.splitlines():
        if name:
            if line.rstrip() == "}":  # attributes of a kernel run over several lines, which may begin with a brace
                name = ""
            else:
                bodies[name].append(line)
        elif (match := _COMPUTATION.match(line)) and not line.startswith("HloModule"):
            name = match["name"]
            bodies[name] = []
            if match["entry"]:
                entry = name
    if not entry:
        raise ValueError("no ENTRY computation: not the text of an HLO module")
    return entry, bodies


def _trip_counts(bodies: dict[str, list[str]]) -> dict[str, int]:
    """The trip count of every `while` where it can be read, by its line."""
    counts = {}
    for lines in bodies.values():
        for line in lines:
            if " while(" not in line:
                continue
            if known := _TRIP.search(line):
                counts[line] = int(known[1])
            elif (condition := re.search(r"condition=%?([\w.\-]+)", line)) and condition[1] in bodies:
                trip_count = _compared_with(bodies[condition[1]], bodies)
                if trip_count is not None:
                    counts[line] = trip_count
    return counts


def _compared_with(condition: list[str], bodies: dict[str, list[str]]) -> int | None:
    """The one integer constant of a loop condition of the kind i < n."""
    lines = list(condition)
    for line in condition:
        lines += [inner for callee in _callees(line) for inner in bodies.get(callee, [])]
    if not any("direction=LT" in line for line in lines):
        return None
    constants = {int(m[1]) for line in lines if (m := re.search(r"[su]\d+\[\]\S* constant\((\d+)\)", line))}
    return constants.pop() if len(constants) == 1 else None


def _callees(line: str) -> list[str]:
    names = _CALLED.findall(line)
    if branches := _BRANCHES.search(line):
        names += [name.strip().lstrip("%") for name in branches[1].split(",")]
    return names


def _collective(line: str) -> tuple[str, int, int] | None:
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
    group = _group_size(line)
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


def _size(dtype: str, dims: str) -> int:
    bits = re.search(r"\d+", dtype)
    width = _BYTES.get(dtype, int(bits[0]) / 8 if bits else 4)
    return round(width * math.prod(int(d.removeprefix("<=")) for d in dims.split(",") if d))


def _group_size(line: str) -> int:
    """Devices that take part together; 0: not said, all of them."""
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return listed[1].count(",") + 1
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", named[2]) if axis in sizes)
    return 0
