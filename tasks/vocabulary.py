"""The tokenizer step: trains a vocabulary on the training documents, or takes one that exists."""

from __future__ import annotations

import io
import json
import re
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

from model.durable import remove_temporaries, write_durably
from model.vocabularies.byte_pairs import BytePairs, byte_pairs_of, tokenizer_json
from model.vocabularies.huggingface_vocabulary import HuggingFaceVocabulary
from model.vocabularies.sentencepiece_vocabulary import SentencePieceVocabulary
from model.vocabularies.vocabulary import FILES, Vocabulary
from tasks.artifacts import Artifact
from tasks.caching import run_logger, step_task
from tasks.data_steps import RawFiles, VocabularyFile, VocabularyTraining
from tasks.download import naming_originals, raw_files
from tasks.sources.local_files import is_local
from tasks.sources.source_file import DataError
from tasks.steps import Step
from tasks.vocabularies import BytePairTraining, ByteTokenizer, SentencePieceTraining, TokenizerFile, TokenizerTraining
from tasks.vocabulary_file import open_tokenizer
from tasks.vocabulary_text import SENTENCE_CHARACTERS, TextSource, handed_over, tails_are_left_out, training_sentences, within_budget

MODEL = FILES["sentencepiece"]
LISTING = "tokenizer.vocab"
# Llama 3's, with their ids after all others
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"

# How many characters the different words of a training text may have. Measured: a character takes SentencePiece 55 bytes, whatever
# the model, and the trainer of byte pairs 100; with these, training on random words stays at 500 MB in all.
_SENTENCEPIECE_CHARACTERS = 6_000_000
_BYTE_PAIR_CHARACTERS = 3_500_000
# About what Llama 3's pattern cuts text into.
_PARTS = re.compile(r"[^\W\d_]+|\d{1,3}|[^\w\s]+|_+")


def train_vocabulary_body(step: Step, directory: Path, inputs: tuple[Artifact, ...]) -> dict[str, Any]:
    """Makes a tokenizer directory: the tokenizer's file, vocabulary.json and, for people, tokenizer.vocab.

    Equal inputs give equal bytes. Raises DataError where the text is too little for the vocabulary, or the file is not the
    planned one.
    """
    config = step.config
    remove_temporaries(directory)
    if isinstance(config, VocabularyFile):
        vocabulary = _existing(config, directory)
    else:
        assert isinstance(config, VocabularyTraining)
        vocabulary = _trained(config, step, directory, inputs)
    names = vocabulary.names()
    if names:
        write_durably(directory / LISTING, "".join(f"{_visible(name)}\t{number}\n" for number, name in enumerate(names)).encode())
    vocabulary.write(directory)
    return {"vocab_size": vocabulary.vocab_size, "bos_id": vocabulary.bos_id, "eos_id": vocabulary.eos_id, "digest": vocabulary.digest}


def _trained(config: VocabularyTraining, step: Step, directory: Path, inputs: tuple[Artifact, ...]) -> Vocabulary:
    sources: list[TextSource] = []
    budget = config.training.max_training_bytes
    with ExitStack() as stack:
        for raw, upstream, reading, tail in zip(inputs, step.upstream, config.readings, config.holdout_tails, strict=True):
            assert isinstance(upstream.config, RawFiles)
            files = raw_files(Path(raw.path), upstream.config)
            sources.append(TextSource(upstream.name, files, reading, tail))
            stack.enter_context(naming_originals(files, upstream.config))
        while True:
            sentences = training_sentences(sources, budget)
            if (first := next(sentences, None)) is None:
                raise DataError(f"mixture {step.name!r}: its files hold no training document, only empty or held-out ones; add text")
            vocabulary = _train(config.training, directory, chain([first], sentences))
            if tails_are_left_out(sources, vocabulary, budget):
                return vocabulary
            run_logger().info("%s: training the vocabulary again, with more text left out for the held-out tails", step.name)


def _train(training: TokenizerTraining, directory: Path, sentences: Iterable[str]) -> Vocabulary:
    if isinstance(training, SentencePieceTraining):
        path = directory / FILES["sentencepiece"]
        write_durably(path, train_sentencepiece(training, sentences))
        return SentencePieceVocabulary.from_file(path)
    path = directory / FILES["huggingface"]
    write_durably(path, train_byte_pairs(training, sentences))
    return HuggingFaceVocabulary.from_file(path, bos_token=BOS, eos_token=EOS)


