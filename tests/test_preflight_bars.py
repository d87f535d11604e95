"""The reference jobs compiled for real slices, held against the bars of the project. Each compilation takes a minute or two.

R1 is 2 billion parameters on v4-128, R7 is 7 billion; `benchmarks/preflight.py` prints the same figures as a table.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from benchmarks.preflight import BARS, Row, measured

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@functools.cache
def row(name: str) -> dict[str, Any]:
    """The figures of one row of the benchmark, compiled once."""
    pytest.importorskip("libtpu")
    return measured(next(one for one in BARS if one.name == name))


@pytest.mark.parametrize("bar", BARS, ids=lambda bar: bar.name)
def test_bars(bar: Row) -> None:
    found = row(bar.name)
    assert found["fits"], found["advice"]
    assert found["bound"] in ("compute", "hbm", "ici", "dcn")
    assert found["logits_arrays"] == 0
    missed = {key: (found[key], limit) for key, limit in bar.at_most.items() if not found[key] <= limit}
    missed |= {key: (found[key], limit) for key, limit in bar.at_least.items() if not found[key] >= limit}
    assert not missed


def test_few_compilations() -> None:
    assert len(row("R1 v4-128")["trials"]) <= 4


def test_too_many_chips_are_said() -> None:
    (first, *_) = row("R1 v6e-256")["advice"]
    assert "dclm-1b on 256 v6e chips is HBM-bound" in first
    assert "use 32 (v6e-32)" in first
