"""Writes token stores shard by shard: a shard is there once its ledger is, and a killed writer loses at most one shard."""

from __future__ import annotations

import hashlib
import io
import json
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from model.durable import durable_file, remove_temporaries, sha256_of, write_durably, write_json

LEDGER_SCHEMA = 1


class StoreError(ValueError):
    """A token store or mixture that is not committed, is damaged, or does not fit what is asked of it."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype that holds ids below `vocab_size`: little-endian uint16, or uint32 above 65,536."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def shard_directory(store: Path, split: str, shard: int, num_shards: int) -> Path:
    """Where shard number `shard` (from 0) of a split lies."""
    return store / split / f"shard-{shard:05d}-of-{num_shards:05d}"


@dataclass(frozen=True)
class ShardFile:
    """One data file of a shard."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardLedger:
    """What a finished shard holds. `key` identifies the input: equal key, equal output."""

    key: str
    documents: int
    tokens: int
    source_bytes: int
    files: tuple[ShardFile, ...]
    skipped: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path) -> ShardLedger:
        """Reads `shard.json`. Raises StoreError where it is missing or malformed."""
        path = directory / "shard.json"
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if value["schema"] != LEDGER_SCHEMA:
                raise StoreError(f"{path} has schema {value['schema']!r}, this version reads {LEDGER_SCHEMA}; tokenize the dataset again")
            return cls(
                key=str(value["key"]),
                documents=int(value["documents"]),
                tokens=int(value["tokens"]),
                source_bytes=int(value["source_bytes"]),
                files=tuple(ShardFile(str(file["name"]), int(file["bytes"]), str(file["sha256"])) for file in value["files"]),
                skipped={str(reason): int(count) for reason, count in value["skipped"].items()},
            )
        except FileNotFoundError:
            raise StoreError(f"{path} is missing: the shard was not finished; tokenize the dataset again") from None
        except StoreError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{path} is malformed ({type(error).__name__}: {error}); tokenize the dataset again") from None

    def verifies(self, directory: Path) -> bool:
        """Whether every file of the shard is there with its size and hash (reads the files)."""
        return all(
            (path := directory / file.name).is_file() and path.stat().st_size == file.bytes and sha256_of(path) == file.sha256
            for file in self.files
        )


class ShardWriter:
    """Takes the documents of one shard, in order."""

    def __init__(self, file: BinaryIO, vocab_size: int) -> None:
        self._file = file
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        self._hash = hashlib.sha256()
        self._offsets = array("q", [0])
        self.source_bytes = 0
        self.skipped: dict[str, int] = {}

    @property
    def documents(self) -> int:
        """Documents taken so far."""
        return len(self._offsets) - 1

    @property
    def tokens(self) -> int:
        """Tokens taken so far."""
        return self._offsets[-1]

    def add(self, tokens: np.ndarray, source_bytes: int) -> None:
        """Appends one document: its ids [N] with BOS and EOS, and the UTF-8 bytes of its text.

        Raises StoreError for an empty document or an id outside the vocabulary.
        """
        if tokens.ndim != 1 or not len(tokens):
            raise StoreError(f"document {self.documents}: ids have shape {tokens.shape}, expected [N] with N >= 1")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self._vocab_size:
            raise StoreError(f"document {self.documents}: id {low if low < 0 else high} is outside the vocabulary of {self._vocab_size}")
        data = tokens.astype(self._dtype).tobytes()
        self._hash.update(data)
        self._file.write(data)
        self._offsets.append(self.tokens + len(tokens))
        self.source_bytes += source_bytes

    def finish(self) -> tuple[ShardFile, bytes]:
        """The record of the token file and the bytes of `docs.npy`."""
        buffer = io.BytesIO()
        np.save(buffer, np.frombuffer(self._offsets, dtype="<i8"), allow_pickle=False)
        return ShardFile("tokens.bin", self.tokens * self._dtype.itemsize, self._hash.hexdigest()), buffer.getvalue()


class TokenStoreWriter:
    """Writes the shards of one store. Several processes may write different shards of it at once."""

    def __init__(self, directory: Path, *, vocab_size: int, bos_id: int, eos_id: int, tokenizer_sha256: str) -> None:
        for name, value in (("bos_id", bos_id), ("eos_id", eos_id)):
            if not 0 <= value < vocab_size:
                raise StoreError(f"{name}={value} is outside the vocabulary of {vocab_size}; the tokenizer must define both BOS and EOS")
        self.directory = Path(directory)
        self.vocab_size = vocab_size
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.tokenizer_sha256 = tokenizer_sha256

    def committed(self, split: str, shard: int, num_shards: int, key: str) -> ShardLedger | None:
        """The ledger of a finished shard of that key whose files still hash to it; None means it must be written."""
        place = shard_directory(self.directory, split, shard, num_shards)
        try:
            ledger = ShardLedger.read(place)
        except StoreError:
            return None
        return ledger if ledger.key == key and ledger.verifies(place) else None

    @contextmanager
    def shard(self, split: str, shard: int, num_shards: int, key: str) -> Iterator[ShardWriter]:
        """Opens a shard for writing; it is committed when the block ends well and left unfinished otherwise."""
        place = shard_directory(self.directory, split, shard, num_shards)
        place.mkdir(parents=True, exist_ok=True)
        remove_temporaries(place)
        (place / "shard.json").unlink(missing_ok=True)
        with durable_file(place / "tokens.bin") as file:
            writer = ShardWriter(file, self.vocab_size)
            yield writer
            tokens_file, docs = writer.finish()
        write_durably(place / "docs.npy", docs)
        files = (tokens_file, ShardFile("docs.npy", len(docs), hashlib.sha256(docs).hexdigest()))
        ledger = ShardLedger(key, writer.documents, writer.tokens, writer.source_bytes, files, writer.skipped)
        write_json(place / "shard.json", {"schema": LEDGER_SCHEMA, **asdict(ledger)})

    def stats(self, splits: Mapping[str, int]) -> dict[str, Any]:
        """The manifest's stats of the finished store; `splits` gives the number of shards of each split.

        Raises StoreError where a shard has no ledger.
        """
        totals: dict[str, dict[str, Any]] = {}
        for split, count in splits.items():
            ledgers = [ShardLedger.read(shard_directory(self.directory, split, index, count)) for index in range(count)]
            skipped: dict[str, int] = {}
            for ledger in ledgers:
                for reason, number in ledger.skipped.items():
                    skipped[reason] = skipped.get(reason, 0) + number
            totals[split] = {
                "shards": count,
                "documents": sum(ledger.documents for ledger in ledgers),
                "tokens": sum(ledger.tokens for ledger in ledgers),
                "source_bytes": sum(ledger.source_bytes for ledger in ledgers),
                "skipped": skipped,
            }
        return {
            "dtype": token_dtype(self.vocab_size).str,
            "vocab_size": self.vocab_size,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
            "tokenizer_sha256": self.tokenizer_sha256,
            "splits": totals,
            "documents": sum(total["documents"] for total in totals.values()),
            "tokens": sum(total["tokens"] for total in totals.values()),
            "source_bytes": sum(total["source_bytes"] for total in totals.values()),
        }
