"""Looks into tokenizers at plan time: do they load, how many ids have they, which are BOS and EOS. Downloads nothing.

A plan asks several times, and a large tokenizer.json takes a second to read: what was opened is remembered until a file changes.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

from model.vocabularies.vocabulary import Vocabulary
from tasks.sources.local_files import is_local, local_path
from tasks.sources.source_file import DataError, public_location
from tasks.vocabularies import (
    BytePairTraining,
    ByteTokenizer,
    HuggingFaceFile,
    SentencePieceFile,
    SentencePieceTraining,
    TiktokenFile,
    Tokenizer,
    TokenizerFile,
)

# hf://org/name@commit/file and the like: what is pinned needs no digest; a branch is not, it moves
_PINNED = re.compile(r"hf://[^@]+@[0-9a-f]{40}/", re.IGNORECASE)
# A file changed again within the clock tick of its timestamp keeps that timestamp: what is too young is not remembered.
_SETTLED_NANOSECONDS = 2_000_000_000
_MOST_REMEMBERED = 8
_remembered: dict[tuple[object, ...], Vocabulary] = {}


@dataclass(frozen=True)
class VocabularyInfo:
    """What a plan needs to know of a tokenizer. Of one that is still at its URL, only vocab_size is known."""

    digest: str | None
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    pad_id: int | None


def inspect_tokenizer(tokenizer: TokenizerFile | ByteTokenizer) -> VocabularyInfo:
    """Looks into a tokenizer on this machine; of one at a URL it takes what is declared.

    Raises DataError where it cannot be read, is no tokenizer of its kind, lacks EOS or is not the declared one, or where
    the configuration of one at a URL does not say enough.
    """
    if not isinstance(tokenizer, ByteTokenizer) and not is_local(tokenizer.path):
        return _declared(tokenizer)
    vocabulary = _remembered_tokenizer(tokenizer)
    return VocabularyInfo(
        digest=vocabulary.digest,
        vocab_size=vocabulary.vocab_size,
        bos_id=vocabulary.bos_id,
        eos_id=vocabulary.eos_id,
        unk_id=vocabulary.unk_id,
        pad_id=vocabulary.pad_id,
    )


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """How many ids a tokenizer has or, where it is to be trained, will have. Raises DataError as inspect_tokenizer does."""
    if isinstance(tokenizer, SentencePieceTraining | BytePairTraining):
        return tokenizer.vocab_size
    return inspect_tokenizer(tokenizer).vocab_size


def open_tokenizer(tokenizer: TokenizerFile | ByteTokenizer, path: Path | None = None) -> Vocabulary:
    """The vocabulary of a configured tokenizer; `path` is where its file is, if not where the configuration says.

    Raises DataError as inspect_tokenizer does.
    """
    if isinstance(tokenizer, ByteTokenizer):
        return Vocabulary.open_bytes()
    file = local_path(tokenizer.path) if path is None else path
    try:
        vocabulary = _open(tokenizer, file)
    except DataError:
        raise
    except ValueError as error:
        raise DataError(str(error)) from None
    found = vocabulary.record.file_sha256
    if tokenizer.sha256 is not None and found != tokenizer.sha256:
        raise DataError(f"tokenizer path={_shown(tokenizer)!r} has sha256 {found}, not the declared {tokenizer.sha256}; correct either")
    if tokenizer.vocab_size is not None and vocabulary.vocab_size != tokenizer.vocab_size:
        raise DataError(
            f"tokenizer path={_shown(tokenizer)!r} has {vocabulary.vocab_size} ids, not vocab_size={tokenizer.vocab_size}; "
            "correct vocab_size"
        )
    return vocabulary


def _remembered_tokenizer(tokenizer: TokenizerFile | ByteTokenizer) -> Vocabulary:
    """`open_tokenizer`, once for the same configuration while its file, and tokenizer_config.json beside it, stay as they are."""
    if isinstance(tokenizer, ByteTokenizer):
        return open_tokenizer(tokenizer)
    file = local_path(tokenizer.path)
    states = [_state(path) for path in (file, file.with_name("tokenizer_config.json"))]
    key = (tokenizer.model_dump_json(), str(file), *states)
    if (known := _remembered.get(key)) is not None:
        return known
    vocabulary = open_tokenizer(tokenizer)
    if all(state is None or time.time_ns() - state[1] > _SETTLED_NANOSECONDS for state in states):
        while len(_remembered) >= _MOST_REMEMBERED:
            _remembered.pop(next(iter(_remembered)))
        _remembered[key] = vocabulary
    return vocabulary


def _state(path: Path) -> tuple[int, int, int, int] | None:
    """What changes when a file does: its size, times (of its content first) and inode. None where it cannot be looked at."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def not_exportable(tokenizer: Tokenizer) -> str | None:
    """Why a model with this tokenizer cannot be exported for transformers, or None where it can or that is not known yet."""
    if not isinstance(tokenizer, SentencePieceFile) or not is_local(tokenizer.path):
        return None
    from model.hf_tokenizer import exportable

    return exportable(_remembered_tokenizer(tokenizer))


def _open(tokenizer: TokenizerFile, file: Path) -> Vocabulary:
    # the libraries of the other kinds are not loaded
    if isinstance(tokenizer, SentencePieceFile):
        from model.vocabularies.sentencepiece_vocabulary import SentencePieceVocabulary

        vocabulary = SentencePieceVocabulary.from_file(file)
        if vocabulary.bos_id is None:
            raise DataError(f"tokenizer path={_shown(tokenizer)!r} defines no BOS; train it with both bos_id and eos_id 0 or above")
        return vocabulary
    if isinstance(tokenizer, HuggingFaceFile):
        from model.vocabularies.huggingface_vocabulary import HuggingFaceVocabulary

        return HuggingFaceVocabulary.from_file(file, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)
    from model.vocabularies.tiktoken_vocabulary import TiktokenVocabulary

    return TiktokenVocabulary.from_file(
        file,
        pattern=tokenizer.pattern,
        special_tokens=tokenizer.special_tokens,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
    )


def _declared(tokenizer: TokenizerFile) -> VocabularyInfo:
    if tokenizer.vocab_size is None:
        raise DataError(
            f"tokenizer path={_shown(tokenizer)!r} is a URL and vocab_size is not set: a plan downloads nothing, so set it to the "
            "number of ids, special ones too"
        )
    if tokenizer.sha256 is None and not _PINNED.match(tokenizer.path):
        raise DataError(
            f"tokenizer path={_shown(tokenizer)!r} can change: set sha256 to the digest of the file, or give "
            "hf://organization/name@commit/file with all 40 digits of the commit"
        )
    if isinstance(tokenizer, HuggingFaceFile) and tokenizer.eos_token is None:
        raise DataError(
            f"tokenizer path={_shown(tokenizer)!r} is a URL and eos_token is not set: set it, and bos_token where the tokenizer has one, "
            "so that no other file decides what goes around documents"
        )
    ids: dict[str, int] = {}
    if isinstance(tokenizer, TiktokenFile):
        first = tokenizer.vocab_size - len(tokenizer.special_tokens)
        ids = {token: first + index for index, token in enumerate(tokenizer.special_tokens)}
        bos = tokenizer.bos_token
        return VocabularyInfo(None, tokenizer.vocab_size, None if bos is None else ids[bos], ids[tokenizer.eos_token], None, None)
    return VocabularyInfo(None, tokenizer.vocab_size, None, None, None, None)


def _shown(tokenizer: TokenizerFile) -> str:
    return public_location(tokenizer.path)
