"""Counts of rows at block borders: exact shares, whatever the weights, stages and limits; counts that only rise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest

from model.permutation import hash64
from model.schedule import BLOCK, Block, Schedule
from model.shares import Shares, Stage


def made(*stages: dict[str, float], rows: tuple[int, ...] = (), limits: dict[str, int] | None = None) -> Schedule:
    names = list(dict.fromkeys(name for stage in stages for name in stage))
    begins = (0, *rows)
    return Schedule(
        names,
        [Stage(row, shares) for row, shares in zip(begins, stages, strict=True)],
        [(limits or {}).get(name) for name in names],
    )


def blocks(schedule: Schedule, start: int, count: int) -> Iterator[Block]:
    row = start
    for _ in range(count):
        if schedule.num_rows is not None and row >= schedule.num_rows:
            return
        block = schedule.block(row)
        yield block
        row = block.stop


def largest_error(schedule: Schedule, start: int, count: int, limits: list[int | None] | None = None) -> float:
    """Of counts from what is due, at multiples of 2048; checks on the way that counts add up, only rise and keep to limits."""
    worst, before = 0.0, None
    for block in blocks(schedule, start, count):
        assert before is None or block.before == before
        before = block.after
        assert sum(block.before) == block.start
        assert sum(block.after) == block.stop
        assert 0 < block.stop - block.start <= BLOCK
        assert all(low <= high for low, high in zip(block.before, block.after, strict=True))
        assert all(limit is None or high <= limit for limit, high in zip(limits or [], block.after, strict=False))
        if block.stop % BLOCK == 0:
            worst = max(worst, *(abs(float(n - due)) for n, due in zip(block.after, schedule.due(block.stop), strict=True)))
    return worst


MIXTURES = {
    "one": {"a": 1.0},
    "plain": {"a": 0.7, "b": 0.2999, "c": 0.0001},
    "rarest first": {"c": 1e-6, "b": 0.3, "a": 0.7},
    "rarest between": {"a": 0.5, "c": 1e-6, "b": 0.499999},
    "four rare": {"a": 0.9, "r": 1e-6, "s": 3e-6, "b": 0.1, "t": 1e-5, "u": 4.4e-4},
    "decades": {"a": 1.0, "b": 1e-1, "c": 1e-2, "d": 1e-3, "e": 1e-4, "f": 1e-5, "g": 1e-6},
    "many": {f"c{index}": 1.0 + index for index in range(22)},
    "equal": {f"c{index}": 1.0 for index in range(9)},
}


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("start", [0, 10**6 * BLOCK, 10**12 // BLOCK * BLOCK])
def test_counts_are_within_one_row_of_exact_at_every_border(name: str, start: int) -> None:
    assert largest_error(made(MIXTURES[name]), start, 250) <= 1


def test_counts_of_random_mixtures_are_within_one_row_of_exact() -> None:
    for case in range(40):
        uniform = hash64(5, case, np.arange(6)) / 2.0**64
        weights = {f"c{index}": float(10 ** (-6 * part)) for index, part in enumerate(uniform[: 2 + case % 5])}
        schedule = made(weights)
        assert largest_error(schedule, 0, 40) <= 1
        assert largest_error(schedule, (case + 1) * 10**7 * BLOCK, 40) <= 1


def test_many_rare_components_stay_within_one_row_of_exact() -> None:
    for case in range(30):
        uniform = hash64(11, case, np.arange(6 + case)) / 2.0**64
        rare = {f"r{index}": float(10 ** (-3 - 1.2 * part)) for index, part in enumerate(uniform)}
        assert largest_error(made({"b": 1.0, "c": 0.4, **rare}), 0, 200) <= 1


def worst_case(*counts_and_rates: tuple[int, float]) -> dict[str, float]:
    rates = [rate for count, rate in counts_and_rates for _ in range(count)]
    return {"b": 1.0, **{f"r{index:02}": rate for index, rate in enumerate(rates)}}


@pytest.mark.parametrize(
    ("mixture", "start", "bound"),
    [
        (worst_case((4, 9e-4), (1, 8.5e-4), (1, 4.44e-4), (1, 4.7e-5), (1, 2.76e-5), (1, 6e-6)), 55_896_569, 1.05),
        (worst_case((5, 8.5e-4), (1, 9e-4), (1, 1.67e-4), (1, 9.8e-5), (1, 7e-5), (1, 3.06e-5)), 5_163_427, 1.05),
        (worst_case(*((1, 9e-4 * 0.5676**power) for power in range(9))), 59_016_543, 1.05),
        (worst_case(*((1, 10 ** (-3 - 0.06 * step)) for step in range(20))), 0, 1.05),
        (worst_case(*((1, 10 ** (-3.05 - 0.02 * step)) for step in range(100))), 0, 1.2),
    ],
)
def test_the_hardest_mixtures_pass_one_row_by_little(mixture: dict[str, float], start: int, bound: float) -> None:
    assert largest_error(made(mixture), start * BLOCK, 600) < bound


def test_hundreds_of_components_that_run_out_one_after_the_other() -> None:
    draws = hash64(12, np.arange(300)) / 2.0**64
    weights = {f"c{index:03}": float(10 ** (-5 * draw)) for index, draw in enumerate(draws)}
    limits = {name: int(1000 + 10**6 * draw) for name, draw in zip(weights, hash64(13, np.arange(300)) / 2.0**64, strict=True)}
    del limits["c000"]
    schedule = made(weights, limits=limits)
    # one denominator for all, which must not grow with every component that runs out
    assert max(stretch.denominator.bit_length() for stretch in schedule._shares.stretches) < 400
    assert largest_error(schedule, 0, 300, [limits.get(name) for name in weights]) < 1.5
    after = schedule.block(10**14).after
    assert all(count == limits[name] for name, count in zip(weights, after, strict=True) if name in limits)


def test_a_share_of_a_millionth_gets_its_rows_and_no_more() -> None:
    schedule = made({"a": 0.999999, "b": 1e-6})
    for rows, expected in ((2 * 10**6, 2), (10**9, 1000), (10**12, 10**6)):
        block = schedule.block(rows // BLOCK * BLOCK)
        assert abs(block.before[1] - expected * block.start / rows) <= 0.5


def test_rates_change_where_a_stage_begins_and_stay_exact_across_it() -> None:
    stages = {"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 0.1, "b": 0.9}, {"a": 0.25, "c": 0.25, "d": 0.5}
    for rows in ((5000, 123_457), (2048, 4096), (3, 8), (100 * BLOCK, 100 * BLOCK + 1)):
        schedule = made(*stages, rows=rows)
        assert largest_error(schedule, 0, 400) <= 1
        found = {block.start: block for block in blocks(schedule, 0, 400)}
        assert set(rows) <= set(found)
        after = {row: found[row].before for row in rows}
        assert after[rows[0]][3] == 0
        assert after[rows[1]][2] == after[rows[0]][2]  # c rests in the second stage
        assert sum(after[rows[1]]) == rows[1]


def test_many_stages_with_components_that_come_and_go() -> None:
    for case in range(30):
        names = [f"c{index}" for index in range(2 + case % 9)]
        stages, rows = [], []
        for stage in range(3):
            draw = hash64(6, case, stage, np.arange(len(names))) / 2.0**64
            present = hash64(7, case, stage, np.arange(len(names))) % np.uint64(4) > 0
            present[stage % len(names)] = True
            stages.append({name: float(0.01 + part) if here else 0.0 for name, part, here in zip(names, draw, present, strict=True)})
            rows.append((rows[-1] if rows else 0) + 1 + int(hash64(8, case, stage) % np.uint64(60_000)))
        assert largest_error(made(*stages, rows=tuple(rows[:2])), 0, 150) <= 1


def test_a_component_that_is_used_up_leaves_its_share_to_the_others() -> None:
    schedule = made({"a": 5, "b": 3, "c": 2}, limits={"b": 3_000, "c": 10_001})
    assert schedule.num_rows is None
    assert largest_error(schedule, 0, 100, [None, 3_000, 10_001]) <= 1
    # b ends at row 10,000, when c has had 2,000; from then c has 2 rows of 7
    assert schedule.due(10_000) == (5_000, 3_000, 2_000)
    assert schedule.due(10_700) == (5_500, 3_000, 2_200)
    assert schedule.block(100 * BLOCK).before[1:] == (3_000, 10_001)


def test_until_a_component_is_used_up_its_share_holds_and_afterwards_the_others() -> None:
    schedule = made({"a": 0.6, "b": 0.4}, limits={"a": 20})
    # 20 rows at 0.6 are used up at row 33 1/3
    assert schedule.block(0) == Block(0, 34, (0, 0), (20, 14))
    assert schedule.block(34) == Block(34, BLOCK, (20, 14), (20, BLOCK - 20))
    # in turn, in one block: a at row 100, b after 140 more of which half are its own, and c has the rest
    schedule = made({"a": 5, "b": 3, "c": 2}, limits={"a": 50, "b": 114})
    assert [(block.start, block.stop) for block in blocks(schedule, 0, 4)] == [(0, 100), (100, 240), (240, BLOCK), (BLOCK, 2 * BLOCK)]
    assert schedule.block(0).after == (50, 30, 20)
    assert schedule.block(100).after == (50, 114, 76)


def test_a_component_that_is_used_up_at_a_border_makes_no_long_block() -> None:
    schedule = made({"a": 0.5, "b": 0.5}, limits={"a": 50 * BLOCK})
    assert largest_error(schedule, 0, 120, [50 * BLOCK, None]) == 0
    assert schedule.block(100 * BLOCK).before == (50 * BLOCK, 50 * BLOCK)


def test_counts_stay_near_what_is_due_where_components_are_used_up() -> None:
    for case in range(60):
        draws = hash64(21, case, np.arange(2 + case % 12)) / 2.0**64
        weights = {f"c{index:02}": float(10 ** (-4 * draw)) for index, draw in enumerate(draws)}
        limits = [int(1 + 10 ** (4 * draw)) for draw in hash64(22, case, np.arange(len(weights))) / 2.0**64]
        schedule = made(weights, weights, rows=(777,), limits=dict(zip(weights, limits, strict=True)))
        assert schedule.num_rows == sum(limits)
        assert largest_error(schedule, 0, 10**6, [*limits]) <= 1
        found = {block.stop: block.after for block in blocks(schedule, 0, 10**6)}
        for row in map(math.ceil, schedule._shares.used_up):
            assert max(abs(float(count - due)) for count, due in zip(found[row], schedule.due(row), strict=True)) < 1


def test_a_mixture_ends_when_every_component_is_used_up() -> None:
    schedule = made({"a": 0.5, "b": 0.5}, limits={"a": 1_000, "b": 7})
    assert schedule.num_rows == 1_007
    last = schedule.block(1_006)
    assert (last.stop, last.after) == (1_007, (1_000, 7))
    with pytest.raises(IndexError, match="row 1007 of a mixture that has 1007 rows"):
        schedule.block(1_007)
    # a later stage revives nothing, and cannot be reached
    staged = made({"a": 1.0}, {"b": 1.0}, rows=(5_000,), limits={"a": 1_000})
    assert staged.num_rows == 1_000
    assert made({"a": 1.0}, {"b": 1.0}, rows=(1_000,), limits={"a": 1_000}).num_rows is None


def test_limits_and_stages_together_use_everything_up_exactly() -> None:
    limits = {"a": 10_000, "b": 333, "c": 50_001}
    schedule = made({"a": 0.6, "b": 0.4}, {"a": 0.2, "b": 1e-6, "c": 0.8}, rows=(700,), limits=limits)
    assert schedule.num_rows == sum(limits.values())
    assert largest_error(schedule, 0, 200, list(limits.values())) <= 1
    assert schedule.block(sum(limits.values()) - 1).after == tuple(limits.values())


def test_a_component_that_joins_late_as_a_rare_one() -> None:
    schedule = made({"a": 1.0}, {"a": 1.0 - 1e-6, "b": 1e-6}, rows=(10**6,))
    assert largest_error(schedule, 0, 500) <= 1
    assert schedule.block(10**8).before[1] in (98, 99, 100)


def test_due_is_exact() -> None:
    shares = Shares(["a", "b"], [Stage(0, {"a": 1, "b": 2}), Stage(10, {"a": 1})], [None, None])
    assert shares.at(5) == (Fraction(5, 3), Fraction(10, 3))
    assert shares.at(11) == (Fraction(10, 3) + 1, Fraction(20, 3))


def test_stages_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"begin at the rows \[5\]: they must begin at 0 and rise"):
        Schedule(["a"], [Stage(5, {"a": 1})], [None])
    with pytest.raises(ValueError, match=r"begin at the rows \[0, 5, 5\]"):
        Schedule(["a"], [Stage(row, {"a": 1}) for row in (0, 5, 5)], [None])
    with pytest.raises(ValueError, match="the stage at row 0 has a share of 'b', which is no component; those are a"):
        Schedule(["a"], [Stage(0, {"b": 1})], [None])
    with pytest.raises(ValueError, match="gives 'a' the share -1"):
        Schedule(["a"], [Stage(0, {"a": -1})], [None])
    with pytest.raises(ValueError, match="no component with a positive share"):
        Schedule(["a"], [Stage(0, {"a": 0})], [None])
