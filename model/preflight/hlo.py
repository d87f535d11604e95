"""What a compiled step costs, read from its optimised HLO: collectives, matrix products, HBM traffic, custom calls, arrays.

    cost = analyse(compiled.as_text())
    cost.ici_bytes, cost.all_gather_async_share, cost.largest_arrays()

Why not `compiled.cost_analysis()`: it counts the body of a loop once, knows no kernel's FLOPs and no collective. All figures
are per chip and step. Collectives inside one slice travel over ICI; between slices XLA makes them host transfers over DCN.
"""

from __future__ import annotations

import re
from collections import defaultdict

from model.preflight.hlo_cost import Collective, HloCost, NamedArray, Network, Phase
from model.preflight.hlo_groups import replica_group
from model.preflight.hlo_loops import Loop, trip_count
from model.preflight.hlo_matmuls import is_int8, matmul_flops
from model.preflight.hlo_memory import chain_link, custom_call_target, hbm_bytes, is_collective
from model.preflight.hlo_text import Array, Computation, HloError, Instruction, Module, parse_module

__all__ = ["Array", "Collective", "HloCost", "HloError", "NamedArray", "Network", "Phase", "analyse"]

_KERNEL = "tpu_custom_call"  # what a Pallas kernel becomes
_MEGASCALE = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}


def analyse(text: str, *, chips_per_slice: int | None = None, causal_loops: bool = False, branches: float = 1.0) -> HloCost:
    """Reads `compiled.as_text()` of a program for TPU.

    chips_per_slice: where one program spans slices, partitions are numbered slice by slice; a group that holds chips of
        two slices then communicates over DCN. libtpu compiles one program per slice, whose transfers say it themselves.
    causal_loops: whether blocks of attention are left out by loops that end at the diagonal; see `model.preflight.hlo_loops`.
    branches: share of steps in which conditionals have something to do; every branch of one counts for so much.

    Raises:
        HloError: text that is not understood; the message names the line.
    """
    module = parse_module(text)
    walk = _Walk(module, chips_per_slice, causal_loops, branches)
    walk.phase(module.entry, 1, None)
    walk.check_chains()
    arrays = tuple(
        NamedArray(array, instruction.name, computation.name)
        for computation in module.computations.values()
        for instruction in computation
        for array in instruction.arrays
        if array.dims
    )
    return HloCost(
        collectives=tuple(walk.collectives),
        dot_flops=walk.dot_flops,
        hbm_bytes=walk.hbm_bytes,
        custom_calls=dict(walk.custom_calls),
        arrays=arrays,
        num_partitions=module.num_partitions,
        phases=tuple(walk.phases),
        int8_flops=walk.int8_flops,
    )


