"""Batches: contents against a plain reference, independence of the process count, exact evaluation coverage."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from model.batches import BatchLoader, EvalBatches
from model.mixture_store import MixtureStore
from model.token_store import StoreError, TokenSplit
from tests.synthetic_stores import BOS, EOS, Placed, write_mixture

KEYS = {"tokens": np.int32, "targets": np.int32, "loss_weights": np.float32, "segment_ids": np.int32, "positions": np.int32}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Placed:
    return write_mixture(tmp_path_factory.mktemp("root"), {"plays": 0.9, "sonnets": 0.1})


def loader(mixture: Placed, **changes: int) -> BatchLoader:
    return BatchLoader(mixture, **{"seq_len": 32, "global_batch_size": 8, "seed": 3, **changes})


def expected_row(split: TokenSplit, start: int, seq_len: int) -> dict[str, list[float]]:
    """One token at a time, from the whole stream."""
    stream, starts = split.tokens(0, split.num_tokens).tolist(), set(split.document_starts(0, split.num_tokens).tolist())
    row: dict[str, list[float]] = {key: [] for key in KEYS}
    segment, position = 1, 0
    for place in range(start, start + seq_len):
        if place in starts and place > start:
            segment, position = segment + 1, 0
        row["tokens"].append(stream[place])
        row["targets"].append(stream[place + 1])
        row["loss_weights"].append(0.0 if place + 1 in starts else 1.0)
        row["segment_ids"].append(segment)
        row["positions"].append(position)
        position += 1
    return row


def test_rows_hold_what_a_plain_reading_of_the_stream_gives(mixture: Placed) -> None:
    batches = loader(mixture, global_batch_size=64)
    batch = batches.batch(5)
    component, start = batches.order.locate(np.arange(5 * 64, 6 * 64))
    assert {key: batch[key].dtype for key in batch} == KEYS
    assert all(batch[key].shape == (64, 32) for key in KEYS)
    for row in range(64):
        split = batches.mixture.components[component[row]].split("train")
        assert split is not None
        for key, expected in expected_row(split, int(start[row]), 32).items():
            assert batch[key][row].tolist() == expected, (row, key)
    boundary = batch["targets"] == BOS
    assert boundary.any()
    assert np.array_equal(batch["loss_weights"] == 0, boundary)
    assert (batch["tokens"][boundary] == EOS).all()


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_the_global_batch_does_not_depend_on_the_number_of_processes(mixture: Placed, processes: int) -> None:
    whole = loader(mixture)
    parts = [loader(mixture, process_index=index, process_count=processes) for index in range(processes)]
    for step in (0, 255, 256, 10**9):
        expected = whole.batch(step)
        found = [part.batch(step) for part in parts]
        for key in KEYS:
            np.testing.assert_array_equal(np.concatenate([part[key] for part in found]), expected[key])


def test_any_step_at_once_equals_going_there(mixture: Placed) -> None:
    walked = loader(mixture)
    for step in range(599):
        walked.batch(step)
    batch = walked.batch(599)
    np.testing.assert_array_equal(batch["tokens"], loader(mixture).batch(599)["tokens"])
    assert not np.array_equal(batch["tokens"], loader(mixture, seed=4).batch(599)["tokens"])


def test_accepts_a_path_and_an_opened_mixture(mixture: Placed) -> None:
    expected = loader(mixture).batch(1)["tokens"]
    for given in (mixture.path, Path(mixture.path), MixtureStore.open(mixture)):
        np.testing.assert_array_equal(BatchLoader(given, seq_len=32, global_batch_size=8, seed=3).batch(1)["tokens"], expected)


def test_first_batches_are_pinned(mixture: Placed) -> None:
    batches = loader(mixture)
    digest = hashlib.sha256()
    for step in (0, 1, 1000):
        batch = batches.batch(step)
        for key in KEYS:
            digest.update(np.ascontiguousarray(batch[key]).tobytes())
    assert digest.hexdigest() == PINNED_BATCHES


def test_planned_tokens_and_epochs(mixture: Placed) -> None:
    batches = loader(mixture)
    planned = batches.planned(1000)
    assert sum(part["tokens"] for part in planned.values()) == 1000 * 8 * 32
    assert planned["plays"]["tokens"] == pytest.approx(0.9 * 1000 * 8 * 32, rel=1e-2)
    split = batches.mixture.component("plays").split("train")
    assert split is not None
    assert planned["plays"]["epochs"] == planned["plays"]["tokens"] / split.num_tokens
    with pytest.raises(ValueError, match="num_steps=-1"):
        batches.planned(-1)


@pytest.mark.parametrize(("seq_len", "batch_size", "processes"), [(32, 4, 1), (7, 8, 2), (500, 4, 4), (1, 4, 1)])
def test_evaluation_scores_every_token_after_a_documents_first_exactly_once(
    mixture: Placed, seq_len: int, batch_size: int, processes: int
) -> None:
    opened = MixtureStore.open(mixture)
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
    np.testing.assert_array_equal(np.concatenate(scored), np.delete(stream, starts))
    assert parts[0].scored_tokens == split.num_tokens - split.num_documents == sum(map(len, scored))
    assert (parts[0].name, parts[0].bytes) == ("sonnets", split.source_bytes)
    last = batches[-1]
    assert (last["loss_weights"][last["segment_ids"] == 0] == 0).all()
    with pytest.raises(IndexError, match="which has"):
        parts[0].batch(len(batches))


def test_sizes_that_do_not_fit_are_refused_with_a_remedy(mixture: Placed) -> None:
    with pytest.raises(ValueError, match="global_batch_size=8 does not divide over 3 processes; use a multiple of 3, for example 9"):
        loader(mixture, process_count=3)
    with pytest.raises(ValueError, match="batch_size=6 does not divide over 4"):
        EvalBatches(mixture, "plays", seq_len=8, batch_size=6, process_count=4)
    with pytest.raises(ValueError, match="process_index=2 of process_count=2"):
        loader(mixture, process_index=2, process_count=2)
    with pytest.raises(ValueError, match=r"'plays' has \d+ training tokens, fewer than one window"):
        loader(mixture, seq_len=100_000)
    with pytest.raises(ValueError, match="step=-1"):
        loader(mixture).batch(-1)
    with pytest.raises(ValueError, match="seed=-1"):
        loader(mixture, seed=-1)
    with pytest.raises(StoreError, match="no component 'poems'; it has plays, sonnets"):
        EvalBatches(mixture, "poems", seq_len=8, batch_size=4)


def test_a_weight_of_zero_is_evaluated_but_never_trained_on(tmp_path: Path) -> None:
    mixture = write_mixture(tmp_path, {"plays": 1.0, "wiki": 0.0})
    assert list(loader(mixture).planned(100)) == ["plays"]
    assert MixtureStore.open(mixture).validation_names() == ("plays", "wiki")
    assert len(EvalBatches(mixture, "wiki", seq_len=8, batch_size=4)) > 0


def test_a_store_or_tokenizer_that_is_not_the_mixtures_is_refused(tmp_path: Path) -> None:
    mixture = write_mixture(tmp_path, {"plays": 1.0})
    path = Path(mixture.path) / "mixture.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**value, "tokenizer": {**value["tokenizer"], "sha256": "u" * 64}}), encoding="utf-8")
    with pytest.raises(StoreError, match="'plays' was tokenized with tttttttttttttttt, the mixture's tokenizer is uuuuuuuuuuuuuuuu"):
        loader(mixture)
    value["components"][0]["fingerprint"] = "e" * 64
    path.write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(StoreError, match="the mixture was made of eeeeeeeeeeeeeeee"):
        loader(mixture)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(StoreError, match="is malformed"):
        loader(mixture)
    with pytest.raises(StoreError, match=r"tokenizer\.model is missing"):
        MixtureStore.open(write_mixture(tmp_path / "other", {"plays": 1.0})).tokenizer.check()


PINNED_BATCHES = "ee00178d016859bc5aec9fca1a62f46ae6fcc67e9e9a66568e3a1dbeb5e91b0e"
