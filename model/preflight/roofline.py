"""The best a step can do on a slice: time of compute, HBM, ICI and DCN, which of them bounds it, and the MFU that leaves.

A bound, no forecast: each unit runs at its peak (Williams et al. 2009). Within a loop's body computation overlaps HBM traffic, one
loop does not overlap the next: time on the chip is the sum over loops of the slower of the two. Kernels, whose FLOPs no HLO tells,
share what the model's formula counts beyond the matrix products of the HLO, equally by execution; where the HLO has more products than
the formula, the HLO is what is executed. Two bounds bracket the rest:
    hidden    all communication overlaps what the chip does by itself
    exposed   collectives that the compiler made synchronous stop everything else; asynchronous ones and DCN overlap

ICI time is counted by links: a ring sends both ways, so a group that spans 1, 2 or 3 closed torus dimensions drives 2, 4 or
6 links; a dimension without wrap-around links, or one that the group fills in part, gives one of its two.
MFU is in the convention of the model FLOPs passed in (`model.flops`), and of the bf16 peak, also where products are int8 and faster.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from model.flops import Chip
from model.preflight.hlo_cost import Collective, HloCost
from model.slices import Slice

Bound = Literal["compute", "hbm", "ici", "dcn"]


@dataclass(frozen=True)
class Roofline:
    """Figures of one step; FLOPs, bytes and rates are per chip, times in seconds, shares and MFU between 0 and 1."""

    model_flops_per_chip: float
    executed_flops_per_chip: float
    hbm_bytes_per_chip: float
    ici_bytes_per_chip: float
    dcn_bytes_per_chip: float
    all_gather_async_share: float
    async_share: float
    compute_seconds: float
    hbm_seconds: float
    on_chip_seconds: float  # loop by loop the slower of the two
    ici_seconds: float  # all collectives of the slice, one after the other
    dcn_seconds: float
    exposed_ici_seconds: float  # the synchronous ones among them
    exposed_ici_seconds_by_colors: float  # the same at the number of directions that the compiler says each one uses
    bound: Bound
    mfu_bound_hidden: float
    mfu_bound_exposed: float
    mfu_bound_exposed_by_colors: float
    step_seconds: float  # lower bound, synchronous collectives exposed
    tokens_per_second_per_chip: float  # upper bound

    @property
    def recomputation(self) -> float:
        """Executed over model FLOPs."""
        return self.executed_flops_per_chip / self.model_flops_per_chip


def roofline(
    chip: Chip,
    tpu_slice: Slice,
    cost: HloCost,
    *,
    model_flops_per_chip: float,
    executed_flops_per_chip: float,
    tokens_per_chip: float,
    coordinates: Sequence[Sequence[int]] | None = None,
) -> Roofline:
    """Bounds of one step.

    Args:
        model_flops_per_chip, executed_flops_per_chip, tokens_per_chip: of one step, for one chip; executed by the model's formula.
        coordinates: torus coordinates of each partition (`device.coords`, in mesh order). Without them a group's place on
            the torus is what the compiler says of it, or else the fewest dimensions that hold it.

    Raises:
        ValueError: the chip is not the slice's, FLOPs or tokens are not positive, or coordinates are missing for a partition.
    """
    _check(chip, tpu_slice, cost, model_flops_per_chip, executed_flops_per_chip, tokens_per_chip, coordinates)
    executed_flops_per_chip = max(executed_flops_per_chip, cost.dot_flops)
    ici = _ici_times(chip, tpu_slice, cost, coordinates)
    compute = _compute_seconds(chip, executed_flops_per_chip, cost.int8_flops)
    hbm = cost.hbm_bytes / chip.hbm_bytes_per_second
    dcn = cost.dcn_bytes / chip.dcn_bytes_per_second
    seconds: dict[Bound, float] = {"compute": compute, "hbm": hbm, "ici": ici.exposed + ici.hidden, "dcn": dcn}
    on_chip = _on_chip_seconds(chip, cost, executed_flops_per_chip)
    overlapped = max(on_chip, ici.hidden, dcn)
    ideal = model_flops_per_chip / chip.bf16_flops
    return Roofline(
        model_flops_per_chip=model_flops_per_chip,
        executed_flops_per_chip=executed_flops_per_chip,
        hbm_bytes_per_chip=cost.hbm_bytes,
        ici_bytes_per_chip=cost.ici_bytes,
        dcn_bytes_per_chip=cost.dcn_bytes,
        all_gather_async_share=cost.all_gather_async_share,
        async_share=cost.async_share,
        compute_seconds=compute,
        hbm_seconds=hbm,
        on_chip_seconds=on_chip,
        ici_seconds=seconds["ici"],
        dcn_seconds=dcn,
        exposed_ici_seconds=ici.exposed,
        exposed_ici_seconds_by_colors=ici.exposed_by_colors,
        bound=max(seconds, key=lambda unit: seconds[unit]),
        mfu_bound_hidden=ideal / max(on_chip, *seconds.values()),
        mfu_bound_exposed=ideal / (overlapped + ici.exposed),
        mfu_bound_exposed_by_colors=ideal / (overlapped + ici.exposed_by_colors),
        step_seconds=overlapped + ici.exposed,
        tokens_per_second_per_chip=tokens_per_chip / (overlapped + ici.exposed),
    )


def _on_chip_seconds(chip: Chip, cost: HloCost, executed_flops: float) -> float:
    """Seconds of computation and HBM traffic, one loop after the other."""
    if not cost.phases or not cost.dot_flops:
        return max(_compute_seconds(chip, executed_flops, cost.int8_flops), cost.hbm_bytes / chip.hbm_bytes_per_second)
    kernels = sum(phase.kernels for phase in cost.phases)
    per_kernel = (executed_flops - cost.dot_flops) / kernels if kernels else 0.0
    scale = 1.0 if kernels else executed_flops / cost.dot_flops
    return sum(
        max(
            _compute_seconds(chip, phase.dot_flops * scale + phase.kernels * per_kernel, phase.int8_flops * scale),
            phase.hbm_bytes / chip.hbm_bytes_per_second,
        )
        for phase in cost.phases
    )


def _compute_seconds(chip: Chip, flops: float, int8_flops: float) -> float:
    """Of products at the chip's peaks, `int8_flops` of all `flops` at that of integers."""
    return (flops - int8_flops) / chip.bf16_flops + int8_flops / chip.int8_flops


