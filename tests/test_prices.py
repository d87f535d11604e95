"""Dollars from chip-hours, with the date of the table."""

from __future__ import annotations

import datetime
import math

import pytest

from model.flops import CHIPS
from model.preflight.prices import AS_OF, PRICES, cost
from model.slices import SLICES, slice_named


def test_a_day_on_four_slices() -> None:
    bill = cost(slice_named("v4-128"), 4, 24.0)
    assert bill.chip_hours == 64 * 4 * 24
    assert bill.dollars == pytest.approx(64 * 4 * 24 * 3.22)
    assert bill.as_of == AS_OF
    assert str(AS_OF) in str(bill)
    assert "list price" in str(bill)


def test_chips_are_charged_not_tensorcores() -> None:
    assert cost(slice_named("v5p-8"), 1, 1.0).dollars == pytest.approx(16.80)  # what a v5p-8 host is listed at
    assert cost(slice_named("v5e-256"), 1, 1.0).dollars == pytest.approx(307.20)


@pytest.mark.parametrize("generation", CHIPS)
def test_every_generation_has_prices(generation: str) -> None:
    price = {known.generation: PRICES[known.generation] for known in SLICES.values()}[generation]  # type: ignore[index]
    assert 0 < price.spot < price.on_demand < 10
    assert price.region.startswith("us-")


def test_spot_is_another_column() -> None:
    tpu = slice_named("v6e-256")
    assert cost(tpu, 1, 2.0, "spot").dollars == pytest.approx(256 * 2 * PRICES["v6e"].spot)


def test_the_table_has_a_past_date() -> None:
    assert datetime.date(2026, 1, 1) < AS_OF <= datetime.date(2026, 12, 31)


@pytest.mark.parametrize(("slices", "hours", "field"), [(0, 1.0, "num_slices=0"), (1, -1.0, "hours=-1"), (1, math.nan, "hours=nan")])
def test_nonsense_is_refused(slices: int, hours: float, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        cost(slice_named("v4-8"), slices, hours)
