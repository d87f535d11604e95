"""Writes token stores shard by shard: a shard is there once its ledger is, and a killed writer loses at most one shard."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from model.durable import durable_file, remove_temporaries, write_durably, write_json
from model.shard_ledger import (
    BYTES_DTYPE,
    BYTES_FILE,
    LEDGER_SCHEMA,
    LOSS_MASK_FILE,
    OFFSETS_DTYPE,
    OFFSETS_FILE,
    TOKENS_FILE,
    ShardFile,
    ShardLedger,
    StoreError,
    npy_header,
    shard_directory,
    token_dtype,
)

__all__ = ["LEDGER_SCHEMA", "ShardLedger", "ShardWriter", "StoreError", "TokenStoreWriter", "shard_directory", "token_dtype"]


class ShardWriter:
    """Takes the documents of one shard, in order, one by one or many at a time; keeps 12 bytes for each."""

    def __init__(self, tokens: BinaryIO, loss_mask: BinaryIO | None, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        self._tokens = _HashedFile(tokens)
        self._loss_mask = None if loss_mask is None else _HashedFile(loss_mask)
        self._offsets = array("q", [0])
        self._bytes = array("I")
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

    def add(self, tokens: np.ndarray, source_bytes: int, loss_mask: np.ndarray | None = None) -> None:
        """Appends one document: its ids [N] with BOS and EOS, and the UTF-8 bytes of its text; see `add_batch`."""
        if tokens.ndim != 1 or not len(tokens):
            raise StoreError(f"document {self.documents}: ids have shape {tokens.shape}, expected [N] with N >= 1")
        self.add_batch(tokens, np.array([len(tokens)]), np.array([source_bytes]), loss_mask)

    def add_batch(self, ids: np.ndarray, lengths: np.ndarray, source_bytes: np.ndarray, loss_mask: np.ndarray | None = None) -> None:
        """Appends D documents.

        Args:
            ids: of all documents, one after the other, with BOS and EOS [total].
            lengths: tokens of each document, 1 or more [D].
            source_bytes: UTF-8 bytes of the text of each document [D]: what bits per byte are counted by.
            loss_mask: true where the loss counts with that token as the target [total]; for a store with a mask, and only there.

        Raises StoreError for an empty document, an id outside the vocabulary, or arrays that do not fit together.
        """
        lengths, source_bytes = np.asarray(lengths, np.int64), np.asarray(source_bytes, np.int64)
        self._check(ids, lengths, source_bytes, loss_mask)
        if not len(lengths):
            return
        self._tokens.write(np.ascontiguousarray(ids, self._dtype).tobytes())
        if self._loss_mask is not None and loss_mask is not None:
            self._loss_mask.write((loss_mask != 0).astype(np.uint8).tobytes())
        self._offsets.frombytes((self.tokens + np.cumsum(lengths)).tobytes())
        self._bytes.frombytes(source_bytes.astype(np.uint32).tobytes())
        self.source_bytes += int(source_bytes.sum())

    def _check(self, ids: np.ndarray, lengths: np.ndarray, source_bytes: np.ndarray, loss_mask: np.ndarray | None) -> None:
        first = self.documents
        if ids.ndim != 1 or lengths.ndim != 1 or lengths.shape != source_bytes.shape or lengths.sum() != len(ids):
            raise StoreError(
                f"documents from {first}: ids {ids.shape}, lengths {lengths.shape} (in all {lengths.sum()}) and source_bytes "
                f"{source_bytes.shape} do not fit together"
            )
        if len(short := np.flatnonzero(lengths < 1)):
            raise StoreError(f"document {first + short[0]} has no token; leave it out, or give it at least EOS")
        if len(odd := np.flatnonzero((source_bytes < 0) | (source_bytes >> 32 != 0))):
            raise StoreError(f"document {first + odd[0]} has source_bytes={source_bytes[odd[0]]}, expected 0 to 2**32 - 1")
        if (loss_mask is None) != (self._loss_mask is None) or (loss_mask is not None and loss_mask.shape != ids.shape):
            given = "none" if loss_mask is None else f"one of shape {loss_mask.shape}"
            wanted = "no loss mask" if self._loss_mask is None else f"a loss mask of shape {ids.shape}"
            raise StoreError(f"documents from {first}: the store has {wanted}, given is {given}")
        if len(ids) and (ids.min() < 0 or ids.max() >= self._vocab_size):
            wrong = np.flatnonzero((ids < 0) | (ids >= self._vocab_size))[0]
            document = first + int(np.searchsorted(np.cumsum(lengths), wrong, side="right"))
            raise StoreError(f"document {document}: id {ids[wrong]} is outside the vocabulary of {self._vocab_size}")

    def finish(self) -> tuple[list[ShardFile], dict[str, bytes]]:
        """The records of the files that were written as documents came, and the content of those that were not, by name."""
        written = [self._tokens.record(TOKENS_FILE)]
        if self._loss_mask is not None:
            written.append(self._loss_mask.record(LOSS_MASK_FILE))
        arrays = {OFFSETS_FILE: np.frombuffer(self._offsets, OFFSETS_DTYPE), BYTES_FILE: np.frombuffer(self._bytes, BYTES_DTYPE)}
        return written, {name: _npy(values) for name, values in arrays.items()}


class _HashedFile:
    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash, self._size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> None:
        self._hash.update(data)
        self._file.write(data)
        self._size += len(data)

    def record(self, name: str) -> ShardFile:
        return ShardFile(name, self._size, self._hash.hexdigest())


def _npy(values: np.ndarray) -> bytes:
    return npy_header(values.dtype, len(values)) + values.tobytes()


class TokenStoreWriter:
    """Writes the shards of one store. Several processes may write different shards of it at once."""

    def __init__(
        self, directory: Path, *, vocab_size: int, bos_id: int | None, eos_id: int, tokenizer_digest: str, loss_mask: bool = False
    ) -> None:
        """`bos_id` is None for a tokenizer without BOS; `loss_mask`: documents come with the places where the loss counts."""
        for name, value in (("bos_id", bos_id), ("eos_id", eos_id)):
            if value is not None and not 0 <= value < vocab_size:
                raise StoreError(
                    f"{name}={value} is outside the vocabulary of {vocab_size}; the tokenizer must define EOS, and BOS or none"
                )
        self.directory = Path(directory)
        self.vocab_size = vocab_size
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.tokenizer_digest = tokenizer_digest
        self.loss_mask = loss_mask

    def committed(self, split: str, shard: int, num_shards: int, key: str) -> ShardLedger | None:
        """The ledger of a finished shard of that key whose files still hash to it; None means it must be written."""
        place = shard_directory(self.directory, split, shard, num_shards)
        try:
            ledger = ShardLedger.read(place)
            ledger.check(place, token_dtype(self.vocab_size), self.loss_mask)
        except StoreError:
            return None
        return ledger if ledger.key == key and ledger.verifies(place) else None

    @contextmanager
    def shard(self, split: str, shard: int, num_shards: int, key: str) -> Iterator[ShardWriter]:
        """Opens a shard for writing; it is committed when the block ends well and left unfinished otherwise."""
        place = shard_directory(self.directory, split, shard, num_shards)
        place.mkdir(parents=True, exist_ok=True)
        remove_temporaries(place)
        for name in ("shard.json", TOKENS_FILE, OFFSETS_FILE, BYTES_FILE, LOSS_MASK_FILE):
            (place / name).unlink(missing_ok=True)
        with ExitStack() as stack:
            tokens = stack.enter_context(durable_file(place / TOKENS_FILE, sync_name=False))
            loss_mask = stack.enter_context(durable_file(place / LOSS_MASK_FILE, sync_name=False)) if self.loss_mask else None
            writer = ShardWriter(tokens, loss_mask, self.vocab_size)
            yield writer
            files, contents = writer.finish()
        for name, content in contents.items():
            write_durably(place / name, content, sync_name=False)
            files.append(ShardFile(name, len(content), hashlib.sha256(content).hexdigest()))
        ledger = ShardLedger(key, writer.documents, writer.tokens, writer.source_bytes, tuple(files), writer.skipped)
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
            "tokenizer_digest": self.tokenizer_digest,
            "loss_mask": self.loss_mask,
            "splits": totals,
            "documents": sum(total["documents"] for total in totals.values()),
            "tokens": sum(total["tokens"] for total in totals.values()),
            "source_bytes": sum(total["source_bytes"] for total in totals.values()),
        }
