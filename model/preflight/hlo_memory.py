"""How many bytes an instruction of compiled HLO moves to and from HBM.

An estimate: each operand and result of an instruction outside fusions is read or written once, unless the layout says that
it lives on the chip (`S(k)`). Of arrays that are only sliced or updated in place, at a loop's index say, the slice counts.
A kernel that reads a block twice, as splash attention does with keys and values, and the padding of tiles are not seen.
"""

from __future__ import annotations

import math

from model.preflight.hlo_text import Array, Computation, Instruction, Module

COLLECTIVES = frozenset(
    {
        "all-gather",
        "all-reduce",
        "all-to-all",
        "collective-broadcast",
        "collective-permute",
        "ragged-all-to-all",
        "reduce-scatter",
    }
)
# Custom calls that hand buffers around and move nothing.
_FREE_CALLS = frozenset(
    {"AllocateBuffer", "ConcatBitcast", "AsyncCollectiveDone", "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked"}
)
_FREE = frozenset(
    {
        "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all", "add-dependency",
        "partition-id", "replica-id", "opt-barrier", "optimization-barrier", "async-start", "async-update", "domain",
    }
)  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")
# One element of the result needs one of the operand: a slice of the result is a slice of the operand.
_ELEMENTWISE_MOVES = ("bitcast", "convert", "copy", "reshape", "transpose", "reduce-precision")


def hbm_bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Bytes that one execution of an instruction outside fusions moves between HBM and the chip."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0.0
    if opcode == "fusion":
        return _fusion(module, computation, instruction)
    if opcode == "custom-call" and custom_call_target(instruction) in _FREE_CALLS:
        return 0.0
    operands = [computation.operand(instruction, position) for position in range(len(instruction.operands))]
    results = instruction.arrays
    if opcode in _SLICES:
        return _moved(operands[0].arrays[0], results[0].bytes) + results[0].hbm_bytes
    if opcode == "slice-start":
        return _moved(operands[0].arrays[0], instruction.elements[1][0].bytes) + instruction.elements[1][0].hbm_bytes
    if opcode == "dynamic-update-slice":
        return operands[1].arrays[0].hbm_bytes + _moved(results[0], operands[1].arrays[0].bytes)
    if opcode == "scatter":
        return operands[-1].arrays[0].hbm_bytes + 2 * _moved(results[0], operands[-1].arrays[0].bytes)
    if opcode in ("copy-start", "recv"):
        results = instruction.elements[0]
    elif opcode == "send":
        results = ()
    elif opcode.endswith("-start") and opcode != "all-reduce-start":
        results = instruction.elements[1]
    return sum(array.hbm_bytes for operand in operands for array in operand.arrays) + sum(array.hbm_bytes for array in results)


def custom_call_target(instruction: Instruction) -> str:
    """Name of the function that a custom call runs."""
    return instruction.attribute(r'custom_call_target="([^"]+)"') or "?"


def is_collective(instruction: Instruction) -> bool:
    """Whether an instruction communicates; the second half of an asynchronous pair does not count."""
    return instruction.opcode.removesuffix("-start") in COLLECTIVES


def chain_link(fusion: Instruction, callee: Computation) -> str | None:
    """Place of a fusion in an asynchronous collective: "start", "middle", "done"; None if it is in none.

    libtpu splits a collective over a chain of fusions that compute meanwhile. Each repeats the collective's instruction;
    they pass semaphores, arrays in memory space 2, from one to the next.
    """
    targets = {custom_call_target(instruction) for instruction in callee if instruction.opcode == "custom-call"}
    if "AsyncCollectiveStart" in targets:
        return "start"
    if "AsyncCollectiveDone" in targets:
        return "done"
    has_semaphores = any(array.memory_space == 2 for array in fusion.arrays)
    return "middle" if has_semaphores and any(map(is_collective, callee)) else None


def _moved(array: Array, size: float) -> float:
    """`size` bytes if the array they are part of lives in HBM."""
    return size if array.memory_space == 0 else 0.0


