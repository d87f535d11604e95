"""`tokenizer.json` files as vocabularies, encoded by the tokenizers library.

What the file would do beyond splitting text into tokens is switched off: its post-processor (BOS and EOS are added as ids
elsewhere), truncation, padding, and finding special tokens in text (`encode_special_tokens`). Added tokens that are not
special stay what they are, part of the vocabulary that text is split into.

The library takes time in proportion to the text also for a megabyte of one character, and remembers the pieces it has
seen up to a limit; what is slow is a file without a pre-tokenizer, of which each document is one piece. It holds up to 250
bytes for each byte of the texts that it is given at once, so it is given them by and by, and long ones in parts.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from model.vocabularies.byte_pairs import BytePairs, byte_pairs_of, split_pattern
from model.vocabularies.text_borders import NextBorder, encode_parts, parts_of_text, pattern_borders
from model.vocabularies.token_bytes import TokenBytes, token_ids
from model.vocabularies.vocabulary import FILES, Encoded, Vocabulary, VocabularyRecord, joined, read_tokenizer_file

CONFIG_FILE = "tokenizer_config.json"
# (BOS, EOS) of files that have no tokenizer_config.json beside them, the first pair that the file has.
_KNOWN_NAMES = (("<|begin_of_text|>", "<|end_of_text|>"), ("<s>", "</s>"), (None, "<|endoftext|>"))


class HuggingFaceVocabulary(Vocabulary):
    """A `tokenizer.json`. Its special added tokens are the special tokens, with BOS and EOS."""

    longest_part = 1 << 20

    @classmethod
    def from_file(cls, path: Path | str, *, bos_token: str | None = None, eos_token: str | None = None) -> HuggingFaceVocabulary:
        """A vocabulary of a bare file; BOS and EOS, where unset, as tokenizer_config.json beside it says, else known names.

        A tokenizer_config.json with `"add_bos_token": false`, or that names no BOS, means that there is none.
        Raises ValueError where the file is none, or where no EOS can be told, naming the fields.
        """
        file = Path(path).expanduser()
        data = read_tokenizer_file(file)
        content = _parse(file, data)
        _load(file, data)
        ids = token_ids(content)
        named = {field: token for field, token in (("bos_token", bos_token), ("eos_token", eos_token)) if token is not None}
        told = _names(file.parent / CONFIG_FILE, ids) | named
        for field, token in told.items():
            if token is not None and token not in ids:
                raise ValueError(f"tokenizer {field}={token!r} is not a token of path={str(path)!r}; give one of its tokens")
        bos, eos, pad, unk = (told.get(f"{name}_token") for name in ("bos", "eos", "pad", "unk"))
        if eos is None:
            raise ValueError(
                f"tokenizer path={str(path)!r} does not tell what ends a document: there is no {CONFIG_FILE} beside it that names "
                "eos_token, nor has it a token of a known name; set tokenizer.eos_token, and tokenizer.bos_token where it has one"
            )
        special = {token["content"]: int(token["id"]) for token in content.get("added_tokens") or [] if token.get("special")}
        record = VocabularyRecord(
            kind="huggingface",
            file=FILES["huggingface"],
            file_sha256=hashlib.sha256(data).hexdigest(),
            vocab_size=max(ids.values()) + 1,
            bos_id=None if bos is None else ids[bos],
            eos_id=ids[eos],
            unk_id=None if unk is None else ids[unk],
            pad_id=None if pad is None else ids[pad],
            special_tokens=special | {token: ids[token] for token in (bos, eos) if token is not None},
        )
        return cls(record, file)

    def content(self) -> dict[str, Any]:
        """The file, parsed."""
        assert self.path is not None
        return _parse(self.path, self.data())

    @property
    def pairs(self) -> BytePairs | None:
        """Its tables, where it is a byte-level BPE that tiktoken's algorithm encodes to the same ids."""
        pairs = byte_pairs_of(self.content())
        # BOS and EOS that the file does not declare as special must not come up in text either
        return None if pairs is None or any(name.encode() in pairs.ranks for name in self.special_tokens) else pairs

    @cached_property
    def _tokenizer(self) -> Any:
        assert self.path is not None
        return _load(self.path, self.data())

    @cached_property
    def _next_border(self) -> NextBorder | None:
        return _borders(self.content(), self.special_tokens)

    def parts(self, text: str) -> list[str]:
        """See Vocabulary."""
        return parts_of_text(text, self._next_border)

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """See Vocabulary."""
        for text in texts:
            if not text.isascii():
                text.encode()  # the library's own error for half a surrogate pair does not say so
        each = encode_parts(texts, self.parts, self._encode_each)
        encoded = joined(each)
        special = np.fromiter(self.special_tokens.values(), np.uint32, len(self.special_tokens))
        if not np.isin(encoded[0], special).any():
            return encoded
        return joined(
            np.concatenate([self._spelled(part) for part in self.parts(text)]) if np.isin(ids, special).any() else ids
            for text, ids in zip(texts, each, strict=True)
        )

    def _encode_each(self, parts: list[str]) -> Iterator[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(parts, add_special_tokens=False)
        return (np.asarray(encoding.ids, np.uint32) for encoding in encodings)

    def _spelled(self, text: str) -> np.ndarray:
        """Ids of a text in which a model whose own pieces are special (a Unigram one has `</s>`) would find them.

        The names of special tokens are cut after their first character and the parts encoded one by one; a special id that
        comes up even so (of a name that only a normalizer makes) is left out.
        """
        names = re.compile("|".join(re.escape(name) for name in sorted(self.special_tokens, key=len, reverse=True)))
        cuts = [0, *(match.start() + 1 for match in names.finditer(text)), len(text)]
        parts = [text[start:end] for start, end in itertools.pairwise(cuts)]
        special = set(self.special_tokens.values())
        encodings = self._tokenizer.encode_batch_fast(parts, add_special_tokens=False)
        return np.asarray([one for encoding in encodings for one in encoding.ids if one not in special], np.uint32)

    def names(self) -> list[str]:
        """See Vocabulary."""
        by_id = {token_id: name for name, token_id in token_ids(self.content()).items()}
        return [by_id.get(one, "") for one in range(self.vocab_size)]

    def byte_lengths(self) -> np.ndarray:
        """See Vocabulary."""
        return self._token_bytes.within()

    def opening_byte_lengths(self) -> np.ndarray:
        """See Vocabulary."""
        return self._token_bytes.opening()

    @cached_property
    def _token_bytes(self) -> TokenBytes:
        return TokenBytes(self.content(), self.vocab_size, self.special_tokens, self._tokenizer.decode_batch)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def _parse(path: Path, data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"tokenizer path={str(path)!r} is not JSON ({str(error)[:120]}); give a tokenizer.json") from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict) or "vocab" not in content["model"]:
        raise ValueError(f"tokenizer path={str(path)!r} has no model with a vocab; give a tokenizer.json of the tokenizers library")
    return content


