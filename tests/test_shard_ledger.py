"""Shards and their ledgers: whatever does not fit the counts is refused by name, on opening or at the first use."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.shard_ledger import NPY_HEADER_BYTES, npy_header
from model.token_store import StoreError, TokenStore, with_tail
from model.token_writer import shard_directory
from tests.synthetic_stores import BOS, EOS, write_store

Damage = Callable[[Path, Path], object]


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def stats(**fields: Any) -> Damage:
    return lambda store, shard: edited(store / "manifest.json", lambda manifest: manifest["stats"].update(fields))


def ledger(**fields: Any) -> Damage:
    return lambda store, shard: edited(shard / "shard.json", lambda value: value.update(fields))


def overwritten(name: str, at: int, data: bytes) -> Damage:
    def damage(store: Path, shard: Path) -> None:
        content = bytearray((shard / name).read_bytes())
        content[at : at + len(data)] = data
        (shard / name).write_bytes(content)

    return damage


def as_directory(name: str) -> Damage:
    def damage(store: Path, shard: Path) -> None:
        path = (store if name == "manifest.json" else shard) / name
        path.unlink()
        path.mkdir()

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (stats(dtype="zz"), r"manifest\.json is malformed \(dtype is 'zz', ids of a vocabulary of 512 are '<u2'\); tokenize the dataset"),
        (stats(dtype="<u4"), "dtype is '<u4'"),
        (stats(dtype=None), "dtype is None"),
        (stats(splits=None), "splits is None"),
        (stats(splits=["train"]), "splits is \\['train'\\]"),
        (stats(splits={"train": None}), "splits is {'train': None}"),
        (stats(splits={"train": {"shards": 2.0}}), "shards is 2.0, expected a whole number"),
        (stats(splits={"train": {"shards": 2}}), "no field 'documents' in its stats"),
        (stats(vocab_size=None), "vocab_size is None"),
        (stats(vocab_size=True), "vocab_size is True"),
        (stats(eos_id=512), "eos_id 512 is outside the vocabulary of 512"),
        (stats(bos_id="1"), "bos_id is '1'"),
        (stats(loss_mask=1), "loss_mask is 1"),
        (stats(loss_mask=True), r"shard\.json lists tokens\.bin of 16 bytes, .* loss_mask\.bin of 8: tokenize the dataset again"),
        (stats(tokenizer_digest=None), "tokenizer_digest None"),
        (as_directory("manifest.json"), r"manifest\.json cannot be read \(Is a directory\)"),
        (as_directory("shard.json"), r"shard\.json cannot be read \(Is a directory\)"),
        (as_directory("tokens.bin"), r"tokens\.bin is not a file, its ledger says 16"),
        (ledger(files=[]), r"shard\.json lists no file; 2 documents of 8 uint16 tokens are tokens\.bin of 16, docs\.npy of 152, bytes"),
        (ledger(tokens=9), "2 documents of 9 uint16 tokens are tokens.bin of 18"),
        (ledger(documents=-2), r"shard\.json is malformed \(ValueError: documents is -2"),
        (ledger(source_bytes=10**400), "ledgers hold"),
    ],
)
def test_a_manifest_or_ledger_that_does_not_fit_is_refused_on_opening(tmp_path: Path, damage: Damage, message: str) -> None:
    path = write_store(tmp_path / "s", "s", {"train": [[[5, 6], [7, 8]], [[9]]]})
    damage(path, shard_directory(path, "train", 0, 2))
    with pytest.raises(StoreError, match=message):
        TokenStore.open(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (overwritten("docs.npy", 0, b"garbage!"), r"docs\.npy does not begin as an array of 3 int64 does; tokenize the dataset again"),
        (overwritten("docs.npy", NPY_HEADER_BYTES, b"\x01"), r"docs\.npy does not ascend from 0 to 8; tokenize the dataset again"),
        (overwritten("docs.npy", NPY_HEADER_BYTES + 8, b"\xff" * 8), "does not ascend"),
        (overwritten("docs.npy", NPY_HEADER_BYTES + 8, b"\x08"), "does not ascend"),
        (overwritten("docs.npy", NPY_HEADER_BYTES + 16, b"\x07"), "does not ascend from 0 to 8"),
        (lambda store, shard: (shard / "tokens.bin").unlink(), r"tokens\.bin cannot be read \(No such file or directory\); bring it back"),
        (lambda store, shard: (shard / "tokens.bin").write_bytes(b""), r"tokens\.bin has 0 bytes, its ledger says 16"),
        (overwritten("tokens.bin", 2, b"\x00\x02"), r"tokens\.bin, or a shard soon after it, has the id 512, the vocabulary has 512"),
    ],
)
def test_damage_to_the_files_of_an_opened_store_is_named_at_the_first_use(tmp_path: Path, damage: Damage, message: str) -> None:
    path = write_store(tmp_path / "s", "s", {"train": [[[9]], [[5, 6], [7, 8]]]})
    split = TokenStore.open(path).splits["train"]
    damage(path, shard_directory(path, "train", 1, 2))
    assert split.tokens(0, 3).tolist() == [BOS, 9, EOS]
    for _ in range(2):
        with pytest.raises(StoreError, match=message):
            split.counts(512)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (overwritten("bytes.npy", NPY_HEADER_BYTES, b"\x07"), r"bytes\.npy adds up to 13, the ledger says 12; tokenize the dataset again"),
        (overwritten("bytes.npy", 0, bytes(8)), r"bytes\.npy does not begin as an array of 2 uint32 does"),
        (overwritten("docs.npy", NPY_HEADER_BYTES + 8, b"\x09"), r"docs\.npy does not ascend"),
    ],
)
def test_a_damaged_index_is_named_where_a_tail_is_cut(tmp_path: Path, damage: Damage, message: str) -> None:
    path = write_store(tmp_path / "s", "s", {"train": [[[5, 6], [7, 8]]]})
    store = TokenStore.open(path)
    assert with_tail(store.splits, 1, "s")["train"].source_bytes == 6
    damage(path, shard_directory(path, "train", 0, 1))
    with pytest.raises(StoreError, match=message):
        with_tail(store.splits, 1, "s")


@pytest.mark.parametrize("count", [0, 1, 17, 123_456, 10**15])
@pytest.mark.parametrize("dtype", ["<i8", "<u4"])
def test_headers_are_those_of_numpy(dtype: str, count: int) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": (count,)})
    assert npy_header(np.dtype(dtype), count) == buffer.getvalue()
    assert len(buffer.getvalue()) == NPY_HEADER_BYTES