def _fusion(module: Module, computation: Computation, fusion: Instruction) -> float:
    callee = module.called(fusion, "calls")
    link = chain_link(fusion, callee)
    if link == "start":
        collective = next(filter(is_collective, callee))
        inputs = [computation.operand(fusion, int(callee.operand(collective, 0).arguments)).arrays[0]]
        outputs = [array for array in fusion.arrays if array.dims == collective.arrays[0].dims][:1]
        return sum(array.hbm_bytes for array in inputs + outputs)
    total = 0.0
    for position in range(len(fusion.operands)):
        arrays = computation.operand(fusion, position).arrays
        if position in callee.parameters and arrays and arrays[0].memory_space == 0:
            total += _read(module, callee, callee.parameters[position], link is not None)
    for position, element in enumerate(fusion.elements):
        if element and element[0].memory_space == 0:
            total += _written(module, callee, callee.root, position if len(fusion.elements) > 1 else None, link is not None)
    return total


def _read(module: Module, callee: Computation, parameter: Instruction, chained: bool) -> float:
    """Bytes of a parameter that a fused computation reads."""
    array = parameter.arrays[0]
    elements = math.prod(array.dims)
    return array.bytes / max(elements, 1) * min(_elements_read(module, callee, parameter, chained), elements)


def _elements_read(module: Module, callee: Computation, source: Instruction, chained: bool) -> float:
    """Elements that the users of an instruction need of it; more than there are if several need different parts."""
    everything = math.prod(source.arrays[0].dims)
    total = 0.0
    for user in callee.users(source.name):
        first = user.operands[0] == source.name
        if user.opcode in _ELEMENTWISE_MOVES:
            total += _elements_read(module, callee, user, chained) if not user.is_root else everything
        elif user.opcode in _SLICES and first:
            total += math.prod(user.arrays[0].dims)
        elif user.opcode == "scatter" and first:
            total += math.prod(callee.operand(user, -1).arrays[0].dims)
        elif user.opcode == "fusion":
            inner = module.called(user, "calls")
            places = [place for place, name in enumerate(user.operands) if name == source.name]
            total += sum(_elements_read(module, inner, inner.parameters[place], chained) for place in places)
        elif user.opcode == "tuple" or (user.opcode == "dynamic-update-slice" and first) or (chained and _hands_on(user)):
            continue
        else:
            total += everything
    return total


def _hands_on(instruction: Instruction) -> bool:
    """Whether an instruction is the collective of a chain or its bookkeeping: its traffic was counted at the start."""
    return is_collective(instruction) or custom_call_target(instruction).startswith("AsyncCollective")


def _written(module: Module, callee: Computation, made: Instruction, element: int | None, chained: bool) -> float:
    """Bytes that a fused computation writes to its result, or to one element of it."""
    if made.opcode == "tuple" and element is not None:
        return _written(module, callee, callee.operand(made, element), None, chained)
    if made.opcode == "parameter" or (chained and _hands_on(made)):
        return 0.0
    if made.opcode == "bitcast":
        return _written(module, callee, callee.operand(made, 0), element, chained)
    if made.opcode == "get-tuple-element":
        return _written(module, callee, callee.operand(made, 0), int(made.attribute(r"index=(\d+)") or 0), chained)
    if made.opcode == "fusion":
        inner = module.called(made, "calls")
        return _written(module, inner, inner.root, element, chained)
    if made.opcode in ("dynamic-update-slice", "scatter") and _is_parameter(callee, callee.operand(made, 0)):
        return callee.operand(made, 1 if made.opcode == "dynamic-update-slice" else -1).arrays[0].bytes
    return sum(array.bytes for array in (made.arrays if element is None else made.elements[element]))


def _is_parameter(callee: Computation, instruction: Instruction) -> bool:
    while instruction.opcode == "bitcast":
        instruction = callee.operand(instruction, 0)
    return instruction.opcode == "parameter"
