"""tiktoken files as vocabularies: byte pairs by rank, a pattern, and special tokens after the last rank."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from model.vocabularies.byte_pairs import LLAMA3_PATTERN, BytePairs, read_ranks, tokenizer_json
from model.vocabularies.text_borders import NextBorder, encode_parts, parts_of_text, pattern_borders
from model.vocabularies.vocabulary import FILES, Encoded, Vocabulary, VocabularyRecord, joined, read_tokenizer_file

_NEVER_FOUND = "\U0010fffe\U0010ffff"
LLAMA3_SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>")


class TiktokenVocabulary(Vocabulary):
    """A file of byte pairs, encoded by the tiktoken library.

    A text on which the pattern runs out of the library's stack (a megabyte of spaces with Llama 3's) is encoded by
    `tokenizers` over the same pairs, which has the same ids and no such limit.
    """

    longest_part = 1 << 20

    @classmethod
    def from_file(
        cls,
        path: Path | str,
        *,
        pattern: str = LLAMA3_PATTERN,
        special_tokens: Sequence[str] = LLAMA3_SPECIAL_TOKENS,
        bos_token: str | None = LLAMA3_SPECIAL_TOKENS[0],
        eos_token: str = LLAMA3_SPECIAL_TOKENS[1],
    ) -> TiktokenVocabulary:
        """A vocabulary of a bare file; the ids of `special_tokens` follow the last rank, in their order.

        Raises ValueError where the file is none, the pattern is no regular expression, or BOS or EOS is not special.
        """
        file = Path(path).expanduser()
        data = read_tokenizer_file(file)
        first = max(read_ranks(data, str(path)).values()) + 1
        special = {text: first + index for index, text in enumerate(special_tokens)}
        if len(special) < len(special_tokens):
            raise ValueError(f"tokenizer special_tokens={tuple(special_tokens)} names a token twice; remove one")
        for field, token in (("bos_token", bos_token), ("eos_token", eos_token)):
            if token is not None and token not in special:
                raise ValueError(f"tokenizer {field}={token!r} is none of special_tokens={tuple(special_tokens)}; add it there")
        record = VocabularyRecord(
            kind="tiktoken",
            file=FILES["tiktoken"],
            file_sha256=hashlib.sha256(data).hexdigest(),
            vocab_size=first + len(special),
            bos_id=None if bos_token is None else special[bos_token],
            eos_id=special[eos_token],
            unk_id=None,
            pad_id=None,
            special_tokens=special,
            pattern=pattern,
        )
        vocabulary = cls(record, file)
        vocabulary.encode("a b")  # a pattern that is none shows now
        return vocabulary

    @cached_property
    def pairs(self) -> BytePairs:
        """The tables."""
        assert self.record.pattern is not None
        return BytePairs(read_ranks(self.data(), str(self.path)), self.record.pattern)

    @cached_property
    def _encoding(self) -> Any:
        return tiktoken_encoding(self.pairs)

    @cached_property
    def _without_limit(self) -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_str(json.dumps(tokenizer_json(self.pairs, {})))

    @cached_property
    def _next_border(self) -> NextBorder | None:
        return pattern_borders(self.record.pattern)

    def parts(self, text: str) -> list[str]:
        """See Vocabulary."""
        return parts_of_text(text, self._next_border)

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """See Vocabulary."""
        return joined(encode_parts(texts, self.parts, lambda parts: map(self._encode, parts)))

    def _encode(self, text: str) -> np.ndarray:
        ids = encode_or_none(self._encoding, text)
        if ids is None:
            ids = np.asarray(self._without_limit.encode(text, add_special_tokens=False).ids, np.uint32)
        return ids

    def names(self) -> list[str]:
        """See Vocabulary; bytes that are no text are escaped."""
        by_id = {rank: token.decode("utf-8", errors="backslashreplace") for token, rank in self.pairs.ranks.items()}
        by_id |= {token_id: name for name, token_id in self.special_tokens.items()}
        return [by_id.get(one, "") for one in range(self.vocab_size)]

    def byte_lengths(self) -> np.ndarray:
        """See Vocabulary."""
        lengths = np.zeros(self.vocab_size, np.int64)
        for token, rank in self.pairs.ranks.items():
            lengths[rank] = len(token)
        return lengths

    def _decode(self, ids: list[int]) -> str:
        return self._encoding.decode(ids, errors="replace")


def tiktoken_encoding(pairs: BytePairs) -> Any:
    """The tables as a `tiktoken.Encoding`, special tokens left out. Raises ValueError where the pattern is no regular expression."""
    from tiktoken import Encoding

    # never allowed in text, so it changes nothing; with no special token at all the library stops at every character to look for one
    unused = {_NEVER_FOUND: max(pairs.ranks.values()) + 1}
    try:
        return Encoding("pairs", pat_str=pairs.pattern, mergeable_ranks=pairs.ranks, special_tokens=unused)
    except ValueError as error:
        raise ValueError(
            f"tokenizer pattern={pairs.pattern!r} cannot be used ({str(error)[:200]}); correct the regular expression"
        ) from None


def encode_or_none(encoding: Any, text: str) -> np.ndarray | None:
    """The ids uint32 [N] of a text, or None where the library gives up on it. Raises UnicodeEncodeError for half a surrogate pair."""
    try:
        return encoding.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:
        raise
    except BaseException as error:
        if not is_library_failure(error):
            raise
        return None


def is_library_failure(error: BaseException) -> bool:
    """Whether a library of compiled code gave up on its input; panics of Rust are no `Exception`."""
    return type(error).__name__ == "PanicException" or (isinstance(error, Exception) and not isinstance(error, MemoryError))