class _IciTimes(NamedTuple):
    """Seconds a step of collectives takes, each kind one after the other."""

    hidden: float  # the asynchronous ones
    exposed: float  # the synchronous ones
    exposed_by_colors: float


def _ici_times(chip: Chip, tpu_slice: Slice, cost: HloCost, coordinates: Sequence[Sequence[int]] | None) -> _IciTimes:
    hidden = exposed = by_colors = 0.0
    for collective in cost.collectives:
        if collective.network != "ici":
            continue
        links = links_of(collective, tpu_slice, coordinates)
        one_link = collective.total_wire_bytes / chip.ici_link_bytes_per_second
        if collective.is_async:
            hidden += one_link / links
        else:
            exposed += one_link / links
            by_colors += one_link / min(collective.colors or links, links)
    return _IciTimes(hidden, exposed, by_colors)


def links_of(collective: Collective, tpu_slice: Slice, coordinates: Sequence[Sequence[int]] | None = None) -> int:
    """Links out of a chip that a collective within a slice drives at once."""
    if collective.kind == "collective-permute":
        return 2 if any(tpu_slice.wrap) else 1  # a step along one ring; the compiler pairs it with one the other way
    if coordinates is not None:
        places = [coordinates[partition] for partition in collective.group]
        spread = [len({place[dimension] for place in places}) for dimension in range(len(tpu_slice.topology))]
    else:
        spread = _spread(len(collective.group), tpu_slice.topology, collective.torus_dimensions)
    links = sum(_links(*one) for one in zip(spread, tpu_slice.topology, tpu_slice.wrap, strict=True))
    if collective.torus_dimensions is not None:  # a group over a plane may be given a single ring
        links = min(links, 2 * collective.torus_dimensions)
    return max(links, 1)


def _spread(group: int, topology: tuple[int, ...], wanted: int | None) -> list[int]:
    """Places along each dimension that a group of this size takes: `wanted` dimensions in full, else the fewest that hold it."""
    counts = range(1, len(topology) + 1)
    for count in sorted(counts, key=lambda count: (count != wanted, count)):
        for chosen in itertools.combinations(range(len(topology)), count):
            if math.prod(topology[dimension] for dimension in chosen) == group:
                return [size if dimension in chosen else 1 for dimension, size in enumerate(topology)]
    spread = [1] * len(topology)
    for dimension in sorted(range(len(topology)), key=lambda dimension: -topology[dimension]):
        spread[dimension] = min(topology[dimension], math.ceil(group / math.prod(spread)))
    return spread


def _links(spread: int, size: int, wrapped: bool) -> int:
    """Links along one dimension of a group that stands in `spread` of its `size` places."""
    if spread == 1:
        return 0
    return 2 if wrapped and spread == size else 1


def _check(
    chip: Chip,
    tpu_slice: Slice,
    cost: HloCost,
    model_flops: float,
    executed_flops: float,
    tokens: float,
    coordinates: Sequence[Sequence[int]] | None,
) -> None:
    if chip.name != tpu_slice.generation:
        raise ValueError(f"chip {chip.name} is not that of slice {tpu_slice.name}: pass CHIPS[{tpu_slice.generation!r}]")
    for name, value in (("model_flops_per_chip", model_flops), ("executed_flops_per_chip", executed_flops), ("tokens_per_chip", tokens)):
        if not value > 0:
            raise ValueError(f"{name}={value} must be above 0")
    if coordinates is not None and len(coordinates) < cost.num_partitions:
        raise ValueError(f"coordinates of {len(coordinates)} partitions, the program has {cost.num_partitions}: pass one for each device")
