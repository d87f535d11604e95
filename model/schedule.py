"""How many rows of each component lie before any block border: whole numbers that follow exact shares as closely as they can.

A block is the rows between two borders; borders are the multiples of 2048 and the rows where a stage begins. At each border
the counts add up to the row, never fall from border to border, and each is within 1 of what the component is due, also for
shares far below one row a block: no positive share is ever rounded to nothing.

  even stretches   (rates as they are, whole blocks) counts come straight from the exact shares, whatever the row. Components
                   with at least two rows a block take the differences of their rounded cumulative shares, which are their own
                   due rounded down or up. Rarer ones would now and then lose a row again that way, so they are kept in two
                   groups, before and behind the others in the cumulative order, where a rounded total only rises; inside a
                   group the total is divided in two again and again, each half a rounded part of the rows of the whole.
                   With four rare components at most the bound of 1 is strict; more can pass it by a fraction, for moments.
  other blocks     (cut at a stage, or a component runs out) counts are carried on from the border before, row by row to
                   whoever is owed most. A stage that makes a common component a rare one, far below its share before, can
                   leave it up to half a row beyond the bound until its next row is due.

C components, numbered in the order of the names.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from model.shares import Shares, Stage

BLOCK = 2048
# Of rows a block. Below this a rounded difference can fall from one border to the next.
_COMMON = 2
_HALF = Fraction(1, 2)


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
            if stop is not None:
                counts = self._carry_on(start, stop, counts) if even is None else even.counts(stop)
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
        borders = {0}
        for row in (stage.row for stage in stages):
            borders |= {row, max(row - 1, 0) // BLOCK * BLOCK, -(-row // BLOCK) * BLOCK}
        for row in self._shares.used_up:
            first = math.floor(row) // BLOCK * BLOCK
            borders |= {first, first + BLOCK}
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
        if stop is not None and self._shares.stretch(start) is not self._shares.stretch(stop):
            return None
        return _EvenStretch(start, counts, stretch.at(start), stretch.rates)

    def _carry_on(self, start: int, stop: int, before: tuple[int, ...]) -> tuple[int, ...]:
        """Counts at `stop` from those at `start`: as near to what is due as rows that only rise can come."""
        due_start, due = self._shares.at(start), self._shares.at(stop)
        rates = self._shares.stretch(stop).rates
        rising = [index for index in range(len(due)) if due[index] > due_start[index]]
        # Who gets nothing from here on keeps its rounding for good, so these are rounded together: their sum is within 1/2.
        leaving = [index for index in rising if not rates[index] and due[index] != self._limits[index]]
        staying = [index for index in rising if index not in leaving]
        counts, rows = list(before), stop - start
        if leaving and staying:
            resting = [index for index in range(len(due)) if not rates[index] and index not in staying]
            owed = _round(sum((due[index] for index in resting), Fraction(0))) - sum(before[index] for index in resting)
            owed = max(0, min(owed, rows))
            self._hand_out(owed, leaving, due, counts)
            rows -= owed
        self._hand_out(rows, staying or leaving, due, counts)
        return tuple(counts)

    def _hand_out(self, rows: int, members: Sequence[int], due: Sequence[Fraction], counts: list[int]) -> None:
        """Adds `rows` rows to the counts of the members, each to whoever is then owed most and is not used up."""
        room = {index: math.inf if (limit := self._limits[index]) is None else limit - counts[index] for index in members}
        extra = {index: max(0, min(math.floor(due[index] - counts[index]), room[index])) for index in members}
        while (left := rows - sum(extra.values())) != 0:
            step = 1 if left > 0 else -1
            able = [index for index in members if (extra[index] < room[index] if step > 0 else extra[index] > 0)]
            chosen = max(able, key=lambda index: (step * (due[index] - counts[index] - extra[index]), -index))
            extra[chosen] += step
        for index in members:
            counts[index] += int(extra[index])


class _EvenStretch:
    """Counts at the borders of whole blocks with the same rates, from the counts and dues at its first border."""

    def __init__(self, start: int, counts: tuple[int, ...], due: tuple[Fraction, ...], rates: tuple[Fraction, ...]) -> None:
        self._start, self._counts, self._due, self._rates = start, counts, due, rates
        active = [index for index, rate in enumerate(rates) if rate]
        resting = [index for index, rate in enumerate(rates) if not rate]
        self._common = [index for index in active if rates[index] * BLOCK >= _COMMON]
        rare = sorted((index for index in active if rates[index] * BLOCK < _COMMON), key=lambda index: (-rates[index], index))
        self._resting_rows = sum(counts[index] for index in resting)
        # What those at rest have too much is borne half by the first of the others and half by the last: half moves every edge.
        excess = self._resting_rows - sum((due[index] for index in resting), Fraction(0))
        self._first_edge = self._resting_rows - excess / 2
        divided = bool(self._common) and len(rare) > 1 and not excess
        self._front, self._behind = (rare[1::2], rare[::2]) if divided else ([], rare)

    def counts(self, row: int) -> tuple[int, ...]:
        """Rows of each component before `row`, a border of the stretch."""
        if row == self._start:
            return self._counts
        counts, rows = list(self._counts), row - self._start
        due = [due + rate * rows for due, rate in zip(self._due, self._rates, strict=True)]
        cumulative = self._first_edge + sum((due[index] for index in self._front), Fraction(0))
        front = max(self._sum(self._front), _round(cumulative) - self._resting_rows) if self._front else 0
        behind = row - self._resting_rows - front
        if self._common:
            common = sum((due[index] for index in self._common), Fraction(0))
            behind = max(self._sum(self._behind), row - _round(cumulative + common)) if self._behind else 0
        edge = self._resting_rows + front
        for position, index in enumerate(self._common):
            cumulative += due[index]
            last = position == len(self._common) - 1
            counts[index] = (row - behind if last else _round(cumulative)) - edge
            edge += counts[index]
        self._divide(front, self._front, counts)
        self._divide(behind, self._behind, counts)
        return tuple(counts)

    def _divide(self, rows: int, members: Sequence[int], counts: list[int]) -> None:
        """Divides the `rows` rows of a group, which only rise, so that the rows of each member only rise."""
        if len(members) < 2:
            for index in members:
                counts[index] = rows
            return
        cut = self._halfway(members)
        left, right = members[:cut], members[cut:]
        share = sum((self._rates[index] for index in left), Fraction(0)) / sum(self._rates[index] for index in members)
        owed = sum((self._due[index] for index in left), Fraction(0))
        owed += share * (rows - sum((self._due[index] for index in members), Fraction(0)))
        before = self._sum(left)
        part = max(before, min(_round(owed), before + rows - self._sum(members)))
        self._divide(part, left, counts)
        self._divide(rows - part, right, counts)

    def _halfway(self, members: Sequence[int]) -> int:
        """Where to cut a list, heaviest first, so that its parts weigh about the same."""
        total = sum(self._rates[index] for index in members)
        passed = Fraction(0)
        for cut, index in enumerate(members[:-1], start=1):
            passed += self._rates[index]
            if 2 * passed >= total:
                return cut
        return len(members) - 1

    def _sum(self, members: Sequence[int]) -> int:
        return sum(self._counts[index] for index in members)


def _round(value: Fraction) -> int:
    return math.floor(value + _HALF)
