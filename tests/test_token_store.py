"""Token stores: exact round trip, slicing across shards, tails, masks, damage named, killed writers harmless."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from model.token_store import StoreError, TokenSplit, TokenStore, with_tail
from model.token_writer import TokenStoreWriter, shard_directory, token_dtype
from tests.synthetic_stores import BOS, EOS, random_shards, store_writer, write_manifest, write_store


def flat(shards: list[list[list[int]]]) -> list[int]:
    return [token for shard in shards for document in shard for token in (BOS, *document, EOS)]


@pytest.fixture
def shards() -> list[list[list[int]]]:
    first, second, third = random_shards(7, 3, 12)
    return [[], first, [], second, third, []]


def assert_reads(split: TokenSplit, expected: np.ndarray, starts: np.ndarray) -> None:
    for start in range(0, len(expected), 17):
        for stop in (start, start + 1, min(start + 400, len(expected)), len(expected)):
            np.testing.assert_array_equal(split.tokens(start, stop), expected[start:stop])
            np.testing.assert_array_equal(split.document_starts(start, stop), starts[(starts >= start) & (starts < stop)])


def test_round_trip_and_every_slice_across_shards(tmp_path: Path, shards: list[list[list[int]]]) -> None:
    split = TokenStore.open(write_store(tmp_path / "s", "s", {"train": shards})).splits["train"]
    expected = np.array(flat(shards))
    assert split.num_tokens == len(expected)
    assert split.num_documents == 36
    assert split.source_bytes == 3 * (len(expected) - 72)
    assert_reads(split, expected, np.flatnonzero(expected == BOS))
    documents = [split.document(index).tolist() for index in range(36)]
    assert documents == [[BOS, *document, EOS] for shard in shards for document in shard]
    assert split.document_lengths().tolist() == [len(document) for document in documents]
    np.testing.assert_array_equal(split.counts(512), np.bincount(expected, minlength=512))
    with pytest.raises(IndexError, match="which has"):
        split.tokens(0, len(expected) + 1)
    with pytest.raises(IndexError, match="document 36"):
        split.document(36)


@pytest.mark.parametrize("tail_tokens", [1, 30, 31, 200, 400, 800])
def test_a_tail_is_the_fewest_last_documents_that_hold_it(tmp_path: Path, shards: list[list[list[int]]], tail_tokens: int) -> None:
    store = TokenStore.open(write_store(tmp_path / "s", "s", {"train": shards, "validation": [[[9, 9]]]}, loss_mask=True))
    whole = store.splits["train"]
    splits = with_tail(store.splits, tail_tokens, "s")
    train, validation = splits["train"], splits["validation"]
    tail = validation.num_documents - 1
    lengths = whole.document_lengths()
    assert lengths[-tail:].sum() >= tail_tokens > lengths[len(lengths) - tail + 1 :].sum()
    assert train.num_documents + tail == whole.num_documents
    held_out = store.splits["validation"].num_tokens
    border = train.num_tokens
    np.testing.assert_array_equal(train.tokens(0, border), whole.tokens(0, border))
    stream = np.concatenate([store.splits["validation"].tokens(0, held_out), whole.tokens(border, whole.num_tokens)])
    assert_reads(validation, stream, np.flatnonzero(stream == BOS))
    assert_reads(train, whole.tokens(0, border), whole.document_starts(0, border))
    # three bytes a token of text, so what was cut is known exactly
    assert train.source_bytes == 3 * (border - 2 * train.num_documents)
    assert validation.source_bytes == 3 * (validation.num_tokens - 2 * validation.num_documents)
    mask = np.concatenate([store.splits["validation"].loss_mask(0, held_out), whole.loss_mask(border, whole.num_tokens)])
    np.testing.assert_array_equal(validation.loss_mask(0, validation.num_tokens), mask)
    assert validation.document(validation.num_documents - 1).tolist() == whole.document(whole.num_documents - 1).tolist()


def test_a_tail_that_leaves_nothing_is_refused_and_none_changes_nothing(tmp_path: Path) -> None:
    store = TokenStore.open(write_store(tmp_path / "s", "s", {"train": [[[5, 6], [7]]]}))
    assert with_tail(store.splits, 0, "s") is store.splits
    assert with_tail(store.splits, 3, "s")["validation"].num_tokens == 3
    with pytest.raises(StoreError, match="component 's' has 7 training tokens, and a tail of 4 leaves none; lower holdout_tail"):
        with_tail(store.splits, 4, "component 's'")


def test_a_batch_of_documents_is_as_one_after_the_other(tmp_path: Path) -> None:
    documents = [np.array([BOS, *document, EOS]) for document in random_shards(3, 1, 20)[0]]
    masks = [np.arange(len(document)) % 3 == 0 for document in documents]
    for name in ("one", "many"):
        with store_writer(tmp_path / name, loss_mask=True).shard("train", 0, 1, "k") as shard:
            if name == "one":
                for document, mask in zip(documents, masks, strict=True):
                    shard.add(document, 2 * len(document), mask)
            else:
                lengths = np.array([len(document) for document in documents])
                shard.add_batch(np.concatenate(documents).astype(np.uint32), lengths, 2 * lengths, np.concatenate(masks))
                shard.add_batch(np.empty(0, np.uint32), np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, bool))
    one, many = (shard_directory(tmp_path / name, "train", 0, 1) for name in ("one", "many"))
    names = sorted(path.name for path in one.iterdir())
    assert names == ["bytes.npy", "docs.npy", "loss_mask.bin", "shard.json", "tokens.bin"]
    assert all((one / name).read_bytes() == (many / name).read_bytes() for name in names)
    assert (one / "loss_mask.bin").read_bytes() == np.concatenate(masks).astype(np.uint8).tobytes()
    assert np.load(one / "bytes.npy").tolist() == [2 * len(document) for document in documents]


def test_a_store_without_bos_or_mask_says_so(tmp_path: Path) -> None:
    store = TokenStore.open(write_store(tmp_path / "s", "s", {"train": [[[5, 6], [7]]]}, bos_id=None))
    assert (store.bos_id, store.eos_id, store.loss_mask) == (None, EOS, False)
    assert store.splits["train"].tokens(0, 5).tolist() == [5, 6, EOS, 7, EOS]
    assert store.splits["train"].loss_mask(1, 4).tolist() == [1, 1, 1]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(512, "<u2"), (65_536, "<u2"), (65_537, "<u4"), (128_256, "<u4")])
def test_dtype_is_the_smallest_that_holds_every_id(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == np.dtype(dtype)
    path = write_store(tmp_path / "s", "s", {"train": [[[vocab_size - 1, 3]]]}, vocab_size=vocab_size)
    assert TokenStore.open(path).splits["train"].tokens(0, 4).tolist() == [BOS, vocab_size - 1, 3, EOS]
    raw = (shard_directory(path, "train", 0, 1) / "tokens.bin").read_bytes()
    assert raw == np.array([BOS, vocab_size - 1, 3, EOS], dtype).tobytes()


def test_uncommitted_or_damaged_stores_are_refused_by_file(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"not a committed artifact: it has no manifest\.json"):
        TokenStore.open(write_store(tmp_path / "a", "a", {"train": [[[5, 6]]]}, commit=False))
    path = write_store(tmp_path / "b", "b", {"train": [[[5, 6]], [[7]]]})
    (path / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(StoreError, match="is not JSON"):
        TokenStore.open(path)
    path = write_store(tmp_path / "c", "c", {"train": [[[5, 6]], [[7]]]})
    tokens = shard_directory(path, "train", 1, 2) / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-1])
    with pytest.raises(StoreError, match=r"shard-00001-of-00002/tokens\.bin has 5 bytes, its ledger says 6"):
        TokenStore.open(path)
    tokens.unlink()
    with pytest.raises(StoreError, match=r"tokens\.bin is missing"):
        TokenStore.open(path)
    (tokens.parent / "shard.json").unlink()
    with pytest.raises(StoreError, match=r"shard\.json is missing"):
        TokenStore.open(path)
    path = write_store(tmp_path / "d", "d", {"train": [[[5, 6]]]})
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    manifest["stats"]["splits"]["train"]["tokens"] += 1
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(StoreError, match="ledgers hold 4 tokens, the manifest says 5"):
        TokenStore.open(path)
    del manifest["stats"]["loss_mask"]
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(StoreError, match="no field 'loss_mask' in its stats; tokenize the dataset again"):
        TokenStore.open(path)


def test_a_shard_counts_only_with_its_key_and_its_hashes(tmp_path: Path) -> None:
    write_store(tmp_path, "s", {"train": [[[5, 6]]]})
    writer = store_writer(tmp_path)
    place = shard_directory(tmp_path, "train", 0, 1)
    assert writer.committed("train", 0, 1, "s-train-0") is not None
    assert writer.committed("train", 0, 1, "another key") is None
    assert writer.committed("train", 0, 2, "s-train-0") is None
    for name in ("tokens.bin", "docs.npy", "bytes.npy"):
        whole = (place / name).read_bytes()
        (place / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert writer.committed("train", 0, 1, "s-train-0") is None
        (place / name).write_bytes(whole)
    assert writer.committed("train", 0, 1, "s-train-0") is not None
    # nor where the ledger lists less than the shard must have
    assert store_writer(tmp_path, loss_mask=True).committed("train", 0, 1, "s-train-0") is None
    ledger = json.loads((place / "shard.json").read_text(encoding="utf-8"))
    (place / "shard.json").write_text(json.dumps({**ledger, "files": []}), encoding="utf-8")
    assert writer.committed("train", 0, 1, "s-train-0") is None


def half_written(writer: TokenStoreWriter) -> None:
    with writer.shard("train", 0, 1, "k") as shard:
        shard.add(np.array([BOS, 9, EOS]), 1, np.array([0, 1, 1]))
        raise RuntimeError("stop")


def test_a_writer_that_fails_leaves_no_shard_and_the_next_cleans_up(tmp_path: Path) -> None:
    place = shard_directory(tmp_path, "train", 0, 1)
    with pytest.raises(RuntimeError, match="stop"):
        half_written(store_writer(tmp_path, loss_mask=True))
    assert list(place.iterdir()) == []
    # what kill -9 leaves, of a writer with a mask
    (place / ".tokens.bin.123-abc.tmp").write_bytes(b"half")
    (place / "loss_mask.bin").write_bytes(b"left over")
    with store_writer(tmp_path).shard("train", 0, 1, "k") as shard:
        shard.add(np.array([BOS, 9, EOS]), 1)
    assert sorted(path.name for path in place.iterdir()) == ["bytes.npy", "docs.npy", "shard.json", "tokens.bin"]
    ledger = json.loads((place / "shard.json").read_text(encoding="utf-8"))
    assert ledger["files"][0]["sha256"] == hashlib.sha256(np.array([BOS, 9, EOS], "<u2").tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("ids", "lengths", "sizes", "mask", "message"),
    [
        ([BOS, 512, EOS], [3], [1], None, "document 1: id 512 is outside the vocabulary of 512"),
        ([BOS, EOS, BOS, -1, EOS], [2, 3], [1, 1], None, "document 2: id -1 is outside"),
        ([BOS, EOS], [2, 0], [1, 1], None, "document 2 has no token; leave it out"),
        ([BOS, EOS], [3], [1], None, r"lengths \(1,\) \(in all 3\)"),
        ([BOS, EOS], [1, 1], [1], None, "do not fit together"),
        ([BOS, EOS], [2], [-1], None, "document 1 has source_bytes=-1"),
        ([BOS, EOS], [2], [1], [1, 1], "the store has no loss mask, given is one of shape"),
    ],
)
def test_documents_that_do_not_fit_are_refused(
    tmp_path: Path, ids: list[int], lengths: list[int], sizes: list[int], mask: list[int] | None, message: str
) -> None:
    with store_writer(tmp_path).shard("train", 0, 1, "k") as shard:
        shard.add(np.array([BOS, EOS]), 1)
        with pytest.raises(StoreError, match=message):
            shard.add_batch(np.array(ids), np.array(lengths), np.array(sizes), None if mask is None else np.array(mask))
        # what was refused is not in the shard
        assert (shard.documents, shard.tokens, shard.source_bytes) == (1, 2, 1)


def test_missing_masks_and_special_ids_are_refused(tmp_path: Path) -> None:
    message = r"the store has a loss mask of shape \(2,\), given is none"
    with store_writer(tmp_path, loss_mask=True).shard("train", 0, 1, "k") as shard, pytest.raises(StoreError, match=message):
        shard.add(np.array([BOS, EOS]), 1)
    with pytest.raises(StoreError, match="eos_id=-1"):
        TokenStoreWriter(tmp_path, vocab_size=512, bos_id=BOS, eos_id=-1, tokenizer_digest="t" * 64)
    with pytest.raises(StoreError, match="bos_id=512"):
        TokenStoreWriter(tmp_path, vocab_size=512, bos_id=512, eos_id=EOS, tokenizer_digest="t" * 64)


def test_ids_of_a_large_stream_are_counted_in_evenly_spread_parts(tmp_path: Path) -> None:
    writer = TokenStoreWriter(tmp_path, vocab_size=8, bos_id=1, eos_id=2, tokenizer_digest="t" * 64)
    size = 1 << 20
    with writer.shard("train", 0, 1, "k") as shard:
        for token in range(3, 7):  # a megatoken of each
            shard.add(np.full(size, token), 1)
    write_manifest(tmp_path, "tokens", "n", "f" * 64, writer.stats({"train": 1}))
    split = TokenStore.open(tmp_path).splits["train"]
    assert split.counts(8).tolist() == [0, 0, 0, size, size, size, size, 0]
    assert split.counts(8, at_most=2 * size).tolist() == [0, 0, 0, size, 0, size, 0, 0]
