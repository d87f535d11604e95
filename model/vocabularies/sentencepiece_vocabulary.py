"""SentencePiece models as vocabularies.

The library holds up to 70 bytes for each byte of a text. A long one is therefore normalized as a whole, which takes 6, and
what comes of it is encoded in parts by the same model without a normalizer. That is exact for BPE. A unigram model adds up
scores over the whole text in single precision, so that its parts need not have the ids of the whole, which is never cut.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from model.vocabularies.text_borders import LONG_TEXT, NextBorder, parts_of_text, piece_borders
from model.vocabularies.vocabulary import FILES, Encoded, Vocabulary, VocabularyRecord, joined, read_tokenizer_file

_SPACE = "\u2581"  # SentencePiece's visible space


class SentencePieceVocabulary(Vocabulary):
    """A `.model` file, encoded by the sentencepiece library itself. Its control pieces are the special tokens."""

    longest_part = 4 << 20

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
        if all(len(text) <= LONG_TEXT for text in texts):
            return joined(_encode(self._processor, list(texts)))
        return joined(self._encode_long(text) if len(text) > LONG_TEXT else _encode(self._processor, [text])[0] for text in texts)

    def _encode_long(self, text: str) -> np.ndarray:
        parts = self.parts(text)
        return np.concatenate([_encode(self._without_normalizer[0], [part])[0] for part in parts])

    def parts(self, text: str) -> list[str]:
        """See Vocabulary."""
        if len(text) <= LONG_TEXT:
            return [text]
        return parts_of_text(self._processor.normalize(text), self._without_normalizer[1])

    @cached_property
    def _without_normalizer(self) -> tuple[Any, NextBorder | None]:
        """The model for text that is normalized already, and where that can be cut."""
        from sentencepiece import sentencepiece_model_pb2

        pb2: Any = sentencepiece_model_pb2  # generated at import, so a type checker sees no members
        proto = pb2.ModelProto.FromString(self.data())
        proto.normalizer_spec.Clear()
        spec = proto.normalizer_spec
        spec.name, spec.add_dummy_prefix, spec.remove_extra_whitespaces, spec.escape_whitespaces = "identity", False, False, False
        assert self.path is not None
        processor = _load(self.path, proto.SerializeToString())
        if proto.trainer_spec.model_type != pb2.TrainerSpec.BPE:
            return processor, None
        # unknown characters in a row become one id, where they are not spelled in bytes
        known = None if proto.trainer_spec.byte_fallback else {piece.piece for piece in proto.pieces if len(piece.piece) == 1}
        return processor, piece_borders((piece.piece for piece in proto.pieces), known)

    def names(self) -> list[str]:
        """See Vocabulary."""
        return [self._processor.id_to_piece(one) for one in range(self.vocab_size)]

    def byte_lengths(self) -> np.ndarray:
        """See Vocabulary."""
        processor = self._processor
        lengths = np.zeros(self.vocab_size, np.int64)
        for one in range(self.vocab_size):
            if processor.is_byte(one):
                lengths[one] = 1
            elif not (processor.is_control(one) or processor.is_unknown(one) or processor.is_unused(one)):
                lengths[one] = len(processor.id_to_piece(one).replace(_SPACE, " ").encode())
        return lengths

    def opening_byte_lengths(self) -> np.ndarray:
        """See Vocabulary. (A model that puts its space at the end instead, treat_whitespace_as_suffix, has a byte too many a text.)"""
        lengths = self.byte_lengths()
        if self._processor.normalize("a").startswith(_SPACE):
            lengths -= np.array([name.startswith(_SPACE) for name in self.names()])
        return lengths

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)


def _encode(processor: Any, texts: list[str]) -> list[np.ndarray]:
    # one thread: shards are what runs in parallel, and the library lets go of the interpreter meanwhile
    return processor.encode(texts, num_threads=1, return_type="numpy")


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
