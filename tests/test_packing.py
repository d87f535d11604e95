"""Rows by best fit: whole documents, nothing lost, nothing twice, full rows; windows are in test_order."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from model.packing import BestFitPlan
from model.permutation import hash64


def lengths_of(seed: int, count: int, longest: int) -> np.ndarray:
    """Lengths 1 to `longest`, long ones rarer, as those of texts are."""
    uniform = hash64(seed, np.arange(count)) / 2.0**64
    return np.maximum(1, (longest**uniform * uniform).astype(np.int64))


def pieces(plan: BestFitPlan) -> list[tuple[int, int, int, bool]]:
    """(row, start, length, ends) of every piece."""
    rows = [(row, *plan.row(row)) for row in range(plan.num_rows)]
    return [
        (row, start, length, ends)
        for row, *columns in rows
        for start, length, ends in zip(*(column.tolist() for column in columns), strict=True)
    ]


@pytest.mark.parametrize(
    ("seq_len", "lengths"),
    [
        (2048, lengths_of(1, 3000, 9000)),
        (64, lengths_of(2, 500, 400)),
        (8, lengths_of(3, 200, 40)),
        (1, np.array([1, 2, 3, 1])),
        (10, np.array([10, 11, 12, 21, 22, 5, 5, 3])),
        (10, np.array([1])),
    ],
)
def test_every_token_that_can_teach_is_in_one_row_and_documents_are_whole(seq_len: int, lengths: np.ndarray) -> None:
    plan = BestFitPlan(lengths, seq_len)
    starts = np.cumsum(lengths) - lengths
    held = np.zeros(lengths.sum(), int)
    fill = np.zeros(plan.num_rows, int)
    of_document: dict[int, list[tuple[int, int, bool]]] = {}
    for row, start, length, ends in pieces(plan):
        held[start : start + length] += 1
        fill[row] += length
        document = int(np.searchsorted(starts, start, side="right")) - 1
        of_document.setdefault(document, []).append((start - int(starts[document]), length, ends))
    assert fill.max() <= seq_len
    assert fill.min() >= 1
    # a closing token is no input where it would be alone in its piece: it is still the target of the one before
    alone = (lengths > 1) & (lengths % seq_len == 1 % seq_len)
    missing = np.flatnonzero(held == 0)
    assert missing.tolist() == (starts + lengths - 1)[alone].tolist()
    assert held.max() == 1
    assert plan.num_tokens == held.sum() == fill.sum()
    for document, length in enumerate(lengths.tolist()):
        found = sorted(of_document[document])
        assert [offset for offset, _, _ in found] == list(range(0, max(length - 1, 1), seq_len))
        assert len(found) == 1 or length > seq_len + 1
        assert [ends for _, _, ends in found] == [offset + size == length for offset, size, _ in found]


def test_rows_are_full() -> None:
    for seed, seq_len in ((1, 2048), (2, 1024), (3, 512)):
        plan = BestFitPlan(lengths_of(seed, 20_000, 4 * seq_len), seq_len)
        assert plan.fill >= 0.995
        assert plan.num_rows - plan.num_tokens / seq_len < 0.005 * plan.num_rows


def test_the_tightest_fit_is_taken() -> None:
    # 7 opens a row, 6 another; the 3 goes where it fills the row, the 4 where 4 are left
    plan = BestFitPlan(np.array([3, 6, 7, 4]), 10)
    rows = [sorted(plan.row(row)[1].tolist()) for row in range(plan.num_rows)]
    assert sorted(rows) == [[3, 7], [4, 6]]


def test_lengths_near_the_limit_of_32_bits_do_not_overflow() -> None:
    longest = (1 << 31) - 1
    plan = BestFitPlan(np.array([longest, 5], np.int32), 1 << 20)
    assert plan.num_tokens == longest + 5
    assert plan.num_rows == 2049
    assert sum(int(plan.row(row)[1].sum()) for row in range(plan.num_rows)) == longest + 5
    assert max(int(plan.row(row)[0].max()) for row in range(plan.num_rows)) == longest


def test_a_plan_that_no_memory_holds_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"packing='best_fit' plans \d+ pieces .* takes about 71\d{3} GB, .* use packing='concat'"):
        BestFitPlan(np.array([1 << 40]), 1)
    monkeypatch.setattr("model.packing.os.sysconf", lambda name: {"SC_PHYS_PAGES": 10, "SC_PAGE_SIZE": 65}[name])
    assert BestFitPlan(np.full(10, 3), 8).num_tokens == 30
    with pytest.raises(ValueError, match="plans 11 pieces"):
        BestFitPlan(np.full(11, 3), 8)


def test_a_plan_is_a_function_of_the_lengths_alone() -> None:
    lengths = lengths_of(9, 2000, 3000)
    one, two = BestFitPlan(lengths, 700), BestFitPlan(lengths.astype(np.int32), 700)
    digests = [hashlib.sha256(np.array(pieces(plan), "<i8").tobytes()).hexdigest() for plan in (one, two)]
    assert digests == [PINNED_PLAN, PINNED_PLAN]


PINNED_PLAN = "4d255fe6b2451ecc1565878c675d8ac979a837840317b761398a295dc84aad7e"
