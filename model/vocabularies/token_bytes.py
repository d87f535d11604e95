"""How many UTF-8 bytes of text each token of a tokenizer.json stands for.

A byte-level file spells every byte as a character, so that the names say it. Of any other file its decoder says it: what a
token adds to the text between two others. (Levanter, byte_length_of_token, decodes behind one other token.) A token that spells
one byte (<0x0A>) cannot be decoded by itself, and stands for that byte.

What a normalizer or a pre-tokenizer takes out of a text for good (case does not matter here, runs of spaces do) is counted as it
comes back from the decoder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np

from model.vocabularies.byte_pairs import BYTE_CHARACTERS, CHARACTER_BYTES

_ONE_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class TokenBytes:
    """The lengths of one file."""

    def __init__(
        self, content: dict[str, Any], vocab_size: int, special_tokens: Collection[str], decode: Callable[[list[list[int]]], list[str]]
    ) -> None:
        """`content` is the file, parsed; `decode` gives the texts of lists of ids, special ones left out."""
        model, pre_tokenizer, decoder = content["model"], content.get("pre_tokenizer"), content.get("decoder")
        self._vocab_size, self._decode = vocab_size, decode
        no_text = {*special_tokens, _unknown(model)}
        self._ids = {name: token_id for name, token_id in token_ids(content).items() if name not in no_text}
        self._added = {token["content"] for token in content.get("added_tokens") or []}
        self._suffix: str = model.get("end_of_word_suffix") or ""
        self._byte_level = any(step.get("type") == "ByteLevel" for step in (*_steps(content.get("normalizer")), *_steps(pre_tokenizer)))
        # without a decoder either, tokens are pieces of the text as they are
        self._spelled = self._byte_level or (pre_tokenizer is None and decoder is None)
        self._prefix_space = any(step.get("type") == "ByteLevel" and step.get("add_prefix_space") for step in _steps(pre_tokenizer))
        self._one_byte = any(step.get("type") == "ByteFallback" for step in _steps(decoder))

    def within(self) -> np.ndarray:
        """Bytes of each id within a text, int64 [vocab_size]. Raises ValueError where no token by itself is a word or a letter."""
        if self._spelled:
            return self._of([self._size(name) for name in self._ids])
        anchor = self._anchor()
        twice, *texts = self._decode([[anchor, anchor], *([anchor, token_id, anchor] for token_id in self._ids.values())])
        return self._decoded(texts, len(twice.encode()))

    def opening(self) -> np.ndarray:
        """Bytes of each id at the beginning of a text, int64 [vocab_size]. Raises as `within` does."""
        if self._spelled:
            space = BYTE_CHARACTERS[0x20] if self._prefix_space else None
            opens = [space is not None and name.startswith(space) and name not in self._added for name in self._ids]
            return self.within() - self._of(opens)
        anchor = self._anchor()
        once, twice, *texts = self._decode([[anchor], [anchor, anchor], *([token_id, anchor] for token_id in self._ids.values())])
        return self._decoded(texts, len(twice.encode()) - len(once.encode()))

    def _size(self, name: str) -> int:
        word = name if name in self._added else name.removesuffix(self._suffix)
        if self._byte_level and name not in self._added and all(character in CHARACTER_BYTES for character in word):
            return len(word)
        return len(word.encode())

    def _anchor(self) -> int:
        """A token that is a word or a letter wherever it stands."""
        for name, token_id in self._ids.items():
            if name.endswith(self._suffix) and self._decode([[token_id]])[0].isalnum():
                return token_id
        raise ValueError("the tokenizer has no token that is a word or a letter by itself: give one whose decoder gives text back")

    def _decoded(self, texts: Sequence[str], around: int) -> np.ndarray:
        sizes = [
            1 if self._one_byte and _ONE_BYTE.fullmatch(name) and name not in self._added else max(len(text.encode()) - around, 0)
            for name, text in zip(self._ids, texts, strict=True)
        ]
        return self._of(sizes)

    def _of(self, sizes: Sequence[int]) -> np.ndarray:
        lengths = np.zeros(self._vocab_size, np.int64)
        lengths[list(self._ids.values())] = sizes
        return lengths


def token_ids(content: dict[str, Any]) -> dict[str, int]:
    """Ids of all tokens, by name; a Unigram model lists its pieces in the order of their ids."""
    vocab = content["model"]["vocab"]
    ids = dict(vocab) if isinstance(vocab, dict) else {piece[0]: index for index, piece in enumerate(vocab)}
    return ids | {token["content"]: int(token["id"]) for token in content.get("added_tokens") or []}


def _unknown(model: dict[str, Any]) -> str | None:
    """The name of the token for what the vocabulary cannot spell: given by its id in a Unigram model."""
    unk_id = model.get("unk_id")
    return model.get("unk_token") if unk_id is None else model["vocab"][unk_id][0]


def _steps(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder, or the ones that it is a sequence of."""
    if part is None:
        return
    inner = next((part[name] for name in ("normalizers", "pretokenizers", "decoders") if name in part), None)
    if inner is None:
        yield part
    for step in inner or ():
        yield from _steps(step)
