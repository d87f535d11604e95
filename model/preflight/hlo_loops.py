"""How often a compiled loop runs: XLA for TPU does not say, so the counter is followed through condition, body and start."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

from model.preflight.hlo_text import TRANSPARENT, Array, Computation, Instruction, Module

_MIRRORED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE"}


@dataclass(frozen=True)
class Loop:
    """A while instruction, the computation it stands in, and the loop around that."""

    instruction: Instruction
    within: Computation
    outer: Loop | None


@dataclass(frozen=True)
class _Value:
    """An integer known up to a loop's variable: `offset` plus element `index` of the loop's state, if there is one."""

    offset: int
    index: int | None = None


_Bindings = Mapping[int, _Value | None]


def trip_count(module: Module, loop: Loop, *, causal: bool = False) -> Fraction:
    """Times the body of a while loop runs; a counter goes from a constant to a constant in constant steps.

    causal: the program has loops over the blocks of keys up to a block of queries, inside a loop over these. The limit of such a loop is
        an integer of an array that has one for each round of the outer loop and is made elsewhere: taken to be 1, 2, ...; the mean counts.

    Raises:
        HloError: the loop is not of that kind.
    """
    instruction = loop.instruction
    known = instruction.attribute(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')
    if known:
        return Fraction(known)
    condition, body = module.called(instruction, "condition"), module.called(instruction, "body")
    left, direction, right = _comparison(module, condition)
    if left is not None and left.index is None and right is not None and right.index is not None:
        left, direction, right = right, _MIRRORED.get(direction, ""), left
    if left is None or right is None or left.index is None:
        raise instruction.error("a loop whose condition is not a comparison of a counter")
    limit = _loop_constant(module, loop, right)
    start = _start(module, loop, left.index)
    after = _evaluate(module, body, _element(body, body.root, left.index))
    if limit is None and causal and start == 0 and after == _Value(1, left.index):
        rows = _rows(module, loop, right)
        return Fraction(rows + 1, 2)
    if after is None or after.index != left.index or start is None or limit is None:
        raise instruction.error("a loop whose counter does not go from a constant to a constant in constant steps")
    distance, step = limit - start - left.offset, after.offset
    if direction in ("GT", "GE"):
        distance, step = -distance, -step
    if step <= 0 or direction not in _MIRRORED:
        raise instruction.error("a loop whose counter does not move towards its end")
    return Fraction(max(distance // step + 1 if direction in ("LE", "GE") else -(-distance // step), 0))


def _rows(module: Module, loop: Loop, limit: _Value) -> int:
    """Rounds of the outer loop, where each of them takes this loop's limit from an array with as many integers.

    Raises:
        HloError: it does not.
    """
    name = _element(loop.within, loop.within.operand(loop.instruction, 0), limit.index or 0)
    if name is not None and loop.outer is not None:
        rounds = trip_count(module, loop.outer)
        if any(array.dtype == "s32" and array.dims == (rounds,) for array in _made_from(loop.within, name)):
            return int(rounds)
    raise loop.instruction.error(
        "a loop whose counter goes neither to a constant nor to one of as many integers as the loop around it has rounds"
    )


def _made_from(computation: Computation, name: str) -> Iterator[Array]:
    """Arrays that an integer is worked out from, in the same computation."""
    instruction = computation.instructions[name]
    yield from instruction.arrays if len(instruction.elements) == 1 else ()
    if instruction.opcode in (*TRANSPARENT, "add", "dynamic-slice", "fusion"):
        for operand in instruction.operands:
            yield from _made_from(computation, operand)


def _comparison(module: Module, condition: Computation) -> tuple[_Value | None, str, _Value | None]:
    """Both sides of the comparison that a loop's condition returns, inside a fusion or not."""
    computation, bindings, root = condition, None, condition.root
    while root.opcode == "fusion" or root.opcode in TRANSPARENT:
        if root.opcode == "fusion":
            bindings = _bindings(module, computation, root, bindings)
            computation = module.called(root, "calls")
            root = computation.root
        else:
            root = computation.operand(root, 0)
    if root.opcode != "compare":
        return None, "", None
    sides = [_evaluate(module, computation, computation.operand(root, side).name, bindings) for side in (0, 1)]
    return sides[0], root.attribute(r"direction=(\w+)") or "", sides[1]


def _bindings(module: Module, computation: Computation, fusion: Instruction, bindings: _Bindings | None) -> dict[int, _Value | None]:
    """What is known of the values a fusion is called with."""
    return {position: _evaluate(module, computation, name, bindings) for position, name in enumerate(fusion.operands)}


def _evaluate(
    module: Module,
    computation: Computation,
    name: str | None,
    bindings: _Bindings | None = None,
    element: int | None = None,
) -> _Value | None:
    """The integer that an instruction makes, None if it is not one this reader can follow.

    bindings: values of the parameters inside a fusion; None in a loop, whose only parameter is its state.
    element: which element of a tuple is meant.
    """
    instruction = computation.instructions.get(name or "")
    if instruction is None:
        return None
    opcode = instruction.opcode
    if opcode == "constant":
        return _Value(int(instruction.arguments)) if re.fullmatch(r"-?\d+", instruction.arguments) else None
    if opcode == "parameter":
        return bindings.get(int(instruction.arguments)) if bindings is not None else None if element is None else _Value(0, element)
    if opcode == "get-tuple-element":
        return _evaluate(module, computation, instruction.operands[0], bindings, int(instruction.attribute(r"index=(\d+)") or 0))
    if opcode == "tuple":
        return None if element is None else _evaluate(module, computation, instruction.operands[element], bindings)
    if opcode in TRANSPARENT:
        return _evaluate(module, computation, instruction.operands[0], bindings, element)
    if opcode == "fusion":
        callee = module.called(instruction, "calls")
        return _evaluate(module, callee, callee.root.name, _bindings(module, computation, instruction, bindings), element)
    if opcode in ("add", "subtract"):
        left, right = (_evaluate(module, computation, operand, bindings) for operand in instruction.operands[:2])
        return _sum(left, right, 1 if opcode == "add" else -1)
    return None


def _sum(left: _Value | None, right: _Value | None, sign: int) -> _Value | None:
    if left is None or right is None or (right.index is not None and (left.index is not None or sign < 0)):
        return None
    return _Value(left.offset + sign * right.offset, left.index if left.index is not None else right.index)


def _element(computation: Computation, instruction: Instruction, index: int) -> str | None:
    """Name of the instruction that makes element `index` of a tuple."""
    while instruction.opcode in TRANSPARENT:
        instruction = computation.operand(instruction, 0)
    return instruction.operands[index] if instruction.opcode == "tuple" and index < len(instruction.operands) else None


def _start(module: Module, loop: Loop, index: int) -> int | None:
    """Value of a loop's state element before the first round."""
    name = _element(loop.within, loop.within.operand(loop.instruction, 0), index)
    value = _evaluate(module, loop.within, name)
    if value is None or value.index is None:
        return None if value is None else value.offset
    return None if loop.outer is None else _loop_constant(module, loop.outer, value)


def _loop_constant(module: Module, loop: Loop, value: _Value) -> int | None:
    """An integer that stays the same in every round of a loop: a constant, or state that the body hands on untouched."""
    if value.index is None:
        return value.offset
    body = module.called(loop.instruction, "body")
    if _evaluate(module, body, _element(body, body.root, value.index)) != _Value(0, value.index):
        return None
    start = _start(module, loop, value.index)
    return None if start is None else start + value.offset
