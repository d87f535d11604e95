"""Which partitions take part in a collective: the four ways XLA writes replica groups, and source-target pairs."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np

from model.preflight.hlo_text import Instruction


def replica_group(instruction: Instruction, num_partitions: int) -> tuple[int, ...]:
    """Partition ids of the first group of a collective, in order; for a permute, the ring that partition 0 sends around.

    Raises:
        HloError: groups in a form that is not known.
    """
    if instruction.opcode.startswith("collective-permute"):
        return _ring(instruction)
    text = instruction.attributes
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return tuple(int(number) for number in found.group(1).split(","))
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _iota(*found.groups())
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{}]*)\))? \{([^}]*)\}", text):
        return _mesh(instruction, *found.groups())
    if "replica_groups={}" in text or "replica_groups=" not in text:
        return tuple(range(num_partitions))
    raise instruction.error("replica groups in an unknown form")


def _ring(instruction: Instruction) -> tuple[int, ...]:
    """Follows the first pair around: {0,4},{4,8},{8,0} gives 0, 4, 8."""
    found = re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", instruction.attributes)
    targets = {int(source): int(target) for source, target in re.findall(r"\{(\d+),(\d+)\}", found.group(1))} if found else {}
    if not targets:
        raise instruction.error("a permute without source-target pairs")
    ring = [next(iter(targets))]
    while (following := targets.get(ring[-1])) is not None and following not in ring:
        ring.append(following)
    return tuple(ring)


def _iota(shape: str, source: str, order: str | None) -> tuple[int, ...]:
    """First group of `[groups,size]<=[dims]T(order)`."""
    return tuple(_numbers(source, order).reshape([int(size) for size in shape.split(",")])[0].ravel().tolist())


def _numbers(source: str, order: str | None) -> np.ndarray:
    """The numbers from 0 laid out in the dimensions `source`, transposed to `order`, and flattened."""
    dims = [int(size) for size in source.split(",")]
    numbers = np.arange(math.prod(dims)).reshape(dims)
    return numbers.transpose([int(axis) for axis in order.split(",")]).ravel() if order else numbers.ravel()


def _mesh(instruction: Instruction, axes: str, device_ids: str | None, grouped: str) -> tuple[int, ...]:
    """`mesh['a'=4,'b'=16] {'b'}`: partitions in the order of the mesh, or of `device_ids`; `'b':(2)4` is a part of an axis."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    strides = {name: math.prod(list(sizes.values())[position + 1 :]) for position, name in enumerate(sizes)}
    steps: list[range] = []
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", grouped):
        if name not in sizes:
            raise instruction.error(f"mesh axis {name!r} is not in the mesh")
        length = int(size) if size else sizes[name]
        stride = strides[name] * (sizes[name] // (int(before) * length) if size else 1)
        steps.append(range(0, length * stride, stride))
    places = [sum(offsets) for offsets in itertools.product(*steps)]
    if device_ids is None:
        return tuple(places)
    if found := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", device_ids):
        return tuple(_numbers(*found.groups())[places].tolist())
    if re.fullmatch(r"[\d,]+", device_ids):
        return tuple(int(device_ids.split(",")[place]) for place in places)
    raise instruction.error("devices of a mesh in an unknown order")
