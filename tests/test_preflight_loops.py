"""How often a loop of a compiled program runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.preflight.hlo import HloError, analyse

GOLDEN = Path(__file__).resolve().parent / "golden"
CHAIN = (GOLDEN / "async_chain.hlo").read_text(encoding="utf-8")  # a loop of 6
# A product in a loop that goes to the element of an array, in a loop over its four elements.
DIAGONAL = (GOLDEN / "diagonal.hlo").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("condition", "step", "trips"),
    [
        ("constant(8), direction=LT", 2, 4),
        ("constant(8), direction=LT", 1, 8),
        ("constant(7), direction=LE", 1, 8),
        ("constant(9), direction=LT", 2, 5),
        ("constant(8), direction=NE", 4, 2),
    ],
)
def test_counters_are_followed(condition: str, step: int, trips: int) -> None:
    limit, direction = condition.split(", ")
    text = CHAIN.replace("%n = s32[] constant(6)", f"%n = s32[] {limit}").replace("direction=LT", direction)
    text = text.replace("%one = s32[] constant(1)", f"%one = s32[] constant({step})")
    assert analyse(text).collectives[0].times == trips


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("%next = s32[] add(%k, %one)", "%next = s32[] multiply(%k, %one)"),
        ("%one = s32[] constant(1)", "%one = s32[] constant(-1)"),
        ("%first = s32[] constant(0)", "%first = s32[] get-dimension-size(%y), dimensions={0}"),
    ],
)
def test_a_loop_that_cannot_be_counted_is_refused(old: str, new: str) -> None:
    with pytest.raises(HloError, match=r"a loop whose counter .* in line \d+ of the HLO: %loop"):
        analyse(CHAIN.replace(old, new))


def test_loops_that_end_at_the_diagonal() -> None:
    cost = analyse(DIAGONAL, causal_loops=True)
    assert cost.dot_flops == (1 + 2 + 3 + 4) * 2 * 8 * 8 * 16
    assert [(phase.name, phase.times) for phase in cost.phases] == [("block", 10), ("row", 4), ("main", 1)]
    with pytest.raises(HloError, match="a loop whose counter does not go from a constant to a constant"):
        analyse(DIAGONAL)
    other = DIAGONAL.replace("constant(4)", "constant(3)")  # rounds that are not the array's elements
    with pytest.raises(HloError, match="one of as many integers as the loop around it has rounds"):
        analyse(other, causal_loops=True)


def test_branches_count_as_often_as_they_have_something_to_do() -> None:
    product = "ROOT %d = f32[64,64]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    summed = "ROOT %d = f32[64,64]{1,0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%sum"
    parts = [
        f"%{name} (x: f32[64,64]) -> f32[64,64] {{\n  %x = f32[64,64]{{1,0}} parameter(0)\n  {does}\n}}"
        for name, does in (("often", product), ("rarely", summed))
    ]
    add = "%sum (a: f32[], b: f32[]) -> f32[] {\n  %a = f32[] parameter(0)\n  %b = f32[] parameter(1)\n  ROOT %s = f32[] add(%a, %b)\n}"
    chosen = "ROOT %c = f32[64,64]{1,0} conditional(%i, %x, %x), branch_computations={%often, %rarely}"
    given = "%x = f32[64,64]{1,0} parameter(0)\n  %i = s32[] parameter(1)"
    entry = f"ENTRY %main (x: f32[64,64], i: s32[]) -> f32[64,64] {{\n  {given}\n  {chosen}\n}}"
    text = "\n\n".join(["HloModule m, num_partitions=2", add, *parts, entry])
    always, seldom = analyse(text), analyse(text, branches=0.1)
    assert always.dot_flops == 2 * 64**3
    assert seldom.dot_flops == pytest.approx(always.dot_flops / 10)
    assert seldom.ici_bytes == pytest.approx(always.ici_bytes / 10)
    assert always.ici_bytes == 64 * 64 * 4
