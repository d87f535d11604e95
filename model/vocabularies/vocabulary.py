"""Tokenizers of every kind behind one class: text to ids and back, and a digest of all that changes an id.

    vocabulary = Vocabulary.open("tokenizers/abc")         # a tokenizer directory, or a bare tokenizer file
    ids, lengths = vocabulary.encode_batch(["To be,", "or not"])

A tokenizer directory holds the tokenizer's own file (tokenizer.model, tokenizer.json or tokenizer.tiktoken; nothing for
bytes) and vocabulary.json, the `VocabularyRecord`. The library that a kind belongs to is imported when the first text is
encoded, and its ids are the reference that every faster encoder (model.vocabularies.accelerated_encoder) is held to.

BOS and EOS are never added here, and text that looks like a special token is plain text: special ids come from
`special_tokens` alone. Everything here may be used from several threads at once.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from model.durable import write_durably, write_json
from model.vocabularies.text_borders import LONG_TEXT

Kind = Literal["sentencepiece", "huggingface", "tiktoken", "bytes"]
Encoded = tuple[np.ndarray, np.ndarray]  # ids uint32 [total] of all texts, one after the other; lengths int64 [number of texts]

RECORD_FILE = "vocabulary.json"
FILES: dict[Kind, str] = {"sentencepiece": "tokenizer.model", "huggingface": "tokenizer.json", "tiktoken": "tokenizer.tiktoken"}
_DIGEST_SCHEMA = 1
_TIKTOKEN_LINE = re.compile(rb"\s*[A-Za-z0-9+/]+={0,2} \d+\r?(\n|$)")


@dataclass(frozen=True)
class VocabularyRecord:
    """What vocabulary.json says: which file, how many ids, and which of them are special."""

    kind: Kind
    file: str | None
    file_sha256: str | None
    vocab_size: int
    bos_id: int | None
    eos_id: int
    unk_id: int | None
    pad_id: int | None
    special_tokens: dict[str, int]
    pattern: str | None = None

    @property
    def digest(self) -> str:
        """sha256, hexadecimal, of everything that changes an id, BOS or EOS; the file's name and the id of padding do not."""
        value = {name: content for name, content in asdict(self).items() if name not in ("file", "unk_id", "pad_id")}
        text = json.dumps({"schema": _DIGEST_SCHEMA, **value}, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()


class TextTooLong(ValueError):
    """A text that cannot be encoded in bounded memory."""


class Vocabulary(ABC):
    """A tokenizer. Opened by `Vocabulary.open`; the subclasses are one for each kind of file.

    Attributes:
        longest_part: how many UTF-8 bytes of a text can be encoded at once in some 300 MB of memory; None: any number.
    """

    longest_part: int | None = None

    def __init__(self, record: VocabularyRecord, path: Path | None) -> None:
        """`path` is the tokenizer's own file, None for bytes."""
        self.record, self.path = record, path
        self.kind: Kind = record.kind
        self.vocab_size, self.bos_id, self.eos_id = record.vocab_size, record.bos_id, record.eos_id
        self.unk_id, self.pad_id, self.special_tokens = record.unk_id, record.pad_id, record.special_tokens

    @staticmethod
    def open(path: Path | str) -> Vocabulary:
        """Opens a tokenizer directory, or a bare file with the defaults of its kind.

        Of a bare tokenizer.json, BOS and EOS are what tokenizer_config.json beside it says, else known names; a bare
        tiktoken file is taken for Llama 3's, with its pattern and its first two special tokens.

        Raises ValueError naming the path, what is wrong, and what to do.
        """
        place = Path(path).expanduser()
        if not place.is_dir():
            return _open_file(place)
        record = _read_record(place / RECORD_FILE)
        if record.kind == "bytes":
            return Vocabulary.open_bytes()
        file = place / FILES[record.kind]
        data = read_tokenizer_file(file)
        if (found := hashlib.sha256(data).hexdigest()) != record.file_sha256:
            raise ValueError(
                f"tokenizer {file} has sha256 {found[:16]}, {RECORD_FILE} beside it says {str(record.file_sha256)[:16]}: "
                "the file was changed or damaged; run the tokenizer step again"
            )
        return _class_of(record.kind)(record, file)

    @staticmethod
    def open_bytes() -> Vocabulary:
        """The vocabulary of bytes, which has no file."""
        from model.vocabularies.byte_vocabulary import ByteVocabulary

        return ByteVocabulary()

    @cached_property
    def digest(self) -> str:
        """sha256, hexadecimal, of everything that changes an id, BOS or EOS."""
        return self.record.digest

    def write(self, directory: Path) -> None:
        """Makes `directory` a tokenizer directory: the file first, vocabulary.json last."""
        if self.path is not None and self.path != directory / FILES[self.kind]:
            write_durably(directory / FILES[self.kind], self.data())
        write_json(directory / RECORD_FILE, asdict(self.record))

    def data(self) -> bytes:
        """The bytes of the tokenizer's own file. Raises ValueError where they are not those that were opened."""
        assert self.path is not None
        data = read_tokenizer_file(self.path)
        if hashlib.sha256(data).hexdigest() != self.record.file_sha256:
            raise ValueError(f"tokenizer {self.path} was changed while in use; put the file back, or run again")
        return data

    def names(self) -> list[str]:
        """The tokens by id, as the file spells them, for people to read; an id without a token has an empty name."""
        return []

    @abstractmethod
    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for within a text, int64 [vocab_size]; computed anew at each call.

        The sum over the ids of a text is the size of the text as it is normalized, and with `opening_byte_lengths` for the first of
        them exactly so. Special tokens are no text and have 0, and so has the unknown token: it stands for text of any
        length, and to count less of it than there is can only make bits per byte look worse than they are.
        """

    def opening_byte_lengths(self) -> np.ndarray:
        """`byte_lengths` of an id that begins a text: without the space that some tokenizers put in front of it, int64 [vocab_size]."""
        return self.byte_lengths()

    def encode(self, text: str) -> np.ndarray:
        """Ids uint32 [N] of one text. Raises UnicodeEncodeError, a ValueError, for half a surrogate pair."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Ids uint32 [total] of the texts in their order, and how many each has, int64 [len(texts)].

        Raises UnicodeEncodeError, a ValueError, for half a surrogate pair.
        """

    def check_length(self, text: str) -> None:
        """Raises TextTooLong where more than `longest_part` bytes of the text have to be encoded at once, with the remedy."""
        if self.longest_part is None or len(text) <= LONG_TEXT:
            return
        longest = max(len(part.encode()) for part in self.parts(text))
        if longest > self.longest_part:
            raise TextTooLong(
                f"a document of {len(text.encode()):,} bytes, of which this {self.kind} tokenizer has to encode {longest:,} at once, "
                f"since cutting them could change their ids; the limit is {self.longest_part:,}: split it"
            )

    def parts(self, text: str) -> list[str]:
        """What of a text is encoded at once: parts whose ids, one after the other, are those of the text (as it is normalized)."""
        return [text]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`. Special ids have none, nor do ids past the vocabulary, which a padded embedding has."""
        special = set(self.special_tokens.values())
        return self._decode([int(one) for one in ids if 0 <= one < self.vocab_size and int(one) not in special])

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """The text of ids of the vocabulary, none of them special."""


def joined(parts: Iterable[np.ndarray]) -> Encoded:
    """Arrays of ids, one for each text, as one array and their lengths."""
    arrays = list(parts)
    lengths = np.fromiter((len(array) for array in arrays), np.int64, len(arrays))
    ids = np.concatenate(arrays) if arrays else np.empty(0, np.uint32)
    # sentencepiece's are int32, of which none is negative
    return ids.view(np.uint32), lengths


def parts_of(encoded: Encoded) -> list[np.ndarray]:
    """The arrays of ids of each text, as views: the inverse of `joined`."""
    ids, lengths = encoded
    ends = np.cumsum(lengths).tolist()
    return [ids[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)] if ends else []


def read_tokenizer_file(path: Path) -> bytes:
    """The bytes of a tokenizer's file. Raises ValueError where it cannot be read or has none."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"tokenizer path={str(path)!r} cannot be read ({error.strerror}); give a tokenizer file that exists") from None
    if not data:
        raise ValueError(f"tokenizer path={str(path)!r} has no bytes; copy the file again")
    return data


def kind_of_file(data: bytes) -> Kind:
    """Which kind a tokenizer's file is, by its content: names tell little (Llama 3's tiktoken file is a `tokenizer.model`)."""
    if data.lstrip()[:1] == b"{":
        return "huggingface"
    return "tiktoken" if _TIKTOKEN_LINE.match(data) else "sentencepiece"


def _open_file(path: Path) -> Vocabulary:
    kind = kind_of_file(read_tokenizer_file(path))
    return _class_of(kind).from_file(path)


def _class_of(kind: Kind) -> Any:
    # a run loads the library of its own tokenizer only
    if kind == "sentencepiece":
        from model.vocabularies.sentencepiece_vocabulary import SentencePieceVocabulary

        return SentencePieceVocabulary
    if kind == "huggingface":
        from model.vocabularies.huggingface_vocabulary import HuggingFaceVocabulary

        return HuggingFaceVocabulary
    from model.vocabularies.tiktoken_vocabulary import TiktokenVocabulary

    return TiktokenVocabulary


def _read_record(path: Path) -> VocabularyRecord:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        record = VocabularyRecord(**value)
        integers = (record.vocab_size, record.eos_id, *record.special_tokens.values())
        optional = (record.bos_id, record.unk_id, record.pad_id)
        if record.kind not in ("bytes", *FILES) or not all(isinstance(one, int) for one in integers):
            raise ValueError(f"kind {record.kind!r} or one of its ids is not known")
        if not all(one is None or isinstance(one, int) for one in optional):
            raise ValueError("one of its ids is no number")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: give a directory that the tokenizer step wrote, or the tokenizer file itself") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be used ({type(error).__name__}: {error}); run the tokenizer step again") from None
    return record
