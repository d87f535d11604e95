"""Small vocabularies for tests, trained in a fraction of a second on packaged text."""

from __future__ import annotations

import functools
import json

from model.vocabularies.byte_pairs import byte_pairs_of, tiktoken_file
from tasks.sources.local_files import PACKAGED_TEXTS
from tasks.vocabularies import BytePairTraining, SentencePieceTraining
from tasks.vocabulary import train_byte_pairs, train_sentencepiece


@functools.cache
def small_vocabulary(vocab_size: int = 400) -> bytes:
    """The serialized model, trained on one play."""
    text = (PACKAGED_TEXTS / "shakespeare" / "plays" / "macbeth.txt").read_text(encoding="utf-8")
    return train_sentencepiece(SentencePieceTraining(vocab_size=vocab_size), iter(text.split("\n\n")))


@functools.cache
def small_byte_pairs(vocab_size: int = 600) -> bytes:
    """A tokenizer.json laid out as Llama 3's, trained on one play: BOS and EOS are its last two ids."""
    text = (PACKAGED_TEXTS / "shakespeare" / "plays" / "macbeth.txt").read_text(encoding="utf-8")
    return train_byte_pairs(BytePairTraining(vocab_size=vocab_size), iter(text.split("\n\n")))


@functools.cache
def small_tiktoken(vocab_size: int = 600) -> bytes:
    """The same pairs as a tiktoken file, which has no special tokens."""
    pairs = byte_pairs_of(json.loads(small_byte_pairs(vocab_size)))
    assert pairs is not None
    return tiktoken_file(pairs.ranks)
