"""A split of a token store as one stream of tokens: document after document, shard after shard, read by index.

A split can be cut between documents and joined with another; nothing is copied by that.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from model.mapped_files import MAPPINGS, map_file
from model.shard_ledger import (
    BYTES_DTYPE,
    BYTES_FILE,
    LOSS_MASK_FILE,
    NPY_HEADER_BYTES,
    OFFSETS_DTYPE,
    OFFSETS_FILE,
    TOKENS_FILE,
    ShardLedger,
    StoreError,
    npy_header,
)


@dataclass(frozen=True)
class Shard:
    """A whole shard as files of known sizes."""

    directory: Path
    documents: int
    tokens: int
    source_bytes: int

    def offsets(self, *, checked: bool) -> np.ndarray:
        """Where its documents start, and the end, int64 [documents + 1].

        Raises StoreError where the file has another size, or, with `checked`, is not an ascending array from 0 to the shard's tokens
        (reads all of it).
        """
        offsets = self._array(OFFSETS_FILE, OFFSETS_DTYPE, self.documents + 1, checked=checked)
        if checked and not (offsets[0] == 0 and offsets[-1] == self.tokens and bool((offsets[1:] > offsets[:-1]).all())):
            raise StoreError(f"{self.directory / OFFSETS_FILE} does not ascend from 0 to {self.tokens}; tokenize the dataset again")
        return offsets

    def document_bytes(self) -> np.ndarray:
        """The UTF-8 bytes of each document, uint32 [documents]. Raises StoreError where they do not add up to the shard's."""
        sizes = self._array(BYTES_FILE, BYTES_DTYPE, self.documents, checked=True)
        if (total := int(sizes.sum(dtype=np.int64))) != self.source_bytes:
            raise StoreError(
                f"{self.directory / BYTES_FILE} adds up to {total}, the ledger says {self.source_bytes}; tokenize the dataset again"
            )
        return sizes

    def values(self, name: str, dtype: np.dtype[Any]) -> np.ndarray:
        """One of the files that hold a value for each token [tokens]. Raises StoreError where it has another size."""
        return map_file(f"{self.directory}/{name}", self.tokens * dtype.itemsize).view(dtype)

    def _array(self, name: str, dtype: np.dtype[Any], count: int, *, checked: bool) -> np.ndarray:
        path = f"{self.directory}/{name}"
        content = map_file(path, NPY_HEADER_BYTES + count * dtype.itemsize)
        if checked and content[:NPY_HEADER_BYTES].tobytes() != npy_header(dtype, count):
            raise StoreError(f"{path} does not begin as an array of {count} {dtype.name} does; tokenize the dataset again")
        return content[NPY_HEADER_BYTES:].view(dtype)


@dataclass(frozen=True)
class ShardPart:
    """Some documents of one shard, from document `first_document` on, which begins at token `first_token` of the shard."""

    shard: Shard
    documents: int
    tokens: int
    source_bytes: int
    first_document: int = 0
    first_token: int = 0

    @classmethod
    def whole(cls, directory: Path, ledger: ShardLedger) -> ShardPart:
        """All of a shard."""
        shard = Shard(directory, ledger.documents, ledger.tokens, ledger.source_bytes)
        return cls(shard, ledger.documents, ledger.tokens, ledger.source_bytes)

    def cut(self, document: int) -> tuple[ShardPart, ShardPart]:
        """What lies before, and from, the part's document number `document`. Reads the shard's index; raises StoreError."""
        border = self.first_document + document
        tokens = int(self.shard.offsets(checked=True)[border]) - self.first_token
        size = int(self.shard.document_bytes()[self.first_document : border].sum(dtype=np.int64))
        left = replace(self, documents=document, tokens=tokens, source_bytes=size)
        right = ShardPart(
            self.shard, self.documents - document, self.tokens - tokens, self.source_bytes - size, border, self.first_token + tokens
        )
        return left, right

    def last_document(self, tokens: int) -> int:
        """The last of the part's documents from which on it has `tokens` tokens or more. Reads the shard's index; raises StoreError."""
        border = self.first_token + self.tokens - tokens
        return int(self.shard.offsets(checked=True).searchsorted(border, side="right")) - 1 - self.first_document


