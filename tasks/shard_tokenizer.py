"""One shard of a token store from one or more text files: read, split, encode, put BOS and EOS around, write, commit.

The fast way for plain text and conversations; its ids are those SeqIO yields for the same files. A shard is a pure function
of its files, its reading and the tokenizer, so it can be made anywhere, any number of times.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from model.config_base import Config
from model.durable import write_durably
from model.token_store import TokenStoreWriter
from model.token_writer import ShardLedger, ShardWriter
from model.vocabularies.accelerated_encoder import CheckedEncoder, EncoderMismatch
from model.vocabularies.vocabulary import TextTooLong, Vocabulary
from tasks.mixture_config import Reading
from tasks.readers.chat_template import UnusableConversation
from tasks.readers.conversation import encode_answers
from tasks.readers.text_reader import Skipped, read_documents, split_of
from tasks.sources import DataError

# Texts are handed to the encoder by so many characters: enough to fill its threads, little enough to bound memory with its
# results. Each text counts for some more, since a text and its ids are objects, however short.
BATCH_BYTES = 4 << 20
_TEXT_BYTES = 64
SKIPPED = "skipped"  # below the store: where bad documents are, a file a shard
_loading = threading.Lock()


class StoreSpec(Config):
    """A token store to write, and with which tokenizer; the same for all of its shards."""

    directory: str
    tokenizer: str
    digest: str
    reading: Reading
    source_root: str = ""
    accelerator: Literal["auto", "none"] = "auto"


class ShardJob(Config):
    """One shard. `key` identifies its input and how it is read: equal key, equal output. `source_bytes` is for progress."""

    shard: int
    of: int
    key: str
    files: tuple[str, ...]
    source_bytes: int


class ShardResult(Config):
    """What became of a shard."""

    shard: int
    documents: int
    tokens: int
    source_bytes: int
    kept: bool
    skipped: dict[str, int] = Field(default={})
    places: tuple[str, ...] = ()
    warning: str | None = None


class Stopped(Exception):
    """Told to stop while reading; the shard is not committed."""


def splits_of(reading: Reading) -> tuple[str, ...]:
    """The splits that a reading can fill."""
    if reading.holdout == 0:
        return ("train",)
    return ("validation",) if reading.holdout == 1 else ("train", "validation")


def write_shard(spec: StoreSpec, job: ShardJob, stopping: Callable[[], bool] = lambda: False) -> ShardResult:
    """Writes one shard in all its splits, unless it is there with its key and hashes.

    Raises DataError for text that cannot be used, naming file and record; OSError where the disk is full or closed;
    Stopped where `stopping()` says so. Whatever ends it leaves no half-written shard.
    """
    with _loading:
        vocabulary, encoder = _encoder(spec.tokenizer, spec.digest, spec.accelerator)
    if stopping():
        raise Stopped
    writer = store_writer(Path(spec.directory), vocabulary, loss_mask=spec.reading.answers is not None)
    ledgers = [writer.committed(split, job.shard, job.of, job.key) for split in splits_of(spec.reading)]
    finished = [ledger for ledger in ledgers if ledger is not None]
    if len(finished) == len(ledgers):
        return _result(job, finished, kept=True)
    try:
        return _write(writer, vocabulary, encoder, spec, job, stopping)
    except EncoderMismatch as mismatch:
        # from here on the encoder uses its reference alone
        result = _write(writer, vocabulary, encoder, spec, job, stopping)
        return result.model_copy(update={"warning": f"{mismatch}: this shard was encoded with the reference encoder instead"})


def store_writer(directory: Path, vocabulary: Vocabulary, *, loss_mask: bool) -> TokenStoreWriter:
    """The writer of a store for that tokenizer."""
    return TokenStoreWriter(
        directory,
        vocab_size=vocabulary.vocab_size,
        bos_id=vocabulary.bos_id,
        eos_id=vocabulary.eos_id,
        tokenizer_digest=vocabulary.digest,
        loss_mask=loss_mask,
    )


def _result(job: ShardJob, parts: Sequence[ShardLedger | ShardWriter], *, kept: bool) -> ShardResult:
    documents, tokens = sum(part.documents for part in parts), sum(part.tokens for part in parts)
    skipped = {reason: count for part in parts for reason, count in part.skipped.items() if reason != "empty"}
    return ShardResult(shard=job.shard, documents=documents, tokens=tokens, source_bytes=job.source_bytes, kept=kept, skipped=skipped)


def _write(
    writer: TokenStoreWriter,
    vocabulary: Vocabulary,
    encoder: CheckedEncoder,
    spec: StoreSpec,
    job: ShardJob,
    stopping: Callable[[], bool],
) -> ShardResult:
    def look() -> None:
        if stopping():
            raise Stopped

    skipped = Skipped()
    with ExitStack() as stack:
        shards = {split: stack.enter_context(writer.shard(split, job.shard, job.of, job.key)) for split in splits_of(spec.reading)}
        batches = {split: _Batch(shard, vocabulary, encoder, spec.reading) for split, shard in shards.items()}
        for path in job.files:
            for number, text in enumerate(read_documents(path, spec.reading, skipped, look), start=1):
                try:
                    batches[split_of(text, spec.reading.holdout)].add(text)
                except (UnusableConversation, TextTooLong) as error:
                    place = f"{path} {'document' if spec.reading.answers is None else 'conversation'} {number}"
                    if spec.reading.on_bad_document == "fail":
                        raise DataError(f"{place} (it begins with {text[:40]!r}): {error}, or set on_bad_document='skip'") from None
                    skipped.note("too_long" if isinstance(error, TextTooLong) else "unusable", place)
        for batch in batches.values():
            batch.flush()
        # every document is read once, so what is skipped is counted once
        next(iter(shards.values())).skipped = dict(skipped)
        places = _write_places(spec, job, skipped)
    return _result(job, list(shards.values()), kept=False).model_copy(update={"places": places})


def _write_places(spec: StoreSpec, job: ShardJob, skipped: Skipped) -> tuple[str, ...]:
    """Keeps where the first bad documents of a shard are, by the names of the source files, and returns them."""
    file = Path(spec.directory) / SKIPPED / f"shard-{job.shard:05d}-of-{job.of:05d}.txt"
    places = tuple(place.removeprefix(f"{spec.source_root}/") for place in skipped.places)
    if places:
        file.parent.mkdir(exist_ok=True)
        write_durably(file, "".join(f"{place}\n" for place in places).encode())
    else:
        file.unlink(missing_ok=True)
    return places


class _Batch:
    """Documents of one split on their way to the encoder."""

    def __init__(self, shard: ShardWriter, vocabulary: Vocabulary, encoder: CheckedEncoder, reading: Reading) -> None:
        self._shard, self._vocabulary, self._encoder, self._answers = shard, vocabulary, encoder, reading.answers
        self._texts: list[str] = []
        self._characters = 0

    def add(self, text: str) -> None:
        """Takes a document. Raises UnusableConversation for one that cannot be rendered, TextTooLong for one that cannot be encoded."""
        self._characters += len(text) + _TEXT_BYTES
        if self._answers is not None:
            ids, mask = encode_answers(text, self._answers, self._vocabulary)
            self._shard.add(ids, len(text.encode()), mask)
        else:
            self._vocabulary.check_length(text)
            self._texts.append(text)
        if self._characters >= BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Encodes and writes what is there."""
        texts, self._texts, self._characters = self._texts, [], 0
        if texts:
            first = self._shard.documents
            ids, lengths = self._encoder.encode_batch(texts)
            sizes = np.fromiter((len(text) if text.isascii() else len(text.encode()) for text in texts), np.int64, len(texts))
            with_both = with_special_ids(ids, lengths, self._vocabulary.bos_id, self._vocabulary.eos_id, first)
            self._shard.add_batch(*with_both, sizes)


