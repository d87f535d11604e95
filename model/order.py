"""The order of training rows: which window of which component is row i, as arithmetic, without state or tables.

Row i is a pure function of (components, stages, seed, i). Version 4 of the order:
  mixture      blocks of at most 2048 rows hold so many rows of each component that the shares are exact at every border
               (`model.schedule`); a keyed permutation decides whose each row of the block is
  windows      row k of a component is window p(k mod n) of epoch k // n, with n windows in an epoch and p a permutation keyed
               by the seed, the component's name and the epoch. A window is whatever the packing says: a stretch of the stream
               that is cut anew every epoch, or a bin of whole documents
The rows of a component, in the order of the run, are its windows in an order that depends on its name alone, epoch after epoch:
adding, dropping or re-weighting another component changes where they are, but not what comes next.

Shapes: N rows asked for, B rows of a block, C components.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from model.permutation import hash64, name_key, permute
from model.schedule import BLOCK, Block, Schedule
from model.shares import Stage

__all__ = ["BLOCK", "ORDER_VERSION", "Component", "RowOrder", "Rows", "Stage", "hash64", "kept_windows", "permute"]

ORDER_VERSION = 4
_KEPT_BLOCKS = 4

# which question a hash answers, so that the answers are independent
_PLACE, _WINDOW, _CUT, _SLICE = 1, 2, 3, 4


@dataclass(frozen=True)
class Component:
    """What the order needs to know of a component: its name, its windows, and how much of them may be used.

    `max_epochs`: after so many epochs it is left out. `kept_windows`: only so many windows, chosen once for the run, are
    used at all (simulated epoching); then the stream is cut in the same places every epoch, so that the same rows repeat.
    """

    name: str
    num_windows: int
    max_epochs: float | None = None
    kept_windows: int | None = None

    @property
    def epoch_rows(self) -> int:
        """Rows of one epoch."""
        return self.num_windows if self.kept_windows is None else self.kept_windows

    @property
    def max_rows(self) -> int | None:
        """Rows after which the component is left out, at least 1; None where it never is."""
        if self.max_epochs is None:
            return None
        # the decimal that was written, not the binary fraction below it: 0.7 epochs of 10 windows are 7 rows
        return max(1, math.floor(Fraction(str(self.max_epochs)) * self.epoch_rows))


def kept_windows(num_windows: int, experiment_tokens: int, target_tokens: int) -> int:
    """How many of a component's windows a run of `experiment_tokens` uses that stands for one of `target_tokens`; at least 1."""
    return max(1, round(num_windows * Fraction(experiment_tokens, target_tokens)))


class Rows(NamedTuple):
    """Where rows come from: component index int64 [N], window of it int64 [N], and the random number of its epoch uint64 [N]."""

    component: np.ndarray
    window: np.ndarray
    cut: np.ndarray


class RowOrder:
    """Maps row numbers to windows of components."""

    def __init__(self, components: Sequence[Component], stages: Sequence[Stage], seed: int) -> None:
        """Raises ValueError where there are no components, a component has no window, or the stages do not fit."""
        if not components:
            raise ValueError("the mixture has no component with a positive weight; give at least one in mixture.weights")
        for component in components:
            if not 1 <= component.epoch_rows <= component.num_windows:
                raise ValueError(f"component {component.name!r} uses {component.epoch_rows} of {component.num_windows} windows")
        self.components = tuple(components)
        self.names = tuple(component.name for component in components)
        self._seed = seed
        self._schedule = Schedule(self.names, stages, [component.max_rows for component in components])
        self._windows_C = np.array([component.num_windows for component in components], np.int64)
        self._epoch_C = np.array([component.epoch_rows for component in components], np.int64)
        self._sliced_C = self._epoch_C < self._windows_C
        self._fixed_C = np.array([component.kept_windows is not None for component in components])
        self._names_C = np.array([name_key(component.name) for component in components], np.uint64)
        self._plans: OrderedDict[int, tuple[Block, Rows]] = OrderedDict()

    @property
    def num_rows(self) -> int | None:
        """Rows until every component has had its `max_epochs`; None where that never is."""
        return self._schedule.num_rows

    def rows(self, start: int, stop: int) -> Rows:
        """Rows [start, stop) of the run. Raises IndexError past the last row."""
        parts: list[Rows] = []
        while start < stop:
            block, rows = self._plan(start)
            end = min(stop, block.stop)
            part = slice(start - block.start, end - block.start)
            parts.append(Rows(rows.component[part], rows.window[part], rows.cut[part]))
            start = end
        return parts[0] if len(parts) == 1 else Rows(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def planned_rows(self, num_rows: int) -> Mapping[str, int]:
        """How many of the first `num_rows` rows each component gets. Raises IndexError past the last row."""
        counts_C = np.zeros(len(self.names), np.int64)
        if num_rows:
            block, rows = self._plan(num_rows - 1)
            counts_C = np.array(block.before) + np.bincount(rows.component[: num_rows - block.start], minlength=len(self.names))
        return {name: int(count) for name, count in zip(self.names, counts_C, strict=True)}

    def _plan(self, row: int) -> tuple[Block, Rows]:
        """The block that holds `row`, whole. Kept, since a block at once costs little more than a batch."""
        for block, rows in self._plans.values():
            if block.start <= row < block.stop:
                return block, rows
        if len(self._plans) >= _KEPT_BLOCKS:
            self._plans.popitem(last=False)
        block = self._schedule.block(row)
        self._plans[block.start] = block, self._compute(block)
        return self._plans[block.start]

    def _compute(self, block: Block) -> Rows:
        before_C = np.array(block.before, np.int64)
        count_C = np.array(block.after, np.int64) - before_C
        size = block.stop - block.start
        place_B = permute(np.arange(size), size, hash64(self._seed, _PLACE, block.start))
        component_B = np.repeat(np.arange(len(count_C)), count_C)[place_B]
        nth_B = np.empty(size, np.int64)
        # the rows of a component are numbered as they come, so that its epochs follow one another
        nth_B[np.argsort(component_B, kind="stable")] = np.arange(size) + np.repeat(before_C - np.cumsum(count_C) + count_C, count_C)
        epoch_B, nth_B = np.divmod(nth_B, self._epoch_C[component_B])
        name_B = self._names_C[component_B]
        window_B = permute(nth_B, self._epoch_C[component_B], hash64(self._seed, _WINDOW, name_B, epoch_B))
        if len(sliced := np.flatnonzero(self._sliced_C[component_B])):
            of = component_B[sliced]
            window_B[sliced] = permute(window_B[sliced], self._windows_C[of], hash64(self._seed, _SLICE, self._names_C[of]))
        cut_B = hash64(self._seed, _CUT, name_B, np.where(self._fixed_C[component_B], 0, epoch_B))
        return Rows(component_B, window_B, cut_B)