def train_sentencepiece(training: SentencePieceTraining, sentences: Iterable[str]) -> bytes:
    """The serialized model: ids unk 0, bos 1, eos 2, no pad, as Llama has them; text is kept exactly, spaces and all.

    Of text with more different words than fit into about 500 MB, an even sample is trained on.
    Raises DataError naming vocab_size where the text has not enough different pieces for it, and what `sentences` raises.
    """
    import sentencepiece

    text = _sampled(sentences, _words, _SENTENCEPIECE_CHARACTERS)
    writer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=handed_over(text),
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
            max_sentence_length=8 * SENTENCE_CHARACTERS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(
            f"tokenizer.vocab_size={training.vocab_size} cannot be trained on this text: {_remedy(str(error))} ({str(error)[:300]})"
        ) from None
    return writer.getvalue()


def train_byte_pairs(training: BytePairTraining, sentences: Iterable[str]) -> bytes:
    """A tokenizer.json laid out as Llama 3's: the 256 bytes, then what they are joined to in that order, then BOS and EOS.

    The library's counts are whole numbers and its ties are broken by id, so that any number of threads trains the same.
    Of text with more different words than fit into about 500 MB, an even sample is trained on.
    Raises DataError naming vocab_size where the text has not enough pairs for it, or pattern where that is none.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    try:
        split = pre_tokenizers.Split(Regex(training.pattern), "isolated")
    except Exception as error:  # the library raises Exception itself
        raise DataError(f"tokenizer.pattern={training.pattern!r} is not a regular expression ({error}); correct it") from None
    tokenizer = Tokenizer(models.BPE())
    bytes_step = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_step])
    special = {BOS: training.vocab_size - 2, EOS: training.vocab_size - 1}
    trainer = trainers.BpeTrainer(
        vocab_size=training.vocab_size - len(special), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(handed_over(_sampled(sentences, _PARTS.findall, _BYTE_PAIR_CHARACTERS)), trainer)
    pairs = byte_pairs_of(json.loads(tokenizer.to_str()))
    assert pairs is not None
    if (found := len(pairs.ranks) + len(special)) < training.vocab_size:
        raise DataError(
            f"tokenizer.vocab_size={training.vocab_size} cannot be trained on this text: set it to {found} or less, or add text"
        )
    content = tokenizer_json(BytePairs(pairs.ranks, training.pattern), special, bos=BOS)
    return json.dumps(content, ensure_ascii=False, indent=1).encode() + b"\n"


def _sampled(sentences: Iterable[str], words: Callable[[str], Iterable[str]], max_characters: int) -> deque[str]:
    text, share = within_budget(sentences, words, max_characters)
    if share < 1:
        run_logger().warning(
            "the text to train the vocabulary on has more different words than memory is planned for (%s characters in all): it is trained "
            "on an even sample of about %.0f %% of the text",
            f"{max_characters:,}", 100 * share,
        )  # fmt: skip
    return text


def _words(sentence: str) -> list[str]:
    """What SentencePiece counts words by: it cuts at spaces, and nowhere else."""
    return sentence.split(" ")


def _remedy(message: str) -> str:
    if most := re.search(r"Please set it to a value <= (\d+)", message):
        return f"set it to {most.group(1)} or less, or add text"
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"set it to {least.group(1)} or more, or lower tokenizer.character_coverage"
    return "lower it, or add text"


def _existing(config: VocabularyFile, directory: Path) -> Vocabulary:
    tokenizer = config.tokenizer
    if isinstance(tokenizer, ByteTokenizer):
        return Vocabulary.open_bytes()
    if is_local(tokenizer.path):
        vocabulary = open_tokenizer(tokenizer)
        if config.digest is not None and vocabulary.digest != config.digest:
            raise DataError(
                f"tokenizer path={tokenizer.path!r} changed since the run was planned ({config.digest[:16]}, now "
                f"{vocabulary.digest[:16]}); run again"
            )
        return vocabulary
    return open_tokenizer(tokenizer, _fetched(tokenizer, directory))


def _fetched(tokenizer: TokenizerFile, directory: Path) -> Path:
    """The file at a URL. Nothing beside it is fetched, so nothing that is not in the fingerprint changes an id."""
    from tasks.sources.transfer import fetch_file

    path = directory / FILES[tokenizer.kind]
    fetch_file(tokenizer.path, path, sha256=tokenizer.sha256)
    return path


def _visible(name: str) -> str:
    return name.encode("unicode_escape").decode() if not name.isprintable() else name


train_vocabulary = step_task(description="Train or take the vocabulary")(train_vocabulary_body)
