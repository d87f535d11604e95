"""Bytes as a vocabulary: id = byte + 3 over the UTF-8 text, 0 padding, 1 BOS, 2 EOS, as ByT5 numbers its bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from model.vocabularies.vocabulary import Encoded, Vocabulary, VocabularyRecord

SPECIAL_TOKENS = {"<pad>": 0, "<s>": 1, "</s>": 2}
FIRST_BYTE = len(SPECIAL_TOKENS)


class ByteVocabulary(Vocabulary):
    """All 256 bytes and three special ids. There is only one."""

    def __init__(self) -> None:
        super().__init__(
            VocabularyRecord(
                kind="bytes",
                file=None,
                file_sha256=None,
                vocab_size=256 + FIRST_BYTE,
                bos_id=SPECIAL_TOKENS["<s>"],
                eos_id=SPECIAL_TOKENS["</s>"],
                unk_id=None,
                pad_id=SPECIAL_TOKENS["<pad>"],
                special_tokens=dict(SPECIAL_TOKENS),
            ),
            None,
        )

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """See Vocabulary."""
        encoded = [text.encode() for text in texts]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        ids = np.frombuffer(b"".join(encoded), np.uint8).astype(np.uint32)
        ids += FIRST_BYTE
        return ids, lengths

    def byte_lengths(self) -> np.ndarray:
        """See Vocabulary."""
        return (np.arange(self.vocab_size) >= FIRST_BYTE).astype(np.int64)

    def _decode(self, ids: list[int]) -> str:
        return bytes(one - FIRST_BYTE for one in ids).decode("utf-8", errors="replace")
