"""Exact shares: how many rows of each component the rates call for before a row, as fractions, through every change of rates.

Rates change where a stage begins, and where a component has used up its rows: its share then goes to the others in proportion.
Floats enter as what they are exactly. A stretch of rows with the same rates has one denominator for all components, so that
their dues are whole numbers: fractions of their own would be brought to lowest terms at each step, which takes most of the time
where hundreds of components run out one after the other.

C components, numbered in the order of the names.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby


@dataclass(frozen=True)
class Stage:
    """Rates from row `row` on: shares by component name, on any positive scale."""

    row: int
    shares: Mapping[str, float]


@dataclass(frozen=True)
class Stretch:
    """Rows from `start` on with the same rates: before row i a component is due (base + rate * i) / denominator rows."""

    start: Fraction
    denominator: int
    bases: tuple[int, ...]
    rates: tuple[int, ...]

    def at(self, row: int) -> list[int]:
        """What each component is due before `row`, which is not before `start`, times the denominator."""
        return [base + rate * row for base, rate in zip(self.bases, self.rates, strict=True)]


class Shares:
    """The stretches of a run, first to last. `end` is the row at which every component is used up, None where that never is."""

    def __init__(self, names: Sequence[str], stages: Sequence[Stage], limits: Sequence[int | None]) -> None:
        """`limits` are the rows that each component has at most, None for no limit.

        Raises ValueError for stages that do not begin at row 0 and rise, or a share that is negative or of no component.
        """
        rows = [stage.row for stage in stages]
        if not rows or rows[0] != 0 or rows != sorted(set(rows)):
            raise ValueError(f"the stages of a mixture begin at the rows {rows}: they must begin at 0 and rise")
        weights = [_weights(names, stage) for stage in stages]
        self._limits = limits
        self.stretches: list[Stretch] = []
        self.end: Fraction | None = None
        self.used_up: list[Fraction] = []
        denominator, due = 1, [0] * len(names)
        for start, until, weight_C in zip(rows, [*rows[1:], None], weights, strict=True):
            self._add_stage(start, until, weight_C, denominator, due)
            if until is None or self.end is not None:
                break
            last = self.stretches[-1]
            denominator, due = _reduced(last.denominator, last.at(until))
        self._starts = [stretch.start for stretch in self.stretches]

    def at(self, row: int) -> tuple[Fraction, ...]:
        """What each component is due before `row`."""
        stretch = self.stretch(row)
        return tuple(Fraction(due, stretch.denominator) for due in stretch.at(row))

    def stretch(self, row: int) -> Stretch:
        """The stretch that holds `row`; the last one past the end."""
        return self.stretches[max(bisect_right(self._starts, row) - 1, 0)]

    def _add_stage(self, first: int, until: int | None, weights: Sequence[int], denominator: int, due: Sequence[int]) -> None:
        """The stretches of the stage of rows [first, until), before which each component is due `due` / `denominator` rows.

        While it has rows, a component is due its weight times the time that has passed, on a clock that runs faster when
        others are used up; so the time at which it is used up itself depends on no other component.
        """
        times: list[tuple[Fraction, int]] = []
        active: set[int] = set()
        for index, (weight, limit) in enumerate(zip(weights, self._limits, strict=True)):
            if weight and (limit is None or due[index] < limit * denominator):
                active.add(index)
                if limit is not None:
                    times.append((Fraction(limit * denominator - due[index], denominator * weight), index))
        fixed, begin = list(due), Fraction(first)
        for time, ending in groupby(sorted(times), key=lambda item: item[0]):
            begin = self._add_stretch(begin, weights, denominator, fixed, active, time)
            if until is not None and begin > until:
                return
            self.used_up.append(begin)
            for _, index in ending:
                active.discard(index)
                fixed[index] = (self._limits[index] or 0) * denominator
            if begin == until:
                return
        if active:
            self._add_stretch(begin, weights, denominator, fixed, active, Fraction(0))
        else:
            self.end = begin

    def _add_stretch(
        self, begin: Fraction, weights: Sequence[int], denominator: int, fixed: Sequence[int], active: set[int], time: Fraction
    ) -> Fraction:
        """One stretch, in which the `active` components get rows by weight on top of `fixed`; returns the row at `time`."""
        total, rows = sum(weights[index] for index in active), sum(fixed)
        bases = [due * total - weights[index] * rows * (index in active) for index, due in enumerate(fixed)]
        rates = [weight * denominator * (index in active) for index, weight in enumerate(weights)]
        scale, numbers = _reduced(denominator * total, [*bases, *rates])
        self.stretches.append(Stretch(begin, scale, tuple(numbers[: len(bases)]), tuple(numbers[len(bases) :])))
        return Fraction(rows, denominator) + total * time


def _reduced(denominator: int, numerators: list[int]) -> tuple[int, list[int]]:
    common = math.gcd(denominator, *numerators)
    return denominator // common, [number // common for number in numerators]


def _weights(names: Sequence[str], stage: Stage) -> list[int]:
    """The shares as whole numbers in the same proportions."""
    for name, share in stage.shares.items():
        if name not in names:
            raise ValueError(f"the stage at row {stage.row} has a share of {name!r}, which is no component; those are {', '.join(names)}")
        if not (math.isfinite(share) and share >= 0):
            raise ValueError(f"the stage at row {stage.row} gives {name!r} the share {share}: it must be 0 or more")
    weights = [Fraction(stage.shares.get(name, 0)) for name in names]
    if not any(weights):
        raise ValueError(f"the stage at row {stage.row} has no component with a positive share; give at least one in mixture.weights")
    denominator = math.lcm(*(weight.denominator for weight in weights))
    return _reduced(0, [int(weight * denominator) for weight in weights])[1]
