"""Encoders that are faster than a vocabulary's own library: tiktoken and (optional) gigatoken. Their ids are to be checked."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model.vocabularies.byte_pairs import BytePairs
from model.vocabularies.text_borders import LONG_TEXT
from model.vocabularies.tiktoken_vocabulary import encode_or_none, is_library_failure, tiktoken_encoding

# How much the process may grow for an object of gigatoken's, for so many objects, before they are made anew, and between
# how many characters of text that happens.
_GROWTH_BYTES, _GROWING_OBJECTS = 256 << 20, 4
_LEAST_CHARACTERS, _MOST_CHARACTERS = 16 << 20, 64 << 20
# A text with fewer spaces than one for so many characters is all one word to SentencePieceByTiktoken.
_ONE_WORD = 64
# A long text with a word of so many characters is left to the library too, which takes less memory.
_LONG_WORD = 1 << 16
# Working threads up to which `encode` is called: two that take turns at it do as much as two that call `encode_batch`.
_TAKING_TURNS = 2


class TiktokenEncoder:
    """tiktoken over the tables of a tokenizer.json."""

    name = "tiktoken"

    def __init__(self, pairs: BytePairs) -> None:
        """Raises ValueError where its regular expressions cannot spell the pattern."""
        self._encoding = tiktoken_encoding(pairs)
        self._loaded = True

    def encode_each(self, texts: Sequence[str]) -> tuple[list[np.ndarray | None], bool]:
        """See FastEncoder."""
        loaded, self._loaded = self._loaded, False
        return [encode_or_none(self._encoding, text) for text in texts], loaded


class SentencePieceByTiktoken:
    """tiktoken over the tables of a SentencePiece model: three times as fast as its own library on text with spaces.

    Where there are few, as in Chinese, a text is all one word, which is slower than the library is: those are left to it.
    """

    name = "tiktoken"

    def __init__(self, pairs: BytePairs, ids: list[list[int]]) -> None:
        """`ids` are those that each rank stands for, as SentencePieceJson.byte_pairs gives them."""
        self._encoding = tiktoken_encoding(pairs)
        self._ids = np.asarray([one for several in ids for one in several], np.uint32)
        self._lengths = np.asarray([len(several) for several in ids], np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._first = self._ids[self._starts]
        self._loaded = True

    def encode_each(self, texts: Sequence[str]) -> tuple[list[np.ndarray | None], bool]:
        """See FastEncoder."""
        loaded, self._loaded = self._loaded, False
        return [self._encode(text) for text in texts], loaded

    def _encode(self, text: str) -> np.ndarray | None:
        if not text:
            return np.empty(0, np.uint32)
        if len(text) > _ONE_WORD and (text.count(" ") * _ONE_WORD < len(text) or has_long_word(text)):
            return None
        ranks = encode_or_none(self._encoding, f" {text}".replace("\u2581", " "))
        if ranks is None:
            return None
        lengths = self._lengths[ranks]
        total = int(lengths.sum())
        if total == len(ranks):
            return self._first[ranks]
        # where each rank's ids begin in the table, less where they begin in the result
        shifts = self._starts[ranks] - (np.cumsum(lengths) - lengths)
        return self._ids[np.repeat(shifts, lengths) + np.arange(total)]


def has_long_word(text: str) -> bool:
    """Whether a long text has a word, by its spaces, of more than 65,536 characters."""
    if len(text) <= LONG_TEXT:
        return False
    start = 0
    while len(text) - start > _LONG_WORD:
        space = text.rfind(" ", start, start + _LONG_WORD + 1)
        if space < 0:
            return True
        start = space + 1
    return False


class FlatIds(Sequence[np.ndarray]):
    """Ids of many texts in one array, as they come out of a library: a sequence of views that are made when asked for."""

    def __init__(self, ids: np.ndarray, ends: np.ndarray) -> None:
        """`ids` uint32 [total]; `ends` [texts + 1] begins with 0."""
        self.ids, self.ends = ids, ends

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: Any) -> Any:
        return self.ids[self.ends[index] : self.ends[index + 1]]


class GigatokenEncoder:
    """gigatoken over a tokenizer.json without special tokens.

    The library keeps every piece of text that it has seen, without bound (ten bytes for a byte of new words), so its
    object is made anew (0.1 to 0.6 s) where the process has grown by 256 MiB for each of them, 1 GiB for all, at the
    earliest after 16 MiB of text; where the system does not tell its size, after 64 MiB of text.

    Each object serves one thread at a time. Its `encode` remembers across calls but holds the interpreter; its
    `encode_batch`, for many threads and for byte pairs, lets go of it and costs more processor time on SentencePiece, less
    on byte pairs, whose ids then stay in one array. Same ids.
    """

    name = "gigatoken"
    _working = 0  # threads of the process that encode at this moment, by any object
    _working_lock = threading.Lock()

    def __init__(self, tokenizer_json: str, *, byte_pairs: bool = False) -> None:
        """Raises ImportError where it is not installed, ValueError where it cannot read the tokenizer."""
        self._json, self._byte_pairs = tokenizer_json, byte_pairs
        self._lock = threading.Lock()
        self._idle = [self._load()]

    def _load(self) -> _Loaded:
        import gigatoken

        try:
            return _Loaded(gigatoken.Tokenizer.from_json(self._json).backend)
        except BaseException as error:
            if not is_library_failure(error):
                raise
            raise ValueError(f"gigatoken cannot read the tokenizer ({str(error).splitlines()[0][:200]})") from None

    def encode_each(self, texts: Sequence[str]) -> tuple[Sequence[np.ndarray | None], bool]:
        """See FastEncoder."""
        chosen = None if self._byte_pairs else [index for index, text in enumerate(texts) if not has_long_word(text)]
        if chosen is not None and len(chosen) < len(texts):
            results, fresh = self._encode([texts[index] for index in chosen])
            spread: list[np.ndarray | None] = [None] * len(texts)
            for index, ids in zip(chosen, results, strict=True):
                spread[index] = ids
            return spread, fresh
        return self._encode(texts)

    def _encode(self, texts: Sequence[str]) -> tuple[Sequence[np.ndarray | None], bool]:
        with self._lock:
            loaded = self._idle.pop() if self._idle else None
        loaded = loaded or self._load()
        fresh = loaded.characters == 0
        with self._working_lock:
            GigatokenEncoder._working += 1
            together = self._byte_pairs or self._working > _TAKING_TURNS
        try:
            results = loaded.encode(texts, together=together)
        finally:
            with self._working_lock:
                GigatokenEncoder._working -= 1
        with self._lock:
            if loaded.is_full():
                self._idle.clear()
            else:
                self._idle.append(loaded)
        return results, fresh


class _Loaded:
    """One object of gigatoken's, how much text it was given, and how large the process was when it was made."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.characters = 0
        self._resident_bytes = resident_bytes()
        _live.add(self)

    def encode(self, texts: Sequence[str], *, together: bool) -> Sequence[np.ndarray | None]:
        self.characters += sum(map(len, texts)) + 1
        together = together and len(texts) > 0
        try:
            if not together:
                return [self._backend.encode(text) for text in texts]
            layout = self._backend.encode_batch(list(texts), parallel=False).layout
            return FlatIds(np.asarray(layout.content.data), np.asarray(layout.offsets.data))
        except BaseException as error:
            if not is_library_failure(error):
                raise
            return [None] * len(texts)

    def is_full(self) -> bool:
        """Whether its memory of pieces may have grown too large."""
        now = resident_bytes()
        if now is None or self._resident_bytes is None:
            return self.characters >= _MOST_CHARACTERS
        return self.characters >= _LEAST_CHARACTERS and now - self._resident_bytes >= _GROWTH_BYTES * min(len(_live), _GROWING_OBJECTS)


_live: weakref.WeakSet[_Loaded] = weakref.WeakSet()


def resident_bytes() -> int | None:
    """The memory of this process now, or None where /proc does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None
