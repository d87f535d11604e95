"""A split of a token store as one stream of tokens: document after document, shard after shard, read by index.

A split can be cut between documents and joined with another; nothing is copied by that.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from model.token_writer import BYTES_FILE, LOSS_MASK_FILE, OFFSETS_FILE, TOKENS_FILE, ShardLedger, StoreError

# A mapped file holds a descriptor, two or three to a shard; the usual limit of a process is 1024.
MAX_MAPPED_SHARDS = 128


@dataclass(frozen=True)
class ShardPart:
    """Some documents of one shard, from document `first_document` on, which begins at token `first_token` of the shard."""

    directory: Path
    documents: int
    tokens: int
    source_bytes: int
    first_document: int = 0
    first_token: int = 0

    @classmethod
    def whole(cls, directory: Path, ledger: ShardLedger) -> ShardPart:
        """All of a shard."""
        return cls(directory, ledger.documents, ledger.tokens, ledger.source_bytes)

    def cut(self, document: int) -> tuple[ShardPart, ShardPart]:
        """What lies before, and from, the part's document number `document`. Reads the shard's index."""
        offsets = np.load(self.directory / OFFSETS_FILE, mmap_mode="r", allow_pickle=False)
        sizes = np.load(self.directory / BYTES_FILE, mmap_mode="r", allow_pickle=False)
        border = self.first_document + document
        tokens = int(offsets[border]) - self.first_token
        size = int(sizes[self.first_document : border].sum(dtype=np.int64))
        left = replace(self, documents=document, tokens=tokens, source_bytes=size)
        right = ShardPart(
            self.directory, self.documents - document, self.tokens - tokens, self.source_bytes - size, border, self.first_token + tokens
        )
        return left, right


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
        self._mapped: OrderedDict[int, Mapped] = OrderedDict()

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
        """How often each id occurs, int64 [vocab_size]; of more than `at_most` tokens, in so many of them, evenly spread."""
        total = np.zeros(vocab_size, np.int64)
        piece = 1 << 20
        pieces = -(-self.num_tokens // piece)
        read = min(pieces, max(at_most // piece, 1))
        for number in range(read):
            start = number * pieces // read * piece
            total += np.bincount(self.tokens(start, min(start + piece, self.num_tokens)), minlength=vocab_size)
        return total

    def split_tail(self, tail_tokens: int) -> tuple[TokenSplit, TokenSplit]:
        """Cuts off the fewest whole documents at the end that hold `tail_tokens` tokens: (what is left, the tail)."""
        left, tail, missing = list(self._parts), [], tail_tokens
        while left and missing > 0:
            part = left.pop()
            if part.tokens > missing:
                offsets = np.load(part.directory / OFFSETS_FILE, mmap_mode="r", allow_pickle=False)
                border = part.first_token + part.tokens - missing
                document = int(offsets.searchsorted(border, side="right")) - 1 - part.first_document
                before, part = part.cut(document)
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
        """The arrays of part `index`, mapped from its files, and kept while they are among the last that were used."""
        found = self._mapped.get(index)
        if found is not None:
            self._mapped.move_to_end(index)
            return found
        self._mapped[index] = self._map(self._parts[index])
        if len(self._mapped) > MAX_MAPPED_SHARDS:
            self._mapped.popitem(last=False)
        return self._mapped[index]

    def _map(self, part: ShardPart) -> Mapped:
        # plain views: slicing an np.memmap itself costs ten times as much per call
        here = slice(part.first_token, part.first_token + part.tokens)
        tokens = np.asarray(np.memmap(part.directory / TOKENS_FILE, self.dtype, "r"))[here]
        offsets = np.asarray(np.load(part.directory / OFFSETS_FILE, mmap_mode="r", allow_pickle=False))
        offsets = offsets[part.first_document : part.first_document + part.documents + 1]
        if part.first_token:
            offsets = offsets - part.first_token
        if not self.has_loss_mask:
            return Mapped(tokens, offsets, None)
        return Mapped(tokens, offsets, np.asarray(np.memmap(part.directory / LOSS_MASK_FILE, np.uint8, "r"))[here])

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