class Mapped(NamedTuple):
    """The arrays of a part: tokens [T], where its documents start and the end int64 [D + 1], loss mask uint8 [T] or None."""

    tokens: np.ndarray
    offsets: np.ndarray
    loss_mask: np.ndarray | None


class TokenSplit:
    """One split as a single stream of tokens."""

    def __init__(self, name: str, parts: Sequence[ShardPart], dtype: np.dtype[Any], *, has_loss_mask: bool = False) -> None:
        self.name = name
        self.has_loss_mask = has_loss_mask
        self.dtype = dtype
        self.num_shards = len(parts)
        self.num_tokens = sum(part.tokens for part in parts)
        self.num_documents = sum(part.documents for part in parts)
        self.source_bytes = sum(part.source_bytes for part in parts)
        self._parts = tuple(parts)
        self.token_base = _bases(part.tokens for part in parts)
        self._document_base = _bases(part.documents for part in parts)
        self._mapped: list[Mapped | None] = [None] * len(parts)
        self._checked = bytearray(len(parts))

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream, in the store's dtype [stop - start]; cost does not depend on where.

        Raises IndexError outside [0, num_tokens].
        """
        return self._join([part.tokens[low:high] for part, low, high in self._ranges(start, stop)], self.dtype)

    def loss_mask(self, start: int, stop: int) -> np.ndarray:
        """Where the loss counts with the tokens [start, stop) as targets, uint8 [stop - start]: 1 or 0. Raises as `tokens` does."""
        if not self.has_loss_mask:
            return np.ones(stop - start, np.uint8)
        masks = [part.loss_mask[low:high] for part, low, high in self._ranges(start, stop) if part.loss_mask is not None]
        return self._join(masks, np.dtype(np.uint8))

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Positions p in [start, stop) at which a document begins, int64, ascending."""
        pieces: list[np.ndarray] = []
        for shard in range(self.part_at(start), self.num_shards):
            base, end = self.token_base[shard], self.token_base[shard + 1]
            if base >= stop:
                break
            if end > base:
                offsets = self.mapped(shard).offsets[:-1]
                low, high = offsets.searchsorted((start - base, stop - base))
                pieces.append(offsets[low:high] + base)
        return self._join(pieces, np.dtype(np.int64))

    def document(self, index: int) -> np.ndarray:
        """The tokens of document `index`, BOS and EOS included. Raises IndexError."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of split {self.name!r}, which has {self.num_documents}")
        shard = bisect_right(self._document_base, index) - 1
        part = self.mapped(shard)
        local = index - self._document_base[shard]
        return part.tokens[part.offsets[local] : part.offsets[local + 1]]

    def document_lengths(self) -> np.ndarray:
        """The tokens of every document, int32 [num_documents]; reads the whole index."""
        lengths = [np.diff(self.mapped(shard).offsets).astype(np.int32) for shard in range(self.num_shards) if self._parts[shard].documents]
        return self._join(lengths, np.dtype(np.int32))

    def counts(self, vocab_size: int, at_most: int = 1 << 28) -> np.ndarray:
        """How often each id occurs, int64 [vocab_size]; of more than `at_most` tokens, in so many of them, evenly spread.

        Raises StoreError for an id outside the vocabulary: nothing else looks at the ids, which would cost more than to read them.
        """
        total = np.zeros(vocab_size, np.int64)
        piece = 1 << 20
        pieces = -(-self.num_tokens // piece)
        read = min(pieces, max(at_most // piece, 1))
        for number in range(read):
            start = number * pieces // read * piece
            found = np.bincount(self.tokens(start, min(start + piece, self.num_tokens)), minlength=vocab_size)
            if len(found) > vocab_size:
                shard = self._parts[self.part_at(start)].shard.directory
                raise StoreError(
                    f"{shard / TOKENS_FILE}, or a shard soon after it, has the id {len(found) - 1}, the vocabulary has {vocab_size}; "
                    "tokenize the dataset again"
                )
            total += found
        return total

    def split_tail(self, tail_tokens: int) -> tuple[TokenSplit, TokenSplit]:
        """Cuts off the fewest whole documents at the end that hold `tail_tokens` tokens: (what is left, the tail)."""
        left, tail, missing = list(self._parts), [], tail_tokens
        while left and missing > 0:
            part = left.pop()
            if part.tokens > missing:
                before, part = part.cut(part.last_document(missing))
                left.append(before)
            tail.append(part)
            missing -= part.tokens
        return self._of(left), self._of(tail[::-1])

    def joined(self, other: TokenSplit | None) -> TokenSplit:
        """This split and then `other`, which belongs to the same store."""
        return self if other is None else self._of([*self._parts, *other._parts])

    def part_at(self, position: int) -> int:
        """The part that holds the token at `position`; the last one past the end."""
        return max(0, min(bisect_right(self.token_base, position) - 1, self.num_shards - 1))

    def mapped(self, index: int) -> Mapped:
        """The arrays of part `index`, mapped from its files at the first use and kept as long as `MAPPINGS` allows.

        Raises StoreError where a file is missing or has another size, and at the first use where the shard's index is damaged.
        """
        found = self._mapped[index]
        if found is None:
            found = self._mapped[index] = self._map(index)
            MAPPINGS.add(self, index, 2 if found.loss_mask is None else 3)
        return found

    def unmap(self, index: int) -> None:
        """Drops the arrays of part `index`, which are mapped again when they are next used."""
        self._mapped[index] = None

    def _map(self, index: int) -> Mapped:
        part = self._parts[index]
        here = slice(part.first_token, part.first_token + part.tokens)
        tokens = part.shard.values(TOKENS_FILE, self.dtype)[here]
        offsets = part.shard.offsets(checked=not self._checked[index])
        self._checked[index] = True
        offsets = offsets[part.first_document : part.first_document + part.documents + 1]
        if part.first_token:
            offsets = offsets - part.first_token
        if not self.has_loss_mask:
            return Mapped(tokens, offsets, None)
        return Mapped(tokens, offsets, part.shard.values(LOSS_MASK_FILE, np.dtype(np.uint8))[here])

    def _ranges(self, start: int, stop: int) -> list[tuple[Mapped, int, int]]:
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of split {self.name!r}, which has {self.num_tokens}")
        ranges: list[tuple[Mapped, int, int]] = []
        shard = self.part_at(start)
        while start < stop:
            base, end = self.token_base[shard], self.token_base[shard + 1]
            if end > start:
                ranges.append((self.mapped(shard), start - base, min(stop, end) - base))
                start = min(stop, end)
            shard += 1
        return ranges

    def _of(self, parts: Iterable[ShardPart]) -> TokenSplit:
        held = [part for part in parts if part.documents]
        return TokenSplit(self.name, held, self.dtype, has_loss_mask=self.has_loss_mask)

    @staticmethod
    def _join(pieces: list[np.ndarray], dtype: np.dtype[Any]) -> np.ndarray:
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype)


def with_tail(splits: dict[str, TokenSplit], tail_tokens: int, store: str) -> dict[str, TokenSplit]:
    """The splits of a store with the last documents of "train", `tail_tokens` tokens or more, moved behind "validation".

    Raises StoreError where nothing would be left to train on.
    """
    train = splits.get("train")
    if not tail_tokens or train is None:
        return splits
    left, tail = train.split_tail(tail_tokens)
    if not left.num_tokens:
        raise StoreError(
            f"{store} has {train.num_tokens} training tokens, and a tail of {tail_tokens} leaves none; lower holdout_tail for it"
        )
    validation = splits.get("validation")
    return {**splits, "train": left, "validation": validation.joined(tail) if validation else tail}


def _bases(counts: Iterable[int]) -> list[int]:
    bases = [0]
    for count in counts:
        bases.append(bases[-1] + count)
    return bases
