"""The row order: windows once an epoch, independence of components, limits, slices, and a pinned version."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import pytest

from model.order import BLOCK, Component, RowOrder, Rows, Stage
from model.packing import Windows


def order(
    weights: Mapping[str, float], windows: int | Mapping[str, int] = 100, *, seed: int = 0, **changes: Mapping[str, float]
) -> RowOrder:
    sizes = dict.fromkeys(weights, windows) if isinstance(windows, int) else windows
    epochs, kept = changes.get("max_epochs", {}), changes.get("kept", {})
    components = [Component(name, sizes[name], epochs.get(name), int(kept[name]) if name in kept else None) for name in weights]
    return RowOrder(components, [Stage(0, weights)], seed)


def windows_of(rows: Rows, index: int) -> list[int]:
    return rows.window[rows.component == index].tolist()


def test_shares_are_exact_and_no_weight_rounds_to_zero() -> None:
    weights = {"web": 0.7, "code": 0.2999, "tiny": 0.0001}
    rows = 500 * BLOCK
    found = np.bincount(order(weights).rows(0, rows).component, minlength=3)
    for count, weight in zip(found, weights.values(), strict=True):
        assert abs(count - rows * weight) <= 1
    assert order(weights).planned_rows(rows) == dict(zip(weights, found.tolist(), strict=True))
    part = rows - 777
    assert list(order(weights).planned_rows(part).values()) == np.bincount(order(weights).rows(0, part).component, minlength=3).tolist()
    assert list(order(weights).planned_rows(0).values()) == [0, 0, 0]


@pytest.mark.parametrize("windows", [1, 2, 16, 17, 300, 2 * BLOCK])
def test_each_epoch_visits_every_window_once_and_the_next_follows_it(windows: int) -> None:
    rows = order({"much": 0.75, "only": 0.25}, {"much": 10**6, "only": windows}).rows(0, 40 * BLOCK)
    found, cuts = np.array(windows_of(rows, 1)), rows.cut[rows.component == 1]
    epochs = len(found) // windows
    assert epochs >= 2
    for epoch in range(epochs):
        part = slice(epoch * windows, (epoch + 1) * windows)
        assert sorted(found[part].tolist()) == list(range(windows))
        assert len(np.unique(cuts[part])) == 1
    assert len(np.unique(cuts)) >= epochs


def test_no_order_is_repeated_between_epochs_or_seeds() -> None:
    orders = [order({"only": 1.0}, 1000, seed=seed).rows(epoch * 1000, (epoch + 1) * 1000).window for seed in (0, 1) for epoch in range(20)]
    assert len({tuple(found.tolist()) for found in orders}) == 40
    # nor is one like another: as many windows stay in place as by chance
    stay = [(one == other).sum() for number, one in enumerate(orders) for other in orders[:number]]
    assert 0.8 < np.mean(stay) < 1.2
    assert max(stay) < 10


def test_the_order_of_rows_is_uniform_and_uncorrelated() -> None:
    rows = order({"a": 0.5, "b": 0.5}, {"a": 10**6, "b": 999_983}).rows(0, 64 * BLOCK)
    for index, windows in ((0, 10**6), (1, 999_983)):
        found = np.array(windows_of(rows, index)) / windows
        assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 4 / np.sqrt(len(found))
        counts = np.histogram2d(np.arange(len(found)) / len(found), found, bins=20)[0]
        expected = len(found) / 400
        assert abs(((counts - expected) ** 2 / expected).sum() - 399) < 5 * np.sqrt(2 * 399)
    component = rows.component.astype(float)
    assert abs(np.corrcoef(component[:-1], component[1:])[0, 1]) < 4 / np.sqrt(len(component))


def test_another_component_changes_where_rows_are_but_not_which_windows_a_component_gives() -> None:
    few = order({"a": 0.5, "b": 0.5}, {"a": 60_000, "b": 60}).rows(0, 8 * BLOCK)
    many = order({"c": 0.2, "a": 0.4, "b": 0.4}, {"a": 60_000, "b": 60, "c": 31}).rows(0, 8 * BLOCK)
    for index, name in enumerate("ab"):
        found, expected = windows_of(many, index + 1), windows_of(few, index)
        assert found == expected[: len(found)], name
        cuts, own = many.cut[many.component == index + 1], few.cut[few.component == index]
        np.testing.assert_array_equal(cuts, own[: len(cuts)])
    assert windows_of(few, 0)[:100] != windows_of(order({"a": 1.0}, 60_000, seed=1).rows(0, 100), 0)


def test_rows_do_not_depend_on_how_they_are_asked_for() -> None:
    weights = {"a": 0.6, "b": 0.4}
    whole = order(weights).rows(0, 6 * BLOCK)
    for start, stop in ((0, 1), (5, BLOCK), (BLOCK - 3, BLOCK + 3), (100, 5 * BLOCK + 1), (5 * BLOCK, 6 * BLOCK)):
        part = order(weights).rows(start, stop)
        for found, expected in zip(part, whole, strict=True):
            np.testing.assert_array_equal(found, expected[start:stop])


def test_a_component_is_left_out_after_its_epochs() -> None:
    limited = order({"a": 0.5, "b": 0.5}, {"a": 10_000, "b": 1_000}, max_epochs={"b": 2.5})
    rows = limited.rows(0, 4 * BLOCK)
    assert limited.num_rows is None
    found = windows_of(rows, 1)
    assert len(found) == 2_500
    counts = np.bincount(found, minlength=1_000)
    assert np.bincount(counts).tolist() == [0, 0, 500, 500]
    assert not (rows.component[3 * BLOCK :] == 1).any()
    early = order({"a": 0.6, "b": 0.4}, {"a": 20, "b": 850}, max_epochs={"a": 1.0}).rows(0, BLOCK)
    # its share holds to the end: 20 rows at 0.6 are the first 33 1/3
    assert np.flatnonzero(early.component == 0)[-1] < 34
    assert order({"a": 1.0}, 10, max_epochs={"a": 0.7}).num_rows == 7
    assert order({"a": 1.0}, 10, max_epochs={"a": 0.01}).num_rows == 1
    with pytest.raises(IndexError, match="row 7 of a mixture that has 7 rows"):
        order({"a": 1.0}, 10, max_epochs={"a": 0.7}).rows(0, 8)


def test_simulated_epochs_repeat_a_fixed_slice_that_is_cut_once() -> None:
    sliced = order({"a": 1.0}, 10_000, kept={"a": 512}).rows(0, 2 * BLOCK)
    epochs = sliced.window.reshape(8, 512)
    kept = set(epochs[0].tolist())
    assert len(kept) == 512
    assert max(kept) > 9_000
    assert all(set(epoch.tolist()) == kept for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 8
    assert len(np.unique(sliced.cut)) == 1
    assert kept != set(order({"a": 1.0}, 10_000, kept={"a": 512}, seed=1).rows(0, BLOCK).window.tolist())


@pytest.mark.parametrize("tokens", [17, 18, 31, 32, 33, 47, 48, 49, 160, 100_000])
def test_every_window_lies_inside_the_stream_and_is_cut_anew_every_epoch(tokens: int) -> None:
    windows = Windows(tokens, 16)
    rows = order({"only": 1.0}, windows.num_rows).rows(0, 2 * BLOCK)
    start = windows.starts(rows.window, rows.cut)
    assert start.min() >= 0
    assert start.max() + 17 <= tokens
    if windows.num_rows < 200:
        assert len(np.unique(start % 16)) == min(16, tokens - windows.num_rows * 16)


@pytest.mark.parametrize(("tokens", "seq_len"), [(65, 64), (127, 64), (128, 64), (191, 64), (192, 64), (440, 64), (6143, 2048)])
def test_every_token_that_has_one_before_it_is_a_target_in_some_epoch(tokens: int, seq_len: int) -> None:
    windows = Windows(tokens, seq_len)
    seen = np.zeros(tokens, bool)
    cuts = np.arange(2 * seq_len, dtype=np.uint64)
    for window in range(windows.num_rows):
        for start in windows.starts(np.full(len(cuts), window), cuts).tolist():
            assert start + seq_len + 1 <= tokens
            seen[start + 1 : start + seq_len + 1] = True
    assert not seen[0]
    assert seen[1:].all()


def test_a_far_row_needs_its_own_block_only() -> None:
    weights = {f"c{index}": 1.0 + index for index in range(7)}
    far = order(weights, 10**9)
    start = 10**9 * 32
    rows = far.rows(start, start + 32)
    assert list(far._plans) == [start // BLOCK * BLOCK]
    before = far._plans[start // BLOCK * BLOCK][0].before
    assert max(abs(count - start * weight / 28) for count, weight in zip(before, weights.values(), strict=True)) <= 1 + BLOCK
    assert len(rows.window) == 32


def test_order_version_4_is_pinned() -> None:
    rare = {"letters": 0.0007, "songs": 0.0004, "riddles": 0.0003, "proverbs": 0.0001, "epitaphs": 0.00002}
    stages = [Stage(0, {"plays": 0.9, "sonnets": 0.1}), Stage(2500, {"plays": 0.5, "sonnets": 0.499, **rare})]
    components = [Component("plays", 3905), Component("sonnets", 233, 40.0), *(Component(name, 40) for name in rare)]
    rows = RowOrder(components, stages, 17)
    # where stages begin, where sonnets are used up, and far away
    parts = [rows.rows(0, 9000), rows.rows(20_000, 23_000), rows.rows(10**12, 10**12 + 5000)]
    columns = [np.concatenate([part[column] for part in parts]) for column in range(3)]
    assert columns[0][:8].tolist() == PINNED_COMPONENTS
    assert columns[1][:4].tolist() == PINNED_WINDOWS
    digest = hashlib.sha256(np.stack([column.astype("<u8") for column in columns]).tobytes()).hexdigest()
    assert digest == PINNED_DIGEST


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no component with a positive weight"):
        RowOrder([], [Stage(0, {})], 0)
    with pytest.raises(ValueError, match="component 'a' uses 0 of 0 windows"):
        order({"a": 1.0}, 0)
    with pytest.raises(ValueError, match="component 'a' uses 11 of 10 windows"):
        order({"a": 1.0}, 10, kept={"a": 11})


PINNED_COMPONENTS = [0, 1, 0, 0, 0, 0, 1, 0]
PINNED_WINDOWS = [899, 77, 3274, 1077]
PINNED_DIGEST = "5408d6ca4adfbc29259a1a4dd6e5f2d903d1b05c88f60a6a90a1a33b14b40448"