class _Walk:
    """Visits every instruction as often as it runs and adds up."""

    def __init__(self, module: Module, chips_per_slice: int | None, causal_loops: bool, branches: float) -> None:
        self._module = module
        self._causal_loops = causal_loops
        self._chips_per_slice = chips_per_slice
        self._share = branches
        self._started: set[str] = set()
        self._continued: dict[str, Instruction] = {}
        self.collectives: list[Collective] = []
        self.dot_flops = self.int8_flops = 0.0
        self.hbm_bytes = 0.0
        self.custom_calls: defaultdict[str, float] = defaultdict(float)
        self.phases: list[Phase] = []

    def phase(self, computation: Computation, times: float, loop: Loop | None) -> None:
        """Adds the entry or a loop's body, and keeps what it costs apart from the loops inside it."""
        before, first = self._so_far(), len(self.phases)
        self.computation(computation, times, loop)
        inside = [(one.dot_flops, one.hbm_bytes, one.kernels, one.int8_flops) for one in self.phases[first:]]
        flops, hbm, kernels, int8 = (now - then - sum(inner) for now, then, *inner in zip(self._so_far(), before, *inside, strict=True))
        self.phases.append(Phase(computation.name, times, flops, hbm, kernels, int8))

    def _so_far(self) -> tuple[float, float, float, float]:
        return self.dot_flops, self.hbm_bytes, self.custom_calls.get(_KERNEL, 0.0), self.int8_flops

    def computation(self, computation: Computation, times: float, loop: Loop | None) -> None:
        """Adds a computation that runs instruction by instruction: the entry, a loop's body, a branch."""
        for instruction in computation:
            self.hbm_bytes += times * hbm_bytes(self._module, computation, instruction)
            if instruction.opcode == "while":
                inner = Loop(instruction, computation, loop)
                trips = trip_count(self._module, inner, causal=self._causal_loops)
                self.phase(self._module.called(instruction, "body"), float(times * trips), inner)
            elif instruction.opcode == "conditional":
                for branch in self._branches(instruction):  # which one runs is not known: both count
                    self.computation(branch, times * self._share, loop)
            elif instruction.opcode == "call":
                self.computation(self._module.called(instruction, "to_apply"), times, loop)
            elif instruction.opcode == "async-start":
                started = self._module.called(instruction, "calls")
                self.hbm_bytes += times * sum(hbm_bytes(self._module, started, inside) for inside in started)
                self._inside(started, times, is_async=True)
            elif instruction.opcode == "fusion":
                self._fusion(instruction, times, is_async=False)
            else:
                self._instruction(computation, instruction, times, is_async=False)

    def _branches(self, instruction: Instruction) -> list[Computation]:
        names = instruction.attribute(r"branch_computations=\{([^}]*)\}")
        if names is None:
            return [self._module.called(instruction, "true_computation"), self._module.called(instruction, "false_computation")]
        return [self._module.computations[name.strip().lstrip("%")] for name in names.split(",")]

    def _fusion(self, fusion: Instruction, times: float, *, is_async: bool) -> None:
        callee = self._module.called(fusion, "calls")
        link = chain_link(fusion, callee)
        self._inside(callee, times, is_async=is_async or link == "start", repeated=link in ("middle", "done"), fusion=fusion)

    def _inside(
        self, callee: Computation, times: float, *, is_async: bool, repeated: bool = False, fusion: Instruction | None = None
    ) -> None:
        """Adds what happens inside a fusion: HBM traffic is the fusion's own."""
        for instruction in callee:
            if instruction.opcode == "fusion":
                self._fusion(instruction, times, is_async=is_async)
            elif repeated and is_collective(instruction):
                self._continued.setdefault(_channel(instruction), instruction)
            else:
                if is_async and is_collective(instruction):
                    self._started.add(_channel(instruction))
                self._instruction(callee, instruction, times, is_async=is_async, fusion=fusion)

    def check_chains(self) -> None:
        """Every part of an asynchronous collective must belong to one that was started, else bytes would go missing."""
        for channel, instruction in self._continued.items():
            if channel not in self._started:
                raise instruction.error("a part of an asynchronous collective that nothing starts")

    def _instruction(
        self, computation: Computation, instruction: Instruction, times: float, *, is_async: bool, fusion: Instruction | None = None
    ) -> None:
        opcode = instruction.opcode
        if opcode in ("dot", "convolution"):
            flops = times * matmul_flops(computation, instruction)
            self.dot_flops += flops
            self.int8_flops += flops if is_int8(computation, instruction) else 0.0
        elif opcode == "custom-call":
            self.custom_calls[custom_call_target(instruction)] += times
        elif opcode == "send":
            self._send(computation, instruction, times)
        elif is_collective(instruction):
            self._collective(computation, instruction, times, is_async or opcode.endswith("-start"), fusion)

    def _collective(
        self, computation: Computation, instruction: Instruction, times: float, is_async: bool, fusion: Instruction | None
    ) -> None:
        kind = instruction.opcode.removesuffix("-start")
        group = replica_group(instruction, self._module.num_partitions)
        inputs = [array for operand in range(len(instruction.operands)) for array in computation.operand(instruction, operand).arrays]
        size = sum(array.bytes for array in inputs)
        if kind == "all-reduce" and fusion is not None and _is_scattered(fusion, size, len(group)):
            kind = "reduce-scatter"
        if kind == "all-gather":
            size *= len(group)
        crosses = self._chips_per_slice is not None and len({chip // self._chips_per_slice for chip in group}) > 1
        said_by = [one for one in (instruction, fusion) if one is not None]
        algorithm = next(filter(None, (one.attribute(r'"collective_algorithm_config":\{(.*)') for one in said_by)), "")
        emitter, phases, colors = (re.search(pattern, algorithm) for pattern in (r'"emitter":"(\d)D', r"\bphases:(\d+)", r"\{colors:(\d+)"))
        dimensions = phases or emitter
        self.collectives.append(
            Collective(
                kind=kind,
                is_async=is_async,
                times=times,
                bytes=size,
                wire_bytes=size * _wire_factor(kind, len(group)),
                group=group,
                dtype=inputs[0].dtype if inputs else "token",
                network="dcn" if crosses else "ici",
                torus_dimensions=int(dimensions.group(1)) if dimensions else None,
                colors=int(colors.group(1)) if colors else None,
                name=instruction.name,
                computation=computation.name,
            )
        )

    def _send(self, computation: Computation, instruction: Instruction, times: float) -> None:
        """A host transfer; those of the multislice runtime are collectives between slices."""
        transfer = instruction.attribute(r'_xla_megascale_transfer_type="(\w+)"')
        if transfer is None:
            if "is_host_transfer=true" not in instruction.attributes:
                raise instruction.error("a send that is no host transfer")
            self.custom_calls["host-transfer"] += times
            return
        kind, target = _MEGASCALE.get(transfer), instruction.attribute(r'_xla_megascale_target="\{([\d,:]+)\}x')
        if kind is None or target is None:
            raise instruction.error(f"a transfer between slices of unknown kind {transfer!r}")
        slices = tuple(number for part in target.split(",") for number in _span(part))
        array = computation.operand(instruction, 0).arrays[0]
        size = array.bytes * (len(slices) if kind == "all-gather" else 1)
        wire = size * _wire_factor(kind, len(slices))
        self.collectives.append(
            Collective(kind, True, times, size, wire, slices, array.dtype, "dcn", None, None, instruction.name, computation.name)
        )


def _channel(instruction: Instruction) -> str:
    return f"{instruction.opcode} {instruction.attribute(r'channel_id=([0-9]+)')}"


def _span(text: str) -> range:
    first, _, last = text.partition(":")
    return range(int(first), int(last or first) + 1)


def _wire_factor(kind: str, size: int) -> float:
    """What one chip of a group sends, as a share of the whole array."""
    if kind in ("collective-permute", "collective-broadcast"):
        return 1.0
    return (size - 1) / size * (2 if kind == "all-reduce" else 1)


def _is_scattered(fusion: Instruction, size: float, group: int) -> bool:
    """Whether a fused all-reduce keeps a chip's own part only: libtpu's reduce-scatter."""
    return group > 1 and abs(sum(array.bytes for array in fusion.arrays if array.memory_space != 2) * group - size) < 1
