"""Exact shares: how many rows of each component the rates call for before a row, as fractions, through every change of rates.

Rates change where a stage begins, and where a component has used up its rows: its share then goes to the others in proportion.
All numbers are `fractions.Fraction`; floats enter as what they are exactly.

C components, numbered in the order of the names.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Stage:
    """Rates from row `row` on: shares by component name, on any positive scale."""

    row: int
    shares: Mapping[str, float]


@dataclass(frozen=True)
class Stretch:
    """Rows from `start` on with the same rates; `targets` is what each component is due before `start`."""

    start: Fraction
    targets: tuple[Fraction, ...]
    rates: tuple[Fraction, ...]

    def at(self, row: Fraction | int) -> tuple[Fraction, ...]:
        """What each component is due before `row`, which is not before `start`."""
        rows = row - self.start
        return tuple(target + rate * rows for target, rate in zip(self.targets, self.rates, strict=True))


class Shares:
    """The stretches of a run, first to last. `end` is the row at which every component is used up, None where that never is."""

    def __init__(self, names: Sequence[str], stages: Sequence[Stage], limits: Sequence[int | None]) -> None:
        """`limits` are the rows that each component has at most, None for no limit.

        Raises ValueError for stages that do not begin at row 0 and rise, or a share that is negative or of no component.
        """
        rows = [stage.row for stage in stages]
        if not rows or rows[0] != 0 or rows != sorted(set(rows)):
            raise ValueError(f"the stages of a mixture begin at the rows {rows}: they must begin at 0 and rise")
        self._limits = limits
        self.stretches: list[Stretch] = []
        self.end: Fraction | None = None
        self.used_up: list[Fraction] = []
        start, targets = Fraction(0), (Fraction(0),) * len(names)
        for index, stage in enumerate(stages):
            weights = _weights(names, stage)
            until = Fraction(stages[index + 1].row) if index + 1 < len(stages) else None
            while until is None or start < until:
                rates = self._rates(weights, targets)
                if rates is None:
                    self.end = start
                    break
                stretch = Stretch(start, targets, rates)
                self.stretches.append(stretch)
                dry = self._runs_dry(stretch)
                if dry is not None and (until is None or dry <= until):
                    start, targets = dry, self._settled(stretch.at(dry))
                    self.used_up.append(dry)
                elif until is None:
                    break
                else:
                    start, targets = until, stretch.at(until)
            if self.end is not None:
                break
        self._starts = [stretch.start for stretch in self.stretches]

    def at(self, row: int) -> tuple[Fraction, ...]:
        """What each component is due before `row`."""
        return self.stretch(row).at(row)

    def stretch(self, row: int) -> Stretch:
        """The stretch that holds `row`; the last one past the end."""
        return self.stretches[max(bisect_right(self._starts, row) - 1, 0)]

    def _rates(self, weights: Sequence[Fraction], targets: Sequence[Fraction]) -> tuple[Fraction, ...] | None:
        left = [
            Fraction(0) if limit is not None and target >= limit else weight
            for weight, target, limit in zip(weights, targets, self._limits, strict=True)
        ]
        total = sum(left)
        return tuple(weight / total for weight in left) if total else None

    def _runs_dry(self, stretch: Stretch) -> Fraction | None:
        dry = [
            stretch.start + (limit - target) / rate
            for target, rate, limit in zip(stretch.targets, stretch.rates, self._limits, strict=True)
            if limit is not None and rate
        ]
        return min(dry, default=None)

    def _settled(self, targets: Sequence[Fraction]) -> tuple[Fraction, ...]:
        return tuple(target if limit is None else min(target, Fraction(limit)) for target, limit in zip(targets, self._limits, strict=True))


def _weights(names: Sequence[str], stage: Stage) -> list[Fraction]:
    for name, share in stage.shares.items():
        if name not in names:
            raise ValueError(f"the stage at row {stage.row} has a share of {name!r}, which is no component; those are {', '.join(names)}")
        if not (math.isfinite(share) and share >= 0):
            raise ValueError(f"the stage at row {stage.row} gives {name!r} the share {share}: it must be 0 or more")
    weights = [Fraction(stage.shares.get(name, 0)) for name in names]
    if not any(weights):
        raise ValueError(f"the stage at row {stage.row} has no component with a positive share; give at least one in mixture.weights")
    return weights
