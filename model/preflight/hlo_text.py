"""Reads the text of an optimised XLA module: computations, instructions, arrays with their memory space, loop trip counts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_BYTES = {
    "pred": 1.0, "s2": 0.25, "u2": 0.25, "s4": 0.5, "u4": 0.5, "s8": 1.0, "u8": 1.0, "s16": 2.0, "u16": 2.0, "s32": 4.0, "u32": 4.0,
    "s64": 8.0, "u64": 8.0, "bf16": 2.0, "f16": 2.0, "f32": 4.0, "f64": 8.0, "c64": 8.0, "c128": 16.0, "f4e2m1fn": 0.5,
    "f8e3m4": 1.0, "f8e4m3": 1.0, "f8e4m3fn": 1.0, "f8e4m3b11fnuz": 1.0, "f8e4m3fnuz": 1.0, "f8e5m2": 1.0, "f8e5m2fnuz": 1.0,
    "f8e8m0fnu": 1.0, "token": 0.0, "opaque": 0.0,
}  # fmt: skip
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) \(")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*)$", re.DOTALL)
_NAME = re.compile(r"%([\w.\-]+)")
# Results of these are their first operand, moved or retyped.
TRANSPARENT = frozenset({"bitcast", "copy", "convert", "reshape", "copy-start", "copy-done", "opt-barrier", "optimization-barrier"})


class HloError(ValueError):
    """HLO that this reader does not understand; the message quotes the line."""

    def __init__(self, problem: str, line: int, text: str) -> None:
        super().__init__(f"{problem} in line {line} of the HLO: {text.strip()[:200]}")


@dataclass(frozen=True)
class Array:
    """An array of a result: element type, dimensions, and where it lives."""

    dtype: str
    dims: tuple[int, ...]
    memory_space: int = 0  # 0 is HBM; others on the chip (vector memory, semaphores, scalar memory), 5 the host

    @property
    def bytes(self) -> float:
        """Size without the padding of the tiled layout."""
        return math.prod(self.dims) * _BYTES[self.dtype]

    @property
    def hbm_bytes(self) -> float:
        """Size if it lives in HBM, else 0."""
        return self.bytes if self.memory_space == 0 else 0.0

    def __str__(self) -> str:
        """As XLA writes it, without layout."""
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Instruction:
    """One instruction; `elements` are the arrays of its result, by element where it is a tuple."""

    name: str
    opcode: str
    elements: tuple[tuple[Array, ...], ...]
    operands: tuple[str, ...]
    arguments: str  # the text between the opcode's parentheses
    attributes: str  # the text after them
    line: int
    is_root: bool

    @property
    def arrays(self) -> tuple[Array, ...]:
        """All arrays of the result."""
        return tuple(array for element in self.elements for array in element)

    def attribute(self, pattern: str) -> str | None:
        """First group of a regular expression, searched in the attributes."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else None

    def error(self, problem: str) -> HloError:
        """The error to raise where this instruction is not understood."""
        text = f"%{self.name} = {' '.join(map(str, self.arrays))} {self.opcode}({self.arguments}){self.attributes}"
        return HloError(problem, self.line, text)


class Computation:
    """Instructions by name, in order."""

    def __init__(self, name: str, instructions: Sequence[Instruction]) -> None:
        self.name = name
        self.instructions = {instruction.name: instruction for instruction in instructions}
        self.parameters = {int(i.arguments): i for i in instructions if i.opcode == "parameter"}
        roots = [instruction for instruction in instructions if instruction.is_root]
        self.root = roots[0] if roots else instructions[-1]
        self._users: dict[str, list[Instruction]] | None = None

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    def users(self, name: str) -> list[Instruction]:
        """Instructions that have `name` as an operand."""
        if self._users is None:
            self._users = {}
            for instruction in self:
                for operand in dict.fromkeys(instruction.operands):
                    self._users.setdefault(operand, []).append(instruction)
        return self._users.get(name, [])

    def operand(self, instruction: Instruction, index: int) -> Instruction:
        """The instruction that makes operand `index`."""
        try:
            return self.instructions[instruction.operands[index]]
        except (IndexError, KeyError):
            raise instruction.error(f"operand {index} is not an instruction of %{self.name}") from None


