"""Rows against a plain reading of the stream, one token at a time: cut ones and packed ones, masks, tokenizers without BOS."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from model.batches import BatchLoader
from model.packing import Windows
from model.token_store import TokenSplit
from tests.synthetic_stores import BOS, EOS, write_mixture

KEYS = {"tokens": np.int32, "targets": np.int32, "loss_weights": np.float32, "segment_ids": np.int32, "positions": np.int32}


def train_split(batches: BatchLoader, name: str) -> TokenSplit:
    split = batches.mixture.component(name).split("train")
    assert split is not None
    return split


def expected_row(split: TokenSplit, start: int, seq_len: int) -> dict[str, list[float]]:
    """One token at a time, from the whole stream."""
    stream, starts = split.tokens(0, split.num_tokens).tolist(), set(split.document_starts(0, split.num_tokens).tolist())
    mask = split.loss_mask(0, split.num_tokens).tolist()
    row: dict[str, list[float]] = {key: [] for key in KEYS}
    segment, position = 1, 0
    for place in range(start, start + seq_len):
        if place in starts and place > start:
            segment, position = segment + 1, 0
        row["tokens"].append(stream[place])
        row["targets"].append(stream[place + 1])
        row["loss_weights"].append(0.0 if place + 1 in starts else float(mask[place + 1]))
        row["segment_ids"].append(segment)
        row["positions"].append(position)
        position += 1
    return row


@pytest.mark.parametrize(("masked", "bos_id"), [((), BOS), (("plays",), BOS), ((), None), (("plays", "sonnets"), None)])
def test_rows_hold_what_a_plain_reading_of_the_stream_gives(tmp_path: Path, masked: tuple[str, ...], bos_id: int | None) -> None:
    batches = BatchLoader(
        write_mixture(tmp_path, {"plays": 0.6, "sonnets": 0.4}, masked=masked, bos_id=bos_id), seq_len=32, global_batch_size=64, seed=3
    )
    batch = batches.batch(5)
    rows = batches.order.rows(5 * 64, 6 * 64)
    assert {key: batch[key].dtype for key in batch} == KEYS
    assert all(batch[key].shape == (64, 32) for key in KEYS)
    for row in range(64):
        index = int(rows.component[row])
        layout = batches.layouts[index]
        assert isinstance(layout, Windows)
        start = int(layout.starts(rows.window[row : row + 1], rows.cut[row : row + 1])[0])
        for key, expected in expected_row(train_split(batches, batches.order.names[index]), start, 32).items():
            assert batch[key][row].tolist() == expected, (row, key)
    if bos_id is not None:
        boundary = batch["targets"] == BOS
        assert boundary.any()
        assert (batch["loss_weights"][boundary] == 0).all()
        assert (batch["tokens"][boundary] == EOS).all()
        assert masked or np.array_equal(batch["loss_weights"] == 0, boundary)


@pytest.mark.parametrize(("masked", "bos_id"), [((), BOS), (("plays", "sonnets"), None)])
@pytest.mark.parametrize("seq_len", [20, 64])
def test_packed_rows_hold_whole_documents_with_their_own_targets(
    tmp_path: Path, masked: tuple[str, ...], bos_id: int | None, seq_len: int
) -> None:
    made = write_mixture(tmp_path, {"plays": 0.5, "sonnets": 0.5}, packing="best_fit", masked=masked, bos_id=bos_id)
    batches = BatchLoader(made, seq_len=seq_len, global_batch_size=8, seed=3)
    known: dict[tuple[int, ...], tuple[list[int], list[float]]] = {}
    for name in ("plays", "sonnets"):
        split = train_split(batches, name)
        ends = [*split.document_starts(0, split.num_tokens).tolist()[1:], split.num_tokens]
        for index, end in enumerate(ends):
            document = split.document(index).tolist()
            mask = split.loss_mask(end - len(document), end).tolist()
            for start in range(0, max(len(document) - 1, 1), seq_len):
                following = slice(start + 1, start + seq_len + 1)
                known[tuple(document[start : start + seq_len])] = document[following], [float(one) for one in mask[following]]
    seen: Counter[tuple[int, ...]] = Counter()
    steps = 40
    for step in range(steps):
        batch = batches.batch(step)
        assert {key: batch[key].dtype for key in batch} == KEYS
        for row in range(8):
            segments = batch["segment_ids"][row]
            assert (np.diff(segments[segments > 0]) >= 0).all()
            padding = segments == 0
            assert not batch["tokens"][row][padding].any()
            assert not batch["loss_weights"][row][padding].any()
            for segment in range(1, segments.max() + 1):
                here = segments == segment
                assert batch["positions"][row][here].tolist() == list(range(here.sum()))
                piece = tuple(batch["tokens"][row][here].tolist())
                targets, mask = known[piece]
                assert batch["targets"][row][here][: len(targets)].tolist() == targets
                assert batch["loss_weights"][row][here].tolist() == [*mask, *[0.0] * (here.sum() - len(mask))]
                seen[piece] += 1
    assert set(seen) == set(known)
