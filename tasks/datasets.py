"""Declaring data: the configuration classes, the packaged mixture, and one's own text. No heavy import."""

from __future__ import annotations

from tasks.mixture_config import Chat, Dataset, Mixture, PromptCompletion, Reading, SimulatedEpoching, WeightsFrom, check_name
from tasks.sources import DataError, check_sources
from tasks.vocabularies import (
    BytePairTraining,
    ByteTokenizer,
    HuggingFaceFile,
    SentencePieceFile,
    SentencePieceTraining,
    TiktokenFile,
    Tokenizer,
)

__all__ = [
    "BytePairTraining",
    "ByteTokenizer",
    "Chat",
    "DataError",
    "Dataset",
    "HuggingFaceFile",
    "Mixture",
    "PromptCompletion",
    "Reading",
    "SentencePieceFile",
    "SentencePieceTraining",
    "SimulatedEpoching",
    "TiktokenFile",
    "Tokenizer",
    "WeightsFrom",
    "check_name",
    "check_sources",
    "own_text_mixture",
    "shakespeare_mixture",
]


def shakespeare_mixture() -> Mixture:
    """The packaged default: thirteen plays and the sonnets, with a vocabulary of 2,048 pieces trained on them.

    BPE, because on this text it trains in 0.2 s and gives 2.97 bytes a token, where unigram takes 3.4 s for 3.00.
    """
    plays = Dataset(
        name="plays",
        source="package:shakespeare/plays/*.txt",
        document="paragraph",
        min_document_bytes=2000,
        holdout=0.05,
    )
    # a sonnet's number is a paragraph of its own: 500 bytes join it to its sonnet, and no sonnet to the next
    sonnets = Dataset(
        name="sonnets",
        source="package:shakespeare/sonnets/*.txt",
        document="paragraph",
        min_document_bytes=500,
        holdout=0.1,
    )
    return Mixture(name="shakespeare", datasets=(plays, sonnets), weights={"plays": 0.9, "sonnets": 0.1}, tokenizer=SentencePieceTraining())


def own_text_mixture(sources: tuple[str, ...], tokenizer: Tokenizer) -> Mixture:
    """A mixture of one dataset, `text`, over files of one's own: records by the key `text`, everything else as plain text.

    Plain text is cut at blank lines into documents of 2,000 bytes or more; a twentieth is held out.
    """
    dataset = Dataset(name="text", source=sources, holdout=0.05, document="paragraph", min_document_bytes=2000)
    return Mixture(name="text", datasets=(dataset,), weights={"text": 1.0}, tokenizer=tokenizer)
