"""The costs of a compiled step that its HLO tells, per chip and step; `model.preflight.hlo` fills them in."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from model.preflight.hlo_text import Array

Network = Literal["ici", "dcn"]


@dataclass(frozen=True)
class Collective:
    """One communicating instruction."""

    kind: str  # all-gather, all-reduce, reduce-scatter, all-to-all, collective-permute, ...
    is_async: bool  # started and awaited apart, with work between
    times: float  # executions in one step, on average over steps
    bytes: float  # of one execution: the array as it is before a scatter or after a gather
    wire_bytes: float  # of one execution: what one chip sends, by the ring algorithm
    group: tuple[int, ...]  # partitions (over DCN: slices) of the first group; of a permute, the first ring
    dtype: str
    network: Network
    torus_dimensions: int | None  # of the torus that the compiler says it uses
    colors: int | None  # directions that the compiler says it sends in at once
    name: str
    computation: str

    @property
    def total_wire_bytes(self) -> float:
        """Bytes one chip sends in a step."""
        return self.times * self.wire_bytes


@dataclass(frozen=True)
class NamedArray:
    """An array that some instruction of the program makes, inside a fusion or not."""

    array: Array
    instruction: str
    computation: str


@dataclass(frozen=True)
class Phase:
    """What runs between two loop borders: the entry or a loop's body, without the loops inside it. All executions together."""

    name: str
    times: float
    dot_flops: float
    hbm_bytes: float
    kernels: float  # Pallas kernels, whose FLOPs HLO does not tell
    int8_flops: float = 0.0  # of dot_flops, those of integers


@dataclass(frozen=True)
class HloCost:
    """Costs of one step on one chip."""

    collectives: tuple[Collective, ...]
    dot_flops: float  # of matrix products in HLO; those inside kernels (custom calls) are not seen
    hbm_bytes: float
    custom_calls: Mapping[str, float]  # executions by target
    arrays: tuple[NamedArray, ...]
    num_partitions: int
    phases: tuple[Phase, ...] = ()
    int8_flops: float = 0.0  # of dot_flops, those whose operands are both integers of 8 bits or fewer

    def wire_bytes(self, kind: str | None = None, *, is_async: bool | None = None, network: Network = "ici") -> float:
        """Bytes one chip sends in a step, over all collectives or those asked for."""
        return sum(
            collective.total_wire_bytes
            for collective in self.collectives
            if collective.network == network and kind in (None, collective.kind) and is_async in (None, collective.is_async)
        )

    @property
    def ici_bytes(self) -> float:
        """Bytes one chip sends to others of its slice."""
        return self.wire_bytes()

    @property
    def dcn_bytes(self) -> float:
        """Bytes one chip sends to other slices."""
        return self.wire_bytes(network="dcn")

    @property
    def all_gather_async_share(self) -> float:
        """Share of the all-gathers' bytes that can hide behind computation; 1 where nothing is gathered."""
        total = self.wire_bytes("all-gather")
        return self.wire_bytes("all-gather", is_async=True) / total if total else 1.0

    @property
    def async_share(self) -> float:
        """Share of all ICI bytes that can hide behind computation; 1 where nothing is sent."""
        return self.wire_bytes(is_async=True) / self.ici_bytes if self.ici_bytes else 1.0

    def with_dcn_of(self, other: HloCost) -> HloCost:
        """These costs, of one slice by itself, with what crosses between slices in another program."""
        return replace(self, collectives=self.collectives + tuple(one for one in other.collectives if one.network == "dcn"))

    def largest_arrays(self, count: int = 10) -> tuple[NamedArray, ...]:
        """The largest arrays, one of each type and shape, largest first."""
        distinct = {str(named.array): named for named in reversed(self.arrays)}
        return tuple(sorted(distinct.values(), key=lambda named: -named.array.bytes)[:count])

    def whole_logits(self, shape: tuple[int, int, int], weight_rows: Collection[int]) -> tuple[NamedArray, ...]:
        """Arrays that hold as much as all logits that a chip computes at once, in any shape or order of dimensions.

        shape: [rows, sequence, vocabulary] of these logits, each a chip's own part.
        weight_rows: rows of arrays that are no logits: the head, its gradient, parts of both. Where logits have just as many they are
            recognised as [*, sequence, vocabulary] only.
        """
        return tuple(named for named in self.arrays if _holds_logits(named.array.dims, shape, weight_rows))


def _holds_logits(dims: tuple[int, ...], shape: tuple[int, int, int], weight_rows: Collection[int]) -> bool:
    rows, sequence, vocabulary = shape
    if vocabulary not in dims or math.prod(dims) < rows * sequence * vocabulary:
        return False
    return math.prod(dims) // vocabulary not in weight_rows or (len(dims) > 2 and dims[-2:] == (sequence, vocabulary))