@dataclass(frozen=True)
class Module:
    """A compiled program: one partition's view of it."""

    computations: dict[str, Computation]
    entry: Computation
    num_partitions: int

    def called(self, instruction: Instruction, attribute: str) -> Computation:
        """The computation that an attribute (`calls`, `body`, `condition`, `to_apply`) names."""
        name = instruction.attribute(rf"\b{attribute}=%?([\w.\-]+)")
        if name is None or name not in self.computations:
            raise instruction.error(f"no computation for {attribute}=")
        return self.computations[name]


def parse_module(text: str) -> Module:
    """Parses `compiled.as_text()` of a scheduled module.

    Raises:
        HloError: a line that is not understood, or no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry: Computation | None = None
    for name, is_entry, lines in _blocks(text):
        instructions = [_instruction(number, line) for number, line in lines]
        if not instructions:
            raise HloError("a computation without instructions", 0, name)
        computations[name] = Computation(name, instructions)
        entry = computations[name] if is_entry else entry
    header = text[: text.find("\n")] if "\n" in text else text
    if entry is None:
        raise HloError("no ENTRY computation", 1, header or "(nothing)")
    partitions = re.search(r"\bnum_partitions=(\d+)", header)
    replicas = re.search(r"\breplica_count=(\d+)", header)
    return Module(computations, entry, int(partitions.group(1) if partitions else 1) * int(replicas.group(1) if replicas else 1))


def _blocks(text: str) -> Iterator[tuple[str, bool, list[tuple[int, str]]]]:
    """Name, whether it is the entry, and numbered instruction lines of each computation.

    Attributes hold real newlines, so a line belongs to the instruction before as long as a quote or a brace is open.
    """
    name, is_entry, lines = "", False, []
    for number, line in enumerate(text.split("\n"), 1):
        if lines and _is_open(lines[-1][1]):
            lines[-1] = lines[-1][0], f"{lines[-1][1]}\n{line}"
        elif name and line.rstrip() == "}":
            yield name, is_entry, lines
            name, lines = "", []
        elif name:
            lines.append((number, line))
        elif (found := _HEADER.match(line)) and line.rstrip().endswith("{"):
            name, is_entry = found.group(2), bool(found.group(1))
    if name:
        raise HloError("a computation that does not end", lines[-1][0] if lines else 0, name)


def _is_open(line: str) -> bool:
    unquoted = re.sub(r'"[^"]*"', "", line.replace('\\"', ""))
    return '"' in unquoted or unquoted.count("{") != unquoted.count("}")


def _instruction(number: int, line: str) -> Instruction:
    found = _INSTRUCTION.match(line)
    if not found:
        raise HloError("not an instruction", number, line)
    rest = found.group(3)
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    call = re.match(r"\s*([a-z][\w\-]*)\(", rest[end:])
    if end <= 0 or not call:
        raise HloError("no opcode", number, line)
    opened = end + call.end() - 1
    closed = _closing(rest, opened)
    arguments = rest[opened + 1 : closed]
    if closed < 0:
        raise HloError("unbalanced parentheses", number, line)
    return Instruction(
        name=found.group(2),
        opcode=call.group(1),
        elements=_elements(rest[:end], number, line),
        operands=tuple(_NAME.findall(arguments)),
        arguments=arguments,
        attributes=rest[closed + 1 :],
        line=number,
        is_root=bool(found.group(1)),
    )


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`, -1 if there is none."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return start + found.start()
    return -1


def _elements(shape: str, number: int, line: str) -> tuple[tuple[Array, ...], ...]:
    """Arrays of a result's shape, grouped by the elements of the outermost tuple."""
    groups: list[list[Array]] = [[]]
    depth, position = 0, 0
    for found in _ARRAY.finditer(shape):
        for mark in re.sub(r"/\*.*?\*/", "", shape[position : found.start()]):
            depth += (mark == "(") - (mark == ")")
            if mark == "," and depth == 1:
                groups.append([])
        position = found.end()
        groups[-1].append(_array(found, number, line))
    return tuple(map(tuple, groups))


def _array(found: re.Match[str], number: int, line: str) -> Array:
    dtype, dims, layout = found.groups()
    sizes = [size.strip().removeprefix("<=") for size in dims.split(",") if size.strip()]
    if dtype not in _BYTES or not all(size.isdigit() for size in sizes):
        raise HloError(f"unknown array type {found.group()!r}", number, line)
    space = re.search(r"S\((\d+)\)", layout or "")
    return Array(dtype, tuple(map(int, sizes)), int(space.group(1)) if space else 0)
