"""What a vocabulary is trained on: training documents only, up to a budget of text and of different words."""

from __future__ import annotations

import json
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from model.vocabularies.vocabulary import Vocabulary
from tasks.mixture_config import Reading
from tasks.readers.conversation import encode_answers
from tasks.readers.text_reader import read_documents, split_of
from tasks.sources.source_file import DataError

# SentencePiece leaves out longer training sentences in silence, so documents are handed over in pieces below it.
SENTENCE_CHARACTERS = 1 << 16
# How much text a token of a held-out tail is taken for before there is a vocabulary to count with.
_BYTES_PER_TOKEN = 5.0
# Each time that there are too many different words, this share of the text is kept.
_KEPT_SHARE = 0.8
_HASHES = 1 << 32


@dataclass
class TextSource:
    """The training documents of a dataset: without those held out by a hash, and without those of its tail.

    tail_tokens: how many tokens at the end are held out. In tokens of the vocabulary that is yet to be trained, so the end that is
    left out is estimated, and `tail_is_left_out` tells whether it was enough.
    """

    name: str
    files: list[Path]
    reading: Reading
    tail_tokens: int = 0
    used: int = 0  # documents that were handed out
    _usable: int | None = field(default=None, init=False)  # bytes from the first document on; None: all

    def documents(self) -> Iterator[str]:
        """The documents in the order of the token store, with the tail. Raises DataError, with how to see all that is wrong."""
        try:
            for path in self.files:
                for document in read_documents(path, self.reading):
                    if split_of(document, self.reading.holdout) == "train":
                        yield document
        except DataError as error:
            if self.reading.on_bad_document == "skip":
                raise
            raise DataError(
                f"{error}. Training the vocabulary stops at the first bad document; with on_bad_document='skip' it goes on, and the "
                "token store's skipped/ then lists them"
            ) from None

    def texts(self, max_bytes: int) -> Iterator[str]:
        """What the documents say, in order, until it has `max_bytes`. Raises DataError where the tail leaves nothing."""
        if self.tail_tokens and self._usable is None:
            self._leave_out(_BYTES_PER_TOKEN, max_bytes, at_most_half=True)
        self.used = passed = said = 0
        for document in self.documents():
            passed += len(document.encode())
            if self._usable is not None and passed > self._usable:
                return
            self.used += 1
            for text in [document] if self.reading.answers is None else _said(document):
                said += len(text.encode())
                yield text
            if said >= max_bytes:
                return

    def tail_is_left_out(self, vocabulary: Vocabulary, max_bytes: int) -> bool:
        """Whether the documents behind those that were handed out hold the tail, counted with `vocabulary`; leaves out more if not.

        Raises DataError where there is no more to leave out.
        """
        if not self.tail_tokens:
            return True
        tokens = size = 0
        for number, document in enumerate(self.documents()):
            if number < self.used:
                continue
            tokens += _count(document, self.reading, vocabulary)
            size += len(document.encode())
            if tokens >= self.tail_tokens:
                return True
        # a little more, since one text has longer tokens than another
        self._leave_out(1.1 * size / max(tokens, 1), max_bytes, at_most_half=False)
        return False

    def _leave_out(self, bytes_per_token: float, max_bytes: int, *, at_most_half: bool) -> None:
        """Decides how many bytes of documents may be used. Reads no more than tell whether the tail matters."""
        tail, total = int(self.tail_tokens * bytes_per_token) + 1, 0
        for document in self.documents():
            total += len(document.encode())
            if total >= max_bytes + tail:
                break
        self._usable = total - (min(tail, total // 2) if at_most_half else tail)
        if self._usable <= 0:
            raise DataError(
                f"dataset {self.name!r}: holdout_tail={self.tail_tokens} leaves no document to train the vocabulary on, of about "
                f"{int(total / bytes_per_token)} tokens; lower it, or use a tokenizer that exists"
            )


def training_sentences(sources: Sequence[TextSource], max_bytes: int) -> Iterator[str]:
    """Training documents of each source in order, in pieces, up to an equal part of `max_bytes` from each.

    Of questions and answers, what is said, without the JSON around it.
    """
    for source in sources:
        for text in source.texts(max_bytes // len(sources)):
            yield from (text[start : start + SENTENCE_CHARACTERS] for start in range(0, len(text), SENTENCE_CHARACTERS))


def tails_are_left_out(sources: Sequence[TextSource], vocabulary: Vocabulary, max_bytes: int) -> bool:
    """Whether `vocabulary` was trained on no document of a tail; the next `training_sentences` leave out more if not."""
    left_out = [source.tail_is_left_out(vocabulary, max_bytes // len(sources)) for source in sources]
    return all(left_out)


def within_budget(sentences: Iterable[str], words: Callable[[str], Iterable[str]], max_characters: int) -> tuple[deque[str], float]:
    """The sentences, or an even sample of them whose different words have `max_characters` at most; and the share that was kept.

    What training needs in memory grows with its different words, of which random text, or text without spaces, has as many as it
    has words. A sentence stays or goes by a hash of it, so the same text always gives the same sample.
    """
    kept: deque[str] = deque()
    known: set[str] = set()
    characters, share = 0, 1.0

    def add(sentence: str) -> None:
        nonlocal characters
        kept.append(sentence)
        new = set(words(sentence)).difference(known)
        known.update(new)
        characters += sum(map(len, new)) + len(new)

    for sentence in sentences:
        if not _is_kept(sentence, share):
            continue
        add(sentence)
        while characters > max_characters and len(kept) > 1:
            share *= _KEPT_SHARE
            staying = [held for held in kept if _is_kept(held, share)] or [kept[0]]
            kept.clear()
            known.clear()
            characters = 0
            for held in staying:
                add(held)
    return kept, share


def handed_over(sentences: deque[str]) -> Iterator[str]:
    """The sentences, each let go of as it is handed over: who takes it keeps a copy."""
    while sentences:
        yield sentences.popleft()


def _is_kept(sentence: str, share: float) -> bool:
    return share == 1 or zlib.crc32(sentence.encode()) < share * _HASHES


def _count(document: str, reading: Reading, vocabulary: Vocabulary) -> int:
    """The tokens of a document in the token store, with BOS and EOS."""
    try:
        if reading.answers is not None:
            return len(encode_answers(document, reading.answers, vocabulary)[0])
        return len(vocabulary.encode(document)) + (vocabulary.bos_id is not None) + 1
    except ValueError:
        return 0  # what cannot be encoded is in no token store


def _said(document: str) -> list[str]:
    """The texts of a conversation, or of a prompt and its completion."""
    value = json.loads(document)
    return [value["prompt"], value["completion"]] if isinstance(value, dict) else [message["content"] for message in value]