def with_special_ids(
    ids: np.ndarray, lengths: np.ndarray, bos_id: int | None, eos_id: int, first: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Documents [total] of `lengths` [N] with BOS (where there is one) before and EOS after each: (ids, lengths).

    `first` is the number of the first of them, for the message.
    Raises DataError where a document holds one of them already: the tokenizer must not make them from text.
    """
    for name, value in (("BOS", bos_id), ("EOS", eos_id)):
        if value is not None and (found := np.flatnonzero(ids == value)).size:
            document = int(np.searchsorted(np.cumsum(lengths), found[0], side="right"))
            raise DataError(
                f"the tokenizer makes {name} (id {value}) out of the text of document {first + document} of the shard: in its file "
                f"{name} is an ordinary piece; make it a control token there, or name another token as {name.lower()}_token"
            )
    before = 0 if bos_id is None else 1
    longer = lengths + (before + 1)
    ends = np.cumsum(longer)
    result = np.empty(int(ends[-1]) if len(ends) else 0, ids.dtype)
    own = np.ones(len(result), bool)
    own[ends - 1] = False
    result[ends - 1] = eos_id
    if bos_id is not None:
        own[ends - longer] = False
        result[ends - longer] = bos_id
    result[own] = ids
    return result, longer


@functools.lru_cache(maxsize=2)
def _encoder(tokenizer: str, digest: str, accelerator: Literal["auto", "none"]) -> tuple[Vocabulary, CheckedEncoder]:
    """The tokenizer of a store and its encoder, shared by the threads of this process: loading one takes a good part of a second.

    Raises DataError where the directory has another tokenizer.
    """
    vocabulary = Vocabulary.open(Path(tokenizer))
    if vocabulary.digest != digest:
        raise DataError(f"tokenizer {tokenizer} is {vocabulary.digest[:16]}, planned was {digest[:16]}; run its step again")
    return vocabulary, CheckedEncoder(vocabulary, accelerator)
