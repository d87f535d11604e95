"""Token stores: exact round trip, slicing across shards, damage named, killed writers harmless."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from model import token_store
from model.token_store import StoreError, TokenStore, TokenStoreWriter
from model.token_writer import shard_directory, token_dtype
from tests.synthetic_stores import BOS, EOS, random_shards, write_store


def flat(shards: list[list[list[int]]]) -> list[int]:
    return [token for shard in shards for document in shard for token in (BOS, *document, EOS)]


@pytest.fixture
def shards() -> list[list[list[int]]]:
    first, second, third = random_shards(7, 3, 12)
    return [[], first, [], second, third, []]


def test_round_trip_and_every_slice_across_shards(tmp_path: Path, shards: list[list[list[int]]]) -> None:
    split = TokenStore.open(write_store(tmp_path / "s", "s", {"train": shards})).splits["train"]
    expected = np.array(flat(shards))
    starts = np.flatnonzero(expected == BOS)
    assert split.num_tokens == len(expected)
    assert split.num_documents == 36
    assert split.source_bytes == 3 * (len(expected) - 72)
    for start in range(0, len(expected), 17):
        for stop in (start, start + 1, min(start + 400, len(expected)), len(expected)):
            np.testing.assert_array_equal(split.tokens(start, stop), expected[start:stop])
            np.testing.assert_array_equal(split.document_starts(start, stop), starts[(starts >= start) & (starts < stop)])
    documents = [split.document(index).tolist() for index in range(36)]
    assert documents == [[BOS, *document, EOS] for shard in shards for document in shard]
    np.testing.assert_array_equal(split.counts(512), np.bincount(expected, minlength=512))
    with pytest.raises(IndexError, match="which has"):
        split.tokens(0, len(expected) + 1)
    with pytest.raises(IndexError, match="document 36"):
        split.document(36)


def test_mapped_shards_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: list[list[list[int]]]) -> None:
    monkeypatch.setattr(token_store, "MAX_MAPPED_SHARDS", 2)
    split = TokenStore.open(write_store(tmp_path / "s", "s", {"train": shards})).splits["train"]
    np.testing.assert_array_equal(split.tokens(0, split.num_tokens), flat(shards))
    assert len(split._mapped) == 2


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


def test_a_shard_counts_only_with_its_key_and_its_hashes(tmp_path: Path) -> None:
    write_store(tmp_path, "s", {"train": [[[5, 6]]]})
    writer = TokenStoreWriter(tmp_path, vocab_size=512, bos_id=BOS, eos_id=EOS, tokenizer_sha256="t" * 64)
    assert writer.committed("train", 0, 1, "s-train-0") is not None
    assert writer.committed("train", 0, 1, "another key") is None
    assert writer.committed("train", 0, 2, "s-train-0") is None
    tokens = shard_directory(tmp_path, "train", 0, 1) / "tokens.bin"
    tokens.write_bytes(bytes([tokens.read_bytes()[0] ^ 1]) + tokens.read_bytes()[1:])
    assert writer.committed("train", 0, 1, "s-train-0") is None


def half_written(writer: TokenStoreWriter) -> None:
    with writer.shard("train", 0, 1, "k") as shard:
        shard.add(np.array([BOS, 9, EOS]), 1)
        raise RuntimeError("stop")


def test_a_writer_that_fails_leaves_no_shard_and_the_next_cleans_up(tmp_path: Path) -> None:
    writer = TokenStoreWriter(tmp_path, vocab_size=512, bos_id=BOS, eos_id=EOS, tokenizer_sha256="t" * 64)
    place = shard_directory(tmp_path, "train", 0, 1)
    with pytest.raises(RuntimeError, match="stop"):
        half_written(writer)
    assert list(place.iterdir()) == []
    # what kill -9 leaves
    (place / ".tokens.bin.123-abc.tmp").write_bytes(b"half")
    with writer.shard("train", 0, 1, "k") as shard:
        shard.add(np.array([BOS, 9, EOS]), 1)
    assert sorted(path.name for path in place.iterdir()) == ["docs.npy", "shard.json", "tokens.bin"]
    ledger = json.loads((place / "shard.json").read_text(encoding="utf-8"))
    assert ledger["files"][0]["sha256"] == hashlib.sha256(np.array([BOS, 9, EOS], "<u2").tobytes()).hexdigest()


def test_ids_outside_the_vocabulary_and_missing_special_ids_are_refused(tmp_path: Path) -> None:
    writer = TokenStoreWriter(tmp_path, vocab_size=512, bos_id=BOS, eos_id=EOS, tokenizer_sha256="t" * 64)
    with pytest.raises(StoreError, match="id 512 is outside the vocabulary of 512"), writer.shard("train", 0, 1, "k") as shard:
        shard.add(np.array([BOS, 512, EOS]), 1)
    with pytest.raises(StoreError, match="id -1 is outside"), writer.shard("train", 0, 1, "k") as shard:
        shard.add(np.array([BOS, -1, EOS]), 1)
    with pytest.raises(StoreError, match="eos_id=-1"):
        TokenStoreWriter(tmp_path, vocab_size=512, bos_id=BOS, eos_id=-1, tokenizer_sha256="t" * 64)
