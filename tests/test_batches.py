"""Batches: independence of the process count, any step at once, exact evaluation coverage, plans. Contents: test_assembly."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.batches import BatchLoader, EvalBatches
from model.mixture_store import MixtureStore
from model.order import ORDER_VERSION
from model.packing import BestFitPlan
from model.token_store import StoreError
from tests.synthetic_stores import Placed, write_mixture

KEYS = {"tokens": np.int32, "targets": np.int32, "loss_weights": np.float32, "segment_ids": np.int32, "positions": np.int32}
PACKINGS = ("concat", "best_fit")


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Placed]:
    weights = {"plays": 0.9, "sonnets": 0.1}
    return {packing: write_mixture(tmp_path_factory.mktemp(packing), weights, packing=packing) for packing in PACKINGS}


@pytest.fixture(scope="module")
def mixture(mixtures: dict[str, Placed]) -> Placed:
    return mixtures["concat"]


def loader(mixture: Any, **changes: int) -> BatchLoader:
    return BatchLoader(mixture, **{"seq_len": 32, "global_batch_size": 8, "seed": 3, **changes})


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_the_global_batch_does_not_depend_on_the_number_of_processes(mixtures: dict[str, Placed], packing: str, processes: int) -> None:
    whole = loader(mixtures[packing])
    parts = [loader(mixtures[packing], process_index=index, process_count=processes) for index in range(processes)]
    for step in (0, 255, 256, 10**9):
        expected = whole.batch(step)
        found = [part.batch(step) for part in parts]
        for key in KEYS:
            np.testing.assert_array_equal(np.concatenate([part[key] for part in found]), expected[key])


@pytest.mark.parametrize("packing", PACKINGS)
def test_any_step_at_once_equals_going_there(mixtures: dict[str, Placed], packing: str) -> None:
    walked = loader(mixtures[packing])
    for step in range(599):
        walked.batch(step)
    batch = walked.batch(599)
    for key, expected in loader(mixtures[packing]).batch(599).items():
        np.testing.assert_array_equal(batch[key], expected)
    assert not np.array_equal(batch["tokens"], loader(mixtures[packing], seed=4).batch(599)["tokens"])


def test_a_batch_of_more_than_a_block_of_rows(mixture: Placed) -> None:
    large = loader(mixture, global_batch_size=5000).batch(1)
    assert large["tokens"].shape == (5000, 32)
    small = loader(mixture, global_batch_size=40).batch(130)
    np.testing.assert_array_equal(large["tokens"][200:240], small["tokens"])


def test_accepts_a_path_and_an_opened_mixture(mixture: Placed) -> None:
    expected = loader(mixture).batch(1)["tokens"]
    for given in (mixture.path, Path(mixture.path), MixtureStore.open(mixture)):
        np.testing.assert_array_equal(loader(given).batch(1)["tokens"], expected)


@pytest.mark.parametrize("packing", PACKINGS)
def test_first_batches_are_pinned(mixtures: dict[str, Placed], packing: str) -> None:
    batches = loader(mixtures[packing])
    digest = hashlib.sha256()
    for step in (0, 1, 1000):
        batch = batches.batch(step)
        for key in KEYS:
            digest.update(np.ascontiguousarray(batch[key]).tobytes())
    assert digest.hexdigest() == PINNED_BATCHES[packing]


def test_an_epoch_of_packed_rows_reads_every_document_once(mixtures: dict[str, Placed]) -> None:
    batches = loader(mixtures["best_fit"])
    plan = batches.layouts[0]
    assert isinstance(plan, BestFitPlan)
    rows = batches.order.rows(0, 4 * plan.num_rows)
    mine = rows.window[rows.component == 0]
    orders = {tuple(mine[epoch * plan.num_rows : (epoch + 1) * plan.num_rows].tolist()) for epoch in range(3)}
    assert len(orders) == 3
    assert all(sorted(order) == list(range(plan.num_rows)) for order in orders)


def test_planned_rows_tokens_and_epochs(mixtures: dict[str, Placed]) -> None:
    batches = loader(mixtures["concat"])
    planned = batches.planned(1000)
    assert sum(part["tokens"] for part in planned.values()) == 1000 * 8 * 32
    assert abs(planned["plays"]["rows"] - 0.9 * 8000) <= 1 + 2048
    layout = batches.layouts[0]
    assert planned["plays"]["epochs"] == planned["plays"]["rows"] / layout.num_rows
    split = batches.mixture.component("plays").split("train")
    assert split is not None
    assert layout.num_rows * 32 > split.num_tokens - 2 * 32
    with pytest.raises(ValueError, match="num_steps=-1"):
        batches.planned(-1)
    # of packed rows the tokens without padding, counted in the batches themselves
    packed = loader(mixtures["best_fit"])
    found = sum(int((packed.batch(step)["segment_ids"] > 0).sum()) for step in range(200))
    assert sum(part["tokens"] for part in packed.planned(200).values()) == pytest.approx(found, rel=0.01)


def test_rates_change_with_the_step(tmp_path: Path) -> None:
    batches = loader(write_mixture(tmp_path, {"plays": 1.0, "sonnets": 0.0}, later={10: {"sonnets": 1.0}}))
    assert list(batches.planned(10)) == ["plays", "sonnets"]
    assert batches.planned(10)["sonnets"]["rows"] == 0
    assert batches.planned(30)["plays"]["rows"] == 80
    assert batches.planned(30)["sonnets"]["rows"] == 160
    assert (batches.order.rows(0, 80).component == 0).all()
    assert (batches.order.rows(80, 240).component == 1).all()


def test_epochs_at_most_and_the_end_they_bring(tmp_path: Path) -> None:
    made = write_mixture(tmp_path, {"plays": 0.5, "sonnets": 0.5}, max_epochs={"plays": 1.5, "sonnets": 2.0})
    batches = loader(made)
    rows = {name: layout.num_rows for name, layout in zip(("plays", "sonnets"), batches.layouts, strict=True)}
    total = rows["plays"] * 3 // 2 + rows["sonnets"] * 2
    num_steps = total // 8
    assert batches.num_steps == num_steps
    planned = batches.planned(num_steps)
    assert planned["sonnets"]["epochs"] <= 2
    assert planned["plays"]["epochs"] <= 1.5
    assert sum(part["rows"] for part in planned.values()) == total // 8 * 8
    assert batches.batch(num_steps - 1)["tokens"].shape == (8, 32)
    message = f"{num_steps + 1} steps of 8 rows were asked for, but the mixture 'mix' ends after {num_steps}: every"
    with pytest.raises(ValueError, match=message):
        batches.batch(num_steps)
    with pytest.raises(ValueError, match=r"Set train\.num_train_steps to \d+ or less, raise mixture\.max_epochs"):
        batches.planned(num_steps + 1)
    assert loader(write_mixture(tmp_path / "b", {"plays": 0.5, "sonnets": 0.5}, max_epochs={"plays": 0.5})).num_steps is None


@pytest.mark.parametrize("packing", PACKINGS)
def test_simulated_epochs_read_the_same_share_of_each_component_again_and_again(tmp_path: Path, packing: str) -> None:
    simulated = {"experiment_tokens": 1000, "target_tokens": 5000}
    batches = loader(write_mixture(tmp_path, {"plays": 0.5, "sonnets": 0.5}, packing=packing, simulated_epoching=simulated))
    rows = [round(layout.num_rows / 5) for layout in batches.layouts]
    found = {row.tobytes() for step in range(100) for row in batches.batch(step)["tokens"]}
    assert len(found) == sum(rows)
    planned = batches.planned(100)
    assert planned["plays"]["epochs"] == planned["plays"]["rows"] / rows[0] > 5


def test_a_tail_is_evaluated_and_never_trained_on(tmp_path: Path) -> None:
    made = write_mixture(tmp_path, {"plays": 1.0}, tails={"plays": 300})
    split = MixtureStore.open(made).component("plays").split("validation")
    assert split is not None
    tail = split.tokens(split.num_tokens - 300, split.num_tokens)
    batches = loader(made, seq_len=10)
    trained = {tuple(row[at : at + 8].tolist()) for step in range(100) for row in batches.batch(step)["tokens"] for at in range(3)}
    assert not any(tuple(tail[at : at + 8].tolist()) in trained for at in range(292))
    evaluated = np.concatenate(
        [batch["targets"][batch["loss_weights"] > 0] for batch in EvalBatches(made, "plays", seq_len=10, batch_size=4)]
    )
    starts = split.document_starts(0, split.num_tokens)
    np.testing.assert_array_equal(evaluated, np.delete(split.tokens(0, split.num_tokens), starts))


@pytest.mark.parametrize(("seq_len", "batch_size", "processes"), [(32, 4, 1), (7, 8, 2), (500, 4, 4), (1, 4, 1)])
@pytest.mark.parametrize("masked", [(), ("sonnets",)])
def test_evaluation_scores_every_token_after_a_documents_first_exactly_once(
    tmp_path: Path, seq_len: int, batch_size: int, processes: int, masked: tuple[str, ...]
) -> None:
    # packing is a matter of training alone
    opened = MixtureStore.open(write_mixture(tmp_path, {"plays": 0.9, "sonnets": 0.1}, packing="best_fit", masked=masked))
    split = opened.component("sonnets").split("validation")
    assert split is not None
    parts = [
        EvalBatches(opened, "sonnets", seq_len=seq_len, batch_size=batch_size, process_index=index, process_count=processes)
        for index in range(processes)
    ]
    batches = [{key: np.concatenate([part[key] for part in step]) for key in KEYS} for step in zip(*parts, strict=True)]
    assert len(batches) == len(parts[0])
    assert all(batch["tokens"].shape == (batch_size, seq_len) for batch in batches)
    scored = [batch["targets"][batch["loss_weights"] > 0] for batch in batches]
    stream, starts = split.tokens(0, split.num_tokens), split.document_starts(0, split.num_tokens)
    mask = split.loss_mask(0, split.num_tokens).astype(bool)
    mask[starts] = False
    np.testing.assert_array_equal(np.concatenate(scored), stream[mask])
    assert parts[0].scored_tokens == mask.sum() == sum(map(len, scored))
    assert parts[0].name == "sonnets"
    if not masked:
        assert parts[0].bytes == split.source_bytes
    last = batches[-1]
    assert (last["loss_weights"][last["segment_ids"] == 0] == 0).all()
    assert (last["tokens"][last["segment_ids"] == 0] == 0).all()
    with pytest.raises(IndexError, match="which has"):
        parts[0].batch(len(batches))


def test_sizes_that_do_not_fit_are_refused_with_a_remedy(mixture: Placed) -> None:
    with pytest.raises(ValueError, match="global_batch_size=8 does not divide over 3 processes; use a multiple of 3, for example 9"):
        loader(mixture, process_count=3)
    with pytest.raises(ValueError, match="batch_size=6 does not divide over 4"):
        EvalBatches(mixture, "plays", seq_len=8, batch_size=6, process_count=4)
    with pytest.raises(ValueError, match="process_index=2 of process_count=2"):
        loader(mixture, process_index=2, process_count=2)
    with pytest.raises(
        ValueError, match=r"'plays' has \d+ training tokens, fewer than one window of seq_len \+ 1 = 100001; lower seq_len to \d+"
    ):
        loader(mixture, seq_len=100_000)
    with pytest.raises(ValueError, match="step=-1"):
        loader(mixture).batch(-1)
    for seed in (-1, 1 << 63):
        with pytest.raises(ValueError, match=f"seed={seed}"):
            loader(mixture, seed=seed)
    with pytest.raises(StoreError, match="no component 'poems'; it has plays, sonnets"):
        EvalBatches(mixture, "poems", seq_len=8, batch_size=4)


def test_a_weight_of_zero_is_evaluated_but_never_trained_on(tmp_path: Path) -> None:
    mixture = write_mixture(tmp_path, {"plays": 1.0, "wiki": 0.0})
    assert list(loader(mixture).planned(100)) == ["plays"]
    assert MixtureStore.open(mixture).validation_names() == ("plays", "wiki")
    assert len(EvalBatches(mixture, "wiki", seq_len=8, batch_size=4)) > 0


def test_the_state_of_a_checkpoint_is_small_and_refuses_other_data(mixture: Placed) -> None:
    batches = loader(mixture)
    state = batches.state(123_456_789)
    expected = {
        "order_version": ORDER_VERSION,
        "mixture": "f" * 64,
        "tokenizer": "t" * 64,
        "seed": 3,
        "seq_len": 32,
        "global_batch_size": 8,
    }
    assert state == {**expected, "next_step": 123_456_789}
    assert len(json.dumps(state)) < 1024
    batches.check_state(json.loads(json.dumps(state)), 123_456_789)
    with pytest.raises(ValueError, match="trained on data with seed=3, here it is 4"):
        loader(mixture, seed=4).check_state(state, 123_456_789)
    with pytest.raises(ValueError, match="trained on data with seq_len=32, here it is 16"):
        loader(mixture, seq_len=16).check_state(state, 123_456_789)
    with pytest.raises(ValueError, match="trained on data with global_batch_size=8, here it is 16"):
        loader(mixture, global_batch_size=16).check_state(state, 123_456_789)
    for name, value in {"order_version": 2, "mixture": "e" * 64, "next_step": 7}.items():
        with pytest.raises(ValueError, match=f"trained on data with {name}={value!r}, here it is .*move the checkpoint away"):
            batches.check_state({**state, name: value}, 123_456_789)
    with pytest.raises(ValueError, match="order_version=None"):
        batches.check_state({}, 5)


PINNED_BATCHES = {
    "concat": "563793de8f259ceeb5fbeb5e2aa6b6190c75e1c16d4af73ea2b2c7c83c28863a",
    "best_fit": "0a6777f4b01d09f720761d78d0266a2e6c7ee5bdcaf2276ce357073f22a8a835",
}
