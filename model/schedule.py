"""How many rows of each component lie before any block border: whole numbers that follow exact shares as closely as they can.

A block is the rows between two borders; borders are the multiples of 2048 and the rows where rates change: where a stage begins
and where a component is used up. At each border the counts add up to the row, never fall from border to border, and each is
about within 1 of what the component is due, also for shares far below one row a block: no positive share is ever rounded to
nothing.

  even stretches   (rates as they are, whole blocks) counts come straight from the exact shares, whatever the row. Components
                   with at least two rows a block take the differences of their rounded cumulative shares, which are their own
                   due rounded down or up. Rarer ones would now and then lose a row again that way, so they are kept in two
                   groups, before and behind the others in the cumulative order, where a rounded total only rises; inside a
                   group the total is divided in two again and again, each part a rounded share of the rows of the whole.
                   With four rare components at most the bound of 1 is strict. For more, the divisions are searched for
                   whose bound is the least; of thousands of mixtures made to break it, one in a hundred passed 1 for
                   moments, by 0.04 at most with up to 64 rare components. Beyond 64 the parts are just halves: up to 1.2
  other blocks     (cut at a stage, or a component runs out) counts are carried on from the border before, row by row to
                   whoever is owed most. A stage that makes a common component a rare one, far below its share before, can
                   leave it up to half a row beyond the bound until its next row is due. Where a component is used up, counts
                   at the ends of its 2048 rows come first, and those at the border between stay between them.

C components, numbered in the order of the names.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise

import numpy as np

from model.shares import Shares, Stage, Stretch

BLOCK = 2048
# Of rows a block. Below this a rounded difference can fall from one border to the next.
_COMMON = 2
# How many rare components are divided by search, which takes the third power of it, and the bounds that are tried in turn.
_SEARCHED = 64
_BOUNDS = (1.0, 1.05, 1.15, 1.5)
_HALF = 0.5


@dataclass(frozen=True)
class Block:
    """Rows [start, stop), and how many rows of each component lie before each end."""

    start: int
    stop: int
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class _Piece:
    """Rows [start, stop): one block, or an even stretch of whole blocks. `stop` is None where it never ends."""

    start: int
    stop: int | None
    before: tuple[int, ...]
    even: _EvenStretch | None


class Schedule:
    """The blocks of a run. Finding one takes the same time wherever it is."""

    def __init__(self, names: Sequence[str], stages: Sequence[Stage], limits: Sequence[int | None]) -> None:
        """`limits` are the rows that each component has at most, None for no limit. Raises ValueError as Shares does."""
        self._shares = Shares(names, stages, limits)
        self._limits = limits
        self.num_rows = None if self._shares.end is None else math.floor(self._shares.end)
        self._pieces: list[_Piece] = []
        counts = (0,) * len(names)
        for start, stop in self._spans(stages):
            even = self._even(start, stop, counts)
            self._pieces.append(_Piece(start, stop, counts, even))
            if stop is None:
                continue
            after = self._carry_on(start, stop, counts) if even is None else even.counts(stop)
            if even is None:
                self._pieces[-1:] = self._cut_where_used_up(start, stop, counts, after)
            counts = after
        self._starts = [piece.start for piece in self._pieces]
        self._final = counts

    def block(self, row: int) -> Block:
        """The block that holds `row`. Raises IndexError past the last row."""
        if row < 0 or (self.num_rows is not None and row >= self.num_rows):
            raise IndexError(f"row {row} of a mixture that has {self.num_rows} rows")
        index = bisect_right(self._starts, row) - 1
        piece = self._pieces[index]
        if piece.even is None:
            assert piece.stop is not None
            after = self._pieces[index + 1].before if index + 1 < len(self._pieces) else self._final
            return Block(piece.start, piece.stop, piece.before, after)
        start = row // BLOCK * BLOCK
        return Block(start, start + BLOCK, piece.even.counts(start), piece.even.counts(start + BLOCK))

    def due(self, row: int) -> tuple[Fraction, ...]:
        """What each component is due before `row`, exactly."""
        return self._shares.at(row)

    def _spans(self, stages: Sequence[Stage]) -> list[tuple[int, int | None]]:
        """Where pieces begin and end: around each change of rates the block it falls in, cut where a stage begins."""
        borders = {stage.row for stage in stages}
        for row in (*borders, *map(math.ceil, self._shares.used_up)):
            borders |= {max(row - 1, 0) // BLOCK * BLOCK, -(-row // BLOCK) * BLOCK}
        if self.num_rows is None:
            ordered = sorted(borders)
            return list(zip(ordered, [*ordered[1:], None], strict=True))
        borders |= {self.num_rows // BLOCK * BLOCK, self.num_rows}
        ordered = sorted(border for border in borders if border <= self.num_rows)
        return list(pairwise(ordered))

    def _even(self, start: int, stop: int | None, counts: tuple[int, ...]) -> _EvenStretch | None:
        if start % BLOCK or (stop is not None and stop % BLOCK):
            return None
        stretch = self._shares.stretch(start)
        if stop is not None and stretch is not self._shares.stretch(stop):
            return None
        return _EvenStretch(start, counts, stretch)

    def _cut_where_used_up(self, start: int, stop: int, before: tuple[int, ...], after: tuple[int, ...]) -> list[_Piece]:
        """The rows [start, stop), cut where components are used up, so that each has its share of the rows until then."""
        first, last = bisect_right(self._shares.used_up, start), bisect_right(self._shares.used_up, stop - 1)
        cuts = [start, *sorted({math.ceil(row) for row in self._shares.used_up[first:last]})]
        pieces = [_Piece(start, cuts[1] if len(cuts) > 1 else stop, before, None)]
        for row, cut, end in zip(cuts, cuts[1:], [*cuts[2:], stop], strict=False):
            stretch, counts = self._shares.stretch(cut), list(pieces[-1].before)
            self._hand_out(cut - row, range(len(counts)), stretch.at(cut), stretch.denominator, counts, after)
            pieces.append(_Piece(cut, end, tuple(counts), None))
        return pieces

    def _carry_on(self, start: int, stop: int, before: tuple[int, ...]) -> tuple[int, ...]:
        """Counts at `stop` from those at `start`: as near to what is due as rows that only rise can come."""
        first, last = self._shares.stretch(start), self._shares.stretch(stop)
        unit = math.lcm(first.denominator, last.denominator)
        due_start = [due * (unit // first.denominator) for due in first.at(start)]
        due = [due * (unit // last.denominator) for due in last.at(stop)]
        rising = [index for index in range(len(due)) if due[index] > due_start[index]]
        full = {index for index in rising if (limit := self._limits[index]) is not None and due[index] == limit * unit}
        # Who gets nothing from here on keeps its rounding for good, so these are rounded together: their sum is within 1/2.
        leaving = [index for index in rising if not last.rates[index] and index not in full]
        staying = [index for index in rising if last.rates[index] or index in full]
        counts, rows = list(before), stop - start
        if leaving and staying:
            resting = set(range(len(due))).difference(staying).intersection(index for index, rate in enumerate(last.rates) if not rate)
            owed = _round(sum(due[index] for index in resting), unit) - sum(before[index] for index in resting)
            owed = max(0, min(owed, rows))
            self._hand_out(owed, leaving, due, unit, counts, self._limits)
            rows -= owed
        self._hand_out(rows, staying or leaving, due, unit, counts, self._limits)
        return tuple(counts)

    @staticmethod
    def _hand_out(rows: int, members: Sequence[int], due: Sequence[int], unit: int, counts: list[int], most: Sequence[int | None]) -> None:
        """Adds `rows` rows to the counts of the members, each to whoever is then owed most and has less than its `most`."""
        room = {index: math.inf if (limit := most[index]) is None else limit - counts[index] for index in members}
        extra = {index: int(max(0, min(due[index] // unit - counts[index], room[index]))) for index in members}
        left = rows - sum(extra.values())
        step = 1 if left > 0 else -1
        able = [index for index in members if (extra[index] < room[index] if step > 0 else extra[index] > 0)]
        queue = [(step * ((counts[index] + extra[index]) * unit - due[index]), index) for index in able]
        heapq.heapify(queue)
        for _ in range(abs(left)):
            owing, index = queue[0]
            extra[index] += step
            if extra[index] == (room[index] if step > 0 else 0):
                heapq.heappop(queue)
            else:
                heapq.heapreplace(queue, (owing + unit, index))
        for index in members:
            counts[index] += extra[index]


class _EvenStretch:
    """Counts at the borders of whole blocks with the same rates, from the counts at its first border."""

    def __init__(self, start: int, counts: tuple[int, ...], stretch: Stretch) -> None:
        self._start, self._counts, self._stretch = start, counts, stretch
        self._unit, self._rates, self._due = stretch.denominator, stretch.rates, stretch.at(start)
        active = [index for index, rate in enumerate(self._rates) if rate]
        resting = [index for index, rate in enumerate(self._rates) if not rate]
        self._common = [index for index in active if self._rates[index] * BLOCK >= _COMMON * self._unit]
        rare = sorted(set(active).difference(self._common), key=lambda index: (-self._rates[index], index))
        self._resting_rows = sum(counts[index] for index in resting)
        # What those at rest have too much is borne half by the first of the others and half by the last: half moves every edge.
        excess = self._resting_rows * self._unit - sum(self._due[index] for index in resting)
        self._twice_first_edge = 2 * self._resting_rows * self._unit - excess
        self._rare = rare
        # Two groups, each rounded on its own; or one, which is rounded beside the common, or is all there is.
        divided = bool(self._common) and len(rare) > 1 and not excess
        self._cuts = _divisions([self._rates[index] for index in rare], rounded=bool(self._common) and not divided)
        self._split = self._cuts[0, len(rare)] if divided else 0
        self._rate_sums = _sums(self._rates, rare)
        self._due_sums = _sums(self._due, rare)
        self._count_sums = _sums(counts, rare)

    def counts(self, row: int) -> tuple[int, ...]:
        """Rows of each component before `row`, a border of the stretch."""
        if row == self._start:
            return self._counts
        counts, due, unit = list(self._counts), self._stretch.at(row), 2 * self._unit
        split, size = self._split, len(self._rare)
        twice = self._twice_first_edge + 2 * sum(due[index] for index in self._rare[:split])
        front = max(self._count_sums[split], _round(twice, unit) - self._resting_rows) if split else 0
        behind = row - self._resting_rows - front
        if self._common:
            common = 2 * sum(due[index] for index in self._common)
            before = self._count_sums[size] - self._count_sums[split]
            behind = max(before, row - _round(twice + common, unit)) if size > split else 0
        edge = self._resting_rows + front
        for position, index in enumerate(self._common):
            twice += 2 * due[index]
            last = position == len(self._common) - 1
            counts[index] = (row - behind if last else _round(twice, unit)) - edge
            edge += counts[index]
        self._divide(front, 0, split, counts)
        self._divide(behind, split, size, counts)
        return tuple(counts)

    def _divide(self, rows: int, first: int, stop: int, counts: list[int]) -> None:
        """Divides `rows` rows among the rare from `first` to `stop`; while `rows` only rises, so do the rows of each of them."""
        if stop - first < 2:
            for index in self._rare[first:stop]:
                counts[index] = rows
            return
        cut = self._cuts[first, stop]
        rate, of_all = (self._rate_sums[end] - self._rate_sums[first] for end in (cut, stop))
        due, all_due = (self._due_sums[end] - self._due_sums[first] for end in (cut, stop))
        before, all_before = (self._count_sums[end] - self._count_sums[first] for end in (cut, stop))
        owed = _round(due * of_all + rate * (rows * self._unit - all_due), self._unit * of_all)
        part = max(before, min(owed, before + rows - all_before))
        self._divide(part, first, cut, counts)
        self._divide(rows - part, cut, stop, counts)


def _divisions(rates: Sequence[int], rounded: bool) -> dict[tuple[int, int], int]:
    """Where to cut each stretch (first, stop) of a list of rare components, heaviest first, in two.

    A part that has the share r of a whole with the error e gets an error up to 1/2 + r * e: a rounding, and its share of what
    the whole had. Of a list that is not long, the cuts are those for which the largest error of a component is the least.
    `rounded`: the list as a whole has an error of up to 1/2, else none.
    """
    total = sum(rates)
    shares = [rate / total for rate in rates]
    if len(rates) <= _SEARCHED:
        for bound in _BOUNDS:
            cuts, bearable = _search(shares, bound)
            if bearable >= (_HALF if rounded else 0):
                return cuts
    cuts, sums = {}, _sums(rates, range(len(rates)))
    waiting = [(0, len(rates))]
    while waiting:
        first, stop = waiting.pop()
        if stop - first > 1:
            middle = bisect_left(sums, -(-(sums[first] + sums[stop]) // 2), first + 1, stop - 1)
            cuts[first, stop] = middle
            waiting += [(first, middle), (middle, stop)]
    return cuts


def _search(shares: Sequence[float], bound: float) -> tuple[dict[tuple[int, int], int], float]:
    """The cuts that let the whole list have the largest error with which no component passes `bound`, and that error."""
    size = len(shares)
    sums = np.array([0.0, *accumulate(shares)])
    bearable = np.full((size, size + 1), bound)  # by the first component of a part, and how many it has
    cuts: dict[tuple[int, int], int] = {}
    for length in range(2, size + 1):
        first, left = np.arange(size - length + 1)[:, None], np.arange(1, length)
        cut, stop = first + left, first + length
        whole = sums[stop] - sums[first]
        found = np.minimum(
            (bearable[first, left] - _HALF) * whole / (sums[cut] - sums[first]),
            (bearable[cut, length - left] - _HALF) * whole / (sums[stop] - sums[cut]),
        )
        best = found.argmax(axis=1)
        bearable[: len(best), length] = found.max(axis=1)
        cuts.update({(start, start + length): start + 1 + place for start, place in enumerate(best.tolist())})
    return cuts, float(bearable[0, size]) if size else bound


def _sums(values: Sequence[int], members: Sequence[int]) -> list[int]:
    """Sums of the values of the first 0, 1, 2, ... members."""
    return [0, *accumulate(values[index] for index in members)]


def _round(numerator: int, denominator: int) -> int:
    """The nearest whole number, halves up."""
    return (2 * numerator + denominator) // (2 * denominator)
