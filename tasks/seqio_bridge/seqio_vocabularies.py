"""Tokenizers as `seqio.Vocabulary`. Imports TensorFlow: only a process that tokenizes or evaluates may import it.

Ids are the tokenizer's own, in SeqIO as everywhere here. Mind a trap where id 0 is a real token, as in Llama 3's vocabulary
("!"): SeqIO holds 0 to be padding, and its packing (`LMFeatureConverter(pack=True)`) drops a token off the end of a document
for every id 0 in it, without a word. SeqIO's own remedy is to shift all ids by one; the token stores here keep the ids of the
model instead, and are packed by `model.batches`, which knows no such id. Other steps of SeqIO are not affected.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from model.vocabularies.vocabulary import Vocabulary


def make_vocabulary(tokenizer: str | Path) -> seqio.Vocabulary:
    """The vocabulary of a tokenizer directory, or of a bare tokenizer file.

    SentencePiece models get SeqIO's own `SentencePieceVocabulary`, every other kind a `TokenizerVocabulary`.
    Raises ValueError where it is not a tokenizer.
    """
    opened = Vocabulary.open(tokenizer)
    return SentencePieceByContent(str(opened.path)) if opened.kind == "sentencepiece" else TokenizerVocabulary(tokenizer)


class SentencePieceByContent(seqio.SentencePieceVocabulary):
    """SeqIO's SentencePiece vocabulary, equal to every other one with the same model, wherever its file is.

    SeqIO mixes only tasks with equal vocabularies, and its own class compares paths.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, seqio.SentencePieceVocabulary) and self.sp_model == other.sp_model

    __hash__ = None  # pyright: ignore[reportAssignmentType]  # as SeqIO's own vocabularies, which can change

    @property
    def bos_id(self) -> int | None:
        """The id of BOS; None where the model has none, for which SentencePiece says -1."""
        return None if (bos_id := self.tokenizer.bos_id()) < 0 else bos_id


class TokenizerVocabulary(seqio.Vocabulary):
    """A Hugging Face, tiktoken or byte tokenizer as SeqIO sees it.

    The tokenizer is loaded when it is first used and is left out of a pickle. Two are equal if their digests are.
    """

    def __init__(self, tokenizer: str | Path) -> None:
        self._path = str(tokenizer)
        self._opened: Vocabulary | None = None
        super().__init__(extra_ids=0)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenizerVocabulary) and self.digest == other.digest

    __hash__ = None  # pyright: ignore[reportAssignmentType]  # as SeqIO's own vocabularies

    def __str__(self) -> str:
        return f"TokenizerVocabulary(path={self._path}, kind={self.tokenizer.kind}, digest={self.digest})"

    @property
    def tokenizer(self) -> Vocabulary:
        """The tokenizer itself."""
        opened = self._opened
        if opened is None:
            opened = self._opened = Vocabulary.open(self._path)
        return opened

    @property
    def digest(self) -> str:
        """The sha256, hexadecimal, of all that changes an id."""
        return self.tokenizer.digest

    @property
    def bos_id(self) -> int | None:
        """The id before each document, or None."""
        return self.tokenizer.bos_id

    @property
    def eos_id(self) -> int:
        """The id after each document."""
        return self.tokenizer.eos_id

    @property
    def unk_id(self) -> int | None:
        """The id of unknown text; None where every text has ids of its own."""
        return self.tokenizer.unk_id

    @property
    def pad_id(self) -> int:
        """The id of padding; where the tokenizer has none, SeqIO's 0, which may be a real token: see the module."""
        pad_id = self.tokenizer.pad_id
        return 0 if pad_id is None else pad_id

    @property
    def _base_vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def _encode(self, s: str | bytes) -> list[int]:
        return self.tokenizer.encode(s.decode() if isinstance(s, bytes) else s).tolist()

    def _decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode([int(one) for one in ids])

    def _encode_tf(self, s: tf.Tensor) -> Any:
        """int32 [N] for one text, a ragged int32 [B, N] for texts [B]. Text that is not UTF-8 is an error."""
        ids, lengths = tf.numpy_function(self._encode_texts, [tf.reshape(s, [-1])], [tf.int32, tf.int64], stateful=False)
        ids.set_shape([None])
        lengths.set_shape([None])
        ragged: Any = tf.RaggedTensor
        return ids if s.shape.rank == 0 else ragged.from_row_lengths(ids, lengths)

    def _encode_texts(self, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ids, lengths = self.tokenizer.encode_batch([text.decode() for text in texts])
        return ids.astype(np.int32), lengths.astype(np.int64)

    def _decode_tf(self, ids: Any) -> tf.Tensor:
        """A text for ids [N], texts [B] for ids [B, N]; ids from the first EOS on are left out."""
        if isinstance(ids, tf.RaggedTensor):
            ids = ids.to_tensor(default_value=self.eos_id)
        text = tf.numpy_function(self._decode_rows, [ids], tf.string, stateful=False)
        text.set_shape(ids.shape[:-1])
        return text

    def _decode_rows(self, ids: np.ndarray) -> Any:
        rows: Sequence[np.ndarray] = [ids] if ids.ndim == 1 else list(ids)
        texts = [self._decode(row[: np.append(np.flatnonzero(row == self.eos_id), len(row))[0]]).encode() for row in rows]
        return texts[0] if ids.ndim == 1 else np.array(texts, dtype=object)
