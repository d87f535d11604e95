"""SentencePiece models as vocabularies."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from model.vocabularies.vocabulary import FILES, Encoded, Vocabulary, VocabularyRecord, joined, read_tokenizer_file


class SentencePieceVocabulary(Vocabulary):
    """A `.model` file, encoded by the sentencepiece library itself. Its control pieces are the special tokens."""

    @classmethod
    def from_file(cls, path: Path | str) -> SentencePieceVocabulary:
        """A vocabulary of a bare `.model` file. Raises ValueError where it is none, or defines no EOS."""
        file = Path(path).expanduser()
        data = read_tokenizer_file(file)
        processor = _load(file, data)
        size = int(processor.get_piece_size())
        if processor.eos_id() < 0:
            raise ValueError(f"tokenizer path={str(path)!r} defines no EOS; train it with both bos_id and eos_id 0 or above")
        record = VocabularyRecord(
            kind="sentencepiece",
            file=FILES["sentencepiece"],
            file_sha256=hashlib.sha256(data).hexdigest(),
            vocab_size=size,
            bos_id=_known(processor.bos_id()),
            eos_id=processor.eos_id(),
            unk_id=_known(processor.unk_id()),
            pad_id=_known(processor.pad_id()),
            special_tokens={processor.id_to_piece(one): one for one in range(size) if processor.is_control(one)},
        )
        return cls(record, file)

    @cached_property
    def _processor(self) -> Any:
        assert self.path is not None
        return _load(self.path, self.data())

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """See Vocabulary."""
        for text in texts:
            if not text.isascii():
                text.encode()  # the library's own error for half a surrogate pair does not say so
        # one thread: shards are what runs in parallel, and the library lets go of the interpreter meanwhile
        return joined(self._processor.encode(list(texts), num_threads=1, return_type="numpy"))

    def names(self) -> list[str]:
        """See Vocabulary."""
        return [self._processor.id_to_piece(one) for one in range(self.vocab_size)]

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)


def _load(path: Path, data: bytes) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        processor = SentencePieceProcessor(model_proto=data)
        processor.get_piece_size()
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"tokenizer path={str(path)!r} is not a SentencePiece model ({str(error)[:120]}); give a .model file, "
            "a tokenizer.json or a tiktoken file"
        ) from None
    return processor


def _known(token_id: int) -> int | None:
    return None if token_id < 0 else token_id
