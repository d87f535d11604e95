"""A small SentencePiece vocabulary for tests, trained in a fraction of a second on packaged text."""

from __future__ import annotations

import functools

from tasks.datasets import SentencePieceTraining
from tasks.sources import PACKAGED_TEXTS
from tasks.vocabulary import train_sentencepiece


@functools.cache
def small_vocabulary(vocab_size: int = 400) -> bytes:
    """The serialized model, trained on one play."""
    text = (PACKAGED_TEXTS / "shakespeare" / "plays" / "macbeth.txt").read_text(encoding="utf-8")
    return train_sentencepiece(SentencePieceTraining(vocab_size=vocab_size), iter(text.split("\n\n")))
