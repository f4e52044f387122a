"""The text of a compiled module (`Compiled.as_text()`): computations, instructions, sizes, and how often loops turn."""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$", re.DOTALL)
_OPCODE = re.compile(r"(?:^|\s)(?P<op>[a-z][a-z0-9\-]*)\(")
_ARRAY = re.compile(r"\b(?P<dtype>[a-z][a-z0-9]*)\[(?P<dims>[\d,<=]*)\](?P<layout>\{[^{}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation|async_execution_thread)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIP = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r" constant\((\d+)\)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
HOST = "5"  # of XLA's memory spaces
_BYTES = {"pred": 1.0, "token": 0.0, "opaque": 0.0, "bf16": 2.0}


@dataclass(frozen=True)
class Array:
    """An array of an instruction's result."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool = False  # in the fast memory of a TPU's core (VMEM and the like), not in HBM
    on_host: bool = False  # in the host's memory

    @property
    def size(self) -> float:
        """bytes"""
        return width(self.dtype) * math.prod(self.dims)


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    line: str
    result: tuple[Array, ...]
    operands: tuple[str, ...]
    is_root: bool = False

    @property
    def op_name(self) -> str:
        """Where the program asked for it, such as jit(step)/llm/layers/mlp/dot_general; empty: not said."""
        found = _OP_NAME.search(self.line)
        return found[1] if found else ""


@dataclass(frozen=True)
class Module:
    entry: str
    bodies: Mapping[str, Sequence[str]]  # the lines of every computation

    @classmethod
    def parse(cls, text: str) -> "Module":
        """Raises ValueError: it is not the text of a module."""
        entry, name = "", ""
        bodies: dict[str, list[str]] = {}
        for line in text.splitlines():
            if name:
                if line.rstrip() == "}":  # attributes of a kernel run over several lines, which may begin with a brace
                    name = ""
                elif line.startswith("  ") or not bodies[name]:
                    bodies[name].append(line)
                else:
                    bodies[name][-1] += line
            elif (match := _COMPUTATION.match(line)) and not line.startswith("HloModule"):
                name = match["name"]
                bodies[name] = []
                if match["entry"]:
                    entry = name
        if not entry:
            raise ValueError("no ENTRY computation: not the text of an HLO module")
        return cls(entry, bodies)

    @functools.cached_property
    def instructions(self) -> dict[str, dict[str, Instruction]]:
        """By computation and name, in the order of the text: of a scheduled module, that in which they run."""
        parsed = {}
        for name, lines in self.bodies.items():
            found = (instruction(line) for line in lines)
            parsed[name] = {one.name: one for one in found if one is not None}
        return parsed

    @functools.cached_property
    def trip_counts(self) -> dict[str, int]:
        """The trip count of every `while` where it can be read, by its line."""
        counts = {}
        for lines in self.bodies.values():
            for line in lines:
                if " while(" not in line:
                    continue
                if known := _TRIP.search(line):
                    counts[line] = int(known[1])
                elif (limit := self._limit(line)) is not None:
                    counts[line] = -(-limit // self._increment(line))
        return counts

    def _limit(self, loop: str) -> int | None:
        """The one integer constant of a loop condition of the kind i < n."""
        lines = list(self.bodies.get(_named(loop, "condition"), ()))
        lines += [inner for line in lines for called in callees(line) for inner in self.bodies.get(called, [])]
        if not any("direction=LT" in line for line in lines):
            return None
        constants = {int(m[1]) for line in lines if (m := re.search(r"[su]\d+\[\]\S* constant\((\d+)\)", line))}
        return constants.pop() if len(constants) == 1 else None

    def _increment(self, loop: str) -> int:
        """By how much a turn counts up; 1 where it cannot be read. The compiler unrolls loops around collectives."""
        condition = self.instructions.get(_named(loop, "condition"), {})
        body = self.instructions.get(_named(loop, "body"), {})
        counters = [
            int(place[1])
            for one in condition.values()
            if one.opcode in ("compare", "fusion")
            for name in one.operands
            if name in condition and (place := re.search(r" get-tuple-element\(.*index=(\d+)", condition[name].line))
        ]
        root = next((one for one in body.values() if one.is_root), None)
        if not counters or root is None or counters[0] >= len(root.operands):
            return 1
        value = body.get(root.operands[counters[0]])
        while value is not None and value.opcode == "copy":
            value = body.get(value.operands[0])
        if value is None or value.opcode != "add":
            return 1
        constants = [m[1] for name in value.operands if name in body and (m := _CONSTANT.search(body[name].line))]
        return max(1, int(constants[0])) if constants else 1


def _named(line: str, attribute: str) -> str:
    found = re.search(rf"{attribute}=%?([\w.\-]+)", line)
    return found[1] if found else ""


def instruction(line: str) -> Instruction | None:
    """A line of a computation; None: it holds no instruction."""
    match = _INSTRUCTION.match(line)
    if not match or not (op := _OPCODE.search(match["rest"])):
        return None
    result = tuple(map(_array, _ARRAY.finditer(match["rest"][: op.start()])))
    arguments = _arguments(match["rest"], op.end())
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(match["name"], op["op"], line, result, operands, bool(match["root"]))


def _array(match: re.Match[str]) -> Array:
    space = _SPACE.search(match["layout"] or "")
    where = space[1] if space else "0"
    return Array(match["dtype"], dims(match["dims"]), on_chip=where not in ("0", HOST), on_host=where == HOST)


def _arguments(text: str, start: int) -> str:
    """What stands in the parentheses that were opened before `start`."""
    depth = 1
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return text[start:place]
    return text[start:]


def callees(line: str) -> list[str]:
    """Computations that an instruction names."""
    names = _CALLED.findall(line)
    if branches := _BRANCHES.search(line):
        names += [name.strip().lstrip("%") for name in branches[1].split(",")]
    return names


def dims(text: str) -> tuple[int, ...]:
    return tuple(int(d.removeprefix("<=")) for d in text.split(",") if d)


def width(dtype: str) -> float:
    """Bytes of an element."""
    bits = re.search(r"\d+", dtype)
    return _BYTES.get(dtype, int(bits[0]) / 8 if bits else 4.0)
