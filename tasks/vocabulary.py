"""The tokenizer step: trains a SentencePiece vocabulary on the training documents, or takes one that exists."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import sentencepiece

from model.durable import remove_temporaries, sha256_of, write_durably
from tasks.artifacts import Artifact
from tasks.caching import step_task
from tasks.data_steps import RawFiles, VocabularyFile, VocabularyTraining
from tasks.datasets import Reading, SentencePieceTraining
from tasks.download import naming_originals, raw_files
from tasks.sources import DataError
from tasks.steps import Step
from tasks.text_reader import read_documents, split_of
from tasks.vocabulary_file import inspect_vocabulary

MODEL = "tokenizer.model"
VOCABULARY = "tokenizer.vocab"

# SentencePiece leaves out longer training sentences in silence, so documents are handed over in pieces below it.
_SENTENCE_CHARACTERS = 1 << 16


def train_vocabulary_body(step: Step, directory: Path, inputs: tuple[Artifact, ...]) -> dict[str, Any]:
    """Writes `tokenizer.model` and, for people, `tokenizer.vocab`. Equal inputs give equal bytes.

    Raises DataError where the text is too little for the vocabulary, or the file is not the planned one.
    """
    config = step.config
    remove_temporaries(directory)
    if isinstance(config, VocabularyFile):
        model = _existing(config)
    else:
        assert isinstance(config, VocabularyTraining)
        sources: list[tuple[list[Path], Reading]] = []
        for raw, upstream, reading in zip(inputs, step.upstream, config.readings, strict=True):
            assert isinstance(upstream.config, RawFiles)
            sources.append((raw_files(Path(raw.path), upstream.config), reading))
        with ExitStack() as stack:
            for (files, _), upstream in zip(sources, step.upstream, strict=True):
                assert isinstance(upstream.config, RawFiles)
                stack.enter_context(naming_originals(files, upstream.config))
            sentences = training_sentences(sources, config.training.max_training_bytes)
            if (first := next(sentences, None)) is None:
                raise DataError(f"mixture {step.name!r}: its files hold no training document, only empty or held-out ones; add text")
            model = train_sentencepiece(config.training, chain([first], sentences))
    write_durably(directory / MODEL, model)
    info = inspect_vocabulary(directory / MODEL)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    lines = [f"{_visible(processor.id_to_piece(number))}\t{processor.get_score(number):g}" for number in range(info.vocab_size)]
    write_durably(directory / VOCABULARY, ("\n".join(lines) + "\n").encode())
    return {"vocab_size": info.vocab_size, "bos_id": info.bos_id, "eos_id": info.eos_id, "sha256": info.sha256}


def training_sentences(sources: list[tuple[list[Path], Reading]], max_bytes: int) -> Iterator[str]:
    """Training documents of each source in order, in pieces, up to an equal part of `max_bytes` from each."""
    for files, reading in sources:
        left = max_bytes // len(sources)
        for text in (text for path in files for text in read_documents(path, reading, Counter())):
            if split_of(text, reading.holdout) != "train":
                continue
            left -= len(text.encode())
            # the training refuses U+0000; the vocabulary spells it in bytes like any character it does not have
            for piece in text.split("\0"):
                yield from (piece[start : start + _SENTENCE_CHARACTERS] for start in range(0, len(piece), _SENTENCE_CHARACTERS))
            if left <= 0:
                break


def train_sentencepiece(training: SentencePieceTraining, sentences: Iterator[str]) -> bytes:
    """The serialized model: ids unk 0, bos 1, eos 2, no pad, as Llama has them; text is kept exactly, spaces and all.

    Raises DataError naming vocab_size where the text has not enough different pieces for it.
    """
    writer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=writer,
            vocab_size=training.vocab_size,
            model_type=training.model_type,
            character_coverage=training.character_coverage,
            byte_fallback=training.byte_fallback,
            # more threads add up in another order, and another vocabulary can come out
            num_threads=1,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            # what is decoded must be what was encoded
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=8 * _SENTENCE_CHARACTERS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(
            f"tokenizer.vocab_size={training.vocab_size} cannot be trained on this text: {_remedy(str(error))} ({str(error)[:300]})"
        ) from None
    return writer.getvalue()


def _remedy(message: str) -> str:
    if most := re.search(r"Please set it to a value <= (\d+)", message):
        return f"set it to {most.group(1)} or less, or add text"
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"set it to {least.group(1)} or more, or lower tokenizer.character_coverage"
    return "lower it, or add text"


def _existing(config: VocabularyFile) -> bytes:
    path = Path(config.path).expanduser()
    inspect_vocabulary(path)
    if (found := sha256_of(path)) != config.sha256:
        raise DataError(
            f"tokenizer path={config.path!r} changed since the run was planned ({config.sha256[:16]}, now {found[:16]}); run again"
        )
    return path.read_bytes()


def _visible(piece: str) -> str:
    return piece.encode("unicode_escape").decode() if not piece.isprintable() else piece


train_vocabulary = step_task(description="Train or take the vocabulary")(train_vocabulary_body)