def _load(path: Path, data: bytes) -> Any:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises Exception itself
        raise ValueError(
            f"tokenizer path={str(path)!r} is not a tokenizer.json that the tokenizers library reads ({str(error)[:200]}); "
            "save it again with a current version"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _borders(content: dict[str, Any], special_tokens: Iterable[str]) -> NextBorder | None:
    """Where a text can be cut that this tokenizer.json splits by a pattern; None where that is not known.

    Not known are normalizers other than Unicode's own forms, and added tokens that look at what is around them.
    """
    normalizer = content.get("normalizer")
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    added = content.get("added_tokens") or []
    found = [token for token in added if not token.get("special")]
    if any(step.get("type") not in ("NFC", "NFD", "NFKC", "NFKD") for step in steps):
        return None
    if any(token.get("lstrip") or token.get("rstrip") or token.get("single_word") for token in found):
        return None
    return pattern_borders(split_pattern(content.get("pre_tokenizer")), [*(token["content"] for token in found), *special_tokens])


def _names(config: Path, ids: dict[str, int]) -> dict[str, str | None]:
    """Names of BOS, EOS, padding and unknown, as a tokenizer_config.json has them or, without one, as they are known."""
    if not config.is_file():
        for bos, eos in _KNOWN_NAMES:
            if eos in ids and (bos is None or bos in ids):
                return {"bos_token": bos, "eos_token": eos}
        return {}
    try:
        value = json.loads(config.read_bytes())
        entries = {name: value.get(f"{name}_token") for name in ("bos", "eos", "pad", "unk")}
        names = {f"{name}_token": entry["content"] if isinstance(entry, dict) else entry for name, entry in entries.items()}
        if not all(name is None or isinstance(name, str) for name in names.values()):
            raise ValueError("a token's name is no text")
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise ValueError(
            f"{config} cannot be used ({type(error).__name__}: {error}); copy it again, or set bos_token and eos_token"
        ) from None
    # a padding token that only transformers adds has no row in this file
    names = {field: name if field in ("bos_token", "eos_token") or name in ids else None for field, name in names.items()}
    return names | {"bos_token": None if value.get("add_bos_token") is False else names["bos_token"]}
