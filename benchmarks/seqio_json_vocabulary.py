"""A `tokenizer.json` as a `seqio.Vocabulary`, as one writes it for SeqIO: the library called by a numpy function in the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from tokenizers import Tokenizer


class JsonVocabulary(seqio.Vocabulary):
    """Encodes plain text; it has no special tokens of its own."""

    def __init__(self, path: str) -> None:
        """`path` is the tokenizer.json."""
        self._tokenizer = Tokenizer.from_file(path)
        self._tokenizer.encode_special_tokens = True
        super().__init__(extra_ids=0)

    @property
    def bos_id(self) -> int | None:
        """None: none is added."""
        return None

    @property
    def eos_id(self) -> int | None:
        """None: none is added."""
        return None

    @property
    def unk_id(self) -> int | None:
        """None: bytes spell everything."""
        return None

    @property
    def _base_vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def _encode(self, s: str) -> Sequence[int]:
        return self._tokenizer.encode(s, add_special_tokens=False).ids

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids))

    def _encode_tf(self, s: Any) -> Any:
        def ids_of(text: bytes) -> np.ndarray:
            return np.asarray(self._encode(text.decode()), np.int32)

        ids = tf.numpy_function(ids_of, [s], tf.int32, stateful=False)
        return tf.ensure_shape(ids, [None])

    def _decode_tf(self, ids: Any) -> Any:
        return tf.numpy_function(lambda own: self._decode(own.tolist()).encode(), [ids], tf.string, stateful=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, JsonVocabulary) and self._tokenizer.to_str() == other._tokenizer.to_str()

    __hash__ = None  # pyright: ignore[reportAssignmentType]
