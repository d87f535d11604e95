"""The token store: a corpus as flat little-endian ids in shards, with document offsets, read by index.

Layout below one artifact directory (`manifest.json` is written last, by whoever commits the artifact):

    manifest.json                                  stats: tokenizer, special ids, totals per split
    train/shard-00003-of-00013/tokens.bin          ids, uint16, or uint32 where the vocabulary needs it
    train/shard-00003-of-00013/docs.npy            int64 [documents + 1]: where each document starts, and the end
    train/shard-00003-of-00013/shard.json          ledger: counts, sizes, hashes, the key of its input; written last
    validation/shard-00003-of-00013/...
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.token_writer import ShardLedger, StoreError, TokenStoreWriter, shard_directory

__all__ = ["ShardLedger", "StoreError", "TokenSplit", "TokenStore", "TokenStoreWriter", "artifact_path", "read_committed"]

# A mapped file holds a descriptor; the usual limit of a process is 1024.
MAX_MAPPED_SHARDS = 128


def artifact_path(artifact: Any) -> Path:
    """The directory of an artifact given as itself (anything with `.path`) or as its path."""
    return Path(getattr(artifact, "path", artifact))


def read_committed(directory: Path) -> dict[str, Any]:
    """The manifest of a committed artifact. Raises StoreError when there is none or it cannot be read."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{directory} is not a committed artifact: it has no manifest.json; run the step that makes it again") from None
    except ValueError as error:
        raise StoreError(f"{directory / 'manifest.json'} is not JSON ({error}); run the step that makes it again") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("stats"), dict) or not isinstance(manifest.get("fingerprint"), str):
        raise StoreError(f"{directory / 'manifest.json'} lacks 'stats' or 'fingerprint'; run the step that makes it again")
    return manifest


class TokenSplit:
    """One split as a single stream of tokens: document after document, shard after shard."""

    def __init__(self, directory: Path, name: str, ledgers: list[ShardLedger], dtype: np.dtype[Any]) -> None:
        self.name = name
        self.num_shards = len(ledgers)
        self.num_tokens = sum(ledger.tokens for ledger in ledgers)
        self.num_documents = sum(ledger.documents for ledger in ledgers)
        self.source_bytes = sum(ledger.source_bytes for ledger in ledgers)
        self._dtype = dtype
        self._directories = [shard_directory(directory, name, index, self.num_shards) for index in range(self.num_shards)]
        self._token_base = _bases(ledger.tokens for ledger in ledgers)
        self._document_base = _bases(ledger.documents for ledger in ledgers)
        self._mapped: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream, in the store's dtype [stop - start]; cost does not depend on where.

        Raises IndexError outside [0, num_tokens].
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of split {self.name!r}, which has {self.num_tokens}")
        pieces: list[np.ndarray] = []
        shard = self._shard_at(start)
        while start < stop:
            base, end = self._token_base[shard], self._token_base[shard + 1]
            if end > start:
                pieces.append(self._shard(shard)[0][start - base : min(stop, end) - base])
                start = min(stop, end)
            shard += 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, self._dtype)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Positions p in [start, stop) at which a document begins, int64, ascending."""
        pieces: list[np.ndarray] = []
        for shard in range(self._shard_at(start), self.num_shards):
            base, end = self._token_base[shard], self._token_base[shard + 1]
            if base >= stop:
                break
            if end > base:
                offsets = self._shard(shard)[1][:-1]
                low, high = offsets.searchsorted((start - base, stop - base))
                pieces.append(offsets[low:high] + base)
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def document(self, index: int) -> np.ndarray:
        """The tokens of document `index`, BOS and EOS included. Raises IndexError."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of split {self.name!r}, which has {self.num_documents}")
        shard = bisect_right(self._document_base, index) - 1
        tokens, offsets = self._shard(shard)
        local = index - self._document_base[shard]
        return tokens[offsets[local] : offsets[local + 1]]

    def counts(self, vocab_size: int) -> np.ndarray:
        """How often each id occurs, int64 [vocab_size], in one pass over the shards."""
        total = np.zeros(vocab_size, np.int64)
        piece = 1 << 22
        for start in range(0, self.num_tokens, piece):
            total += np.bincount(self.tokens(start, min(start + piece, self.num_tokens)), minlength=vocab_size)
        return total

    def _shard_at(self, position: int) -> int:
        return max(0, min(bisect_right(self._token_base, position) - 1, self.num_shards - 1))

    def _shard(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index in self._mapped:
            self._mapped.move_to_end(index)
            return self._mapped[index]
        directory = self._directories[index]
        # plain views: slicing an np.memmap itself costs ten times as much per call
        tokens = np.asarray(np.memmap(directory / "tokens.bin", dtype=self._dtype, mode="r"))
        offsets = np.asarray(np.load(directory / "docs.npy", mmap_mode="r", allow_pickle=False))
        self._mapped[index] = tokens, offsets
        if len(self._mapped) > MAX_MAPPED_SHARDS:
            self._mapped.popitem(last=False)
        return tokens, offsets


@dataclass(frozen=True)
class TokenStore:
    """A committed token store; `splits` maps "train" and "validation" to their streams."""

    path: Path
    name: str
    fingerprint: str
    vocab_size: int
    bos_id: int
    eos_id: int
    tokenizer_sha256: str
    splits: dict[str, TokenSplit]

    @classmethod
    def open(cls, path: Any) -> TokenStore:
        """Opens the store at `path` (an artifact or its directory), checking every file's size against the ledgers.

        Raises StoreError naming the file where the store is not committed, lacks a file, or differs in size or count.
        """
        directory = artifact_path(path)
        manifest = read_committed(directory)
        stats = manifest["stats"]
        try:
            dtype = np.dtype(stats["dtype"])
            splits = {
                name: TokenSplit(directory, name, _ledgers(directory, name, totals), dtype) for name, totals in stats["splits"].items()
            }
            return cls(
                path=directory,
                name=str(manifest.get("name", directory.name)),
                fingerprint=manifest["fingerprint"],
                vocab_size=int(stats["vocab_size"]),
                bos_id=int(stats["bos_id"]),
                eos_id=int(stats["eos_id"]),
                tokenizer_sha256=str(stats["tokenizer_sha256"]),
                splits=splits,
            )
        except KeyError as error:
            raise StoreError(f"{directory / 'manifest.json'} has no field {error} in its stats; tokenize the dataset again") from None


def _bases(counts: Any) -> list[int]:
    bases = [0]
    for count in counts:
        bases.append(bases[-1] + count)
    return bases


def _ledgers(directory: Path, split: str, totals: dict[str, Any]) -> list[ShardLedger]:
    """The ledgers of a split, checked against the files beside them and the manifest's totals."""
    count = int(totals["shards"])
    ledgers = [ShardLedger.read(shard_directory(directory, split, index, count)) for index in range(count)]
    for index, ledger in enumerate(ledgers):
        place = shard_directory(directory, split, index, count)
        for file in ledger.files:
            path = place / file.name
            size = path.stat().st_size if path.is_file() else None
            if size != file.bytes:
                found = "is missing" if size is None else f"has {size} bytes"
                raise StoreError(f"{path} {found}, its ledger says {file.bytes}; tokenize the dataset again")
    found = {name: sum(getattr(ledger, name) for ledger in ledgers) for name in ("documents", "tokens", "source_bytes")}
    for name, total in found.items():
        if total != totals[name]:
            raise StoreError(f"{directory} split {split!r}: ledgers hold {total} {name}, the manifest says {totals[name]}; tokenize again")
    return ledgers
