"""Byte-level BPE as tables: tokens as bytes, read from a tiktoken file or a tokenizer.json, and written as a tokenizer.json.

A tiktoken file and a Llama-3-style tokenizer.json are two spellings of one thing: a pattern that splits text, and tokens
whose ids are also the order in which neighbours are merged. GPT-2 introduced the spelling of bytes as printable
characters that tokenizer.json files have.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# The split pattern of Llama 3's tokenizer: words with one space in front, digits by threes, runs of other characters.
LLAMA3_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# What ByteLevel(use_regex=True) of `tokenizers` splits by.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _byte_characters() -> dict[int, str]:
    """GPT-2's spelling: printable latin-1 bytes as themselves, the others as characters from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(0x100 + index) for index, byte in enumerate(hidden)}


BYTE_CHARACTERS = _byte_characters()
CHARACTER_BYTES = {character: byte for byte, character in BYTE_CHARACTERS.items()}
_SPELL = {byte: ord(character) for byte, character in BYTE_CHARACTERS.items()}


@dataclass(frozen=True)
class BytePairs:
    """Ids by the bytes of the token, special ones left out; a lower id is merged first. `pattern` splits text beforehand."""

    ranks: dict[bytes, int]
    pattern: str

    def texts(self) -> Iterable[str]:
        """The tokens that are text by themselves, in the order of their ids."""
        for token in sorted(self.ranks, key=self.ranks.__getitem__):
            try:
                yield token.decode("utf-8")
            except UnicodeDecodeError:
                continue  # part of a character


def read_ranks(data: bytes, path: str) -> dict[bytes, int]:
    """The tokens of a tiktoken file, a line each: the token in base64 and its rank.

    Raises ValueError with the line where it is malformed, gives a rank twice, or lacks a single byte.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"tokenizer path={path!r} line {number} is not a base64 token and its rank; give a tiktoken file, such as "
                "Llama 3's original tokenizer.model"
            ) from None
    lacking = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if lacking or len(set(ranks.values())) != len(ranks) or min(ranks.values()) < 0 or b"" in ranks:
        why = f"it has no token for the byte 0x{lacking[0]:02x}" if lacking else "a rank is there twice, or negative, or a token is empty"
        raise ValueError(f"tokenizer path={path!r} cannot encode all text, {why}; copy the file again")
    return ranks


def tiktoken_file(ranks: dict[bytes, int]) -> bytes:
    """The tokens as a tiktoken file."""
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(ranks.items(), key=lambda item: item[1]))
    return b"".join(lines)


def byte_pairs_of(tokenizer: dict[str, Any]) -> BytePairs | None:
    """The tables of a tokenizer.json, where tiktoken's algorithm over them gives the ids that `tokenizers` gives, else None.

    They differ where text is normalized, where added tokens are found in plain text, and where merges are not in the
    order of the ids they make. With one order and no normalizer both join, in each piece of the pattern, the leftmost of
    the adjacent pairs whose result has the lowest id. (A trained list names one pair for a token: another pair with that
    result never comes up, since the part between two boundaries that no earlier merge crossed is merged as if alone.)
    """
    model = tokenizer.get("model") or {}
    pattern = split_pattern(tokenizer.get("pre_tokenizer"))
    added = tokenizer.get("added_tokens") or []
    plain = not (model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))
    if model.get("type") != "BPE" or not plain or model.get("byte_fallback") or tokenizer.get("normalizer") is not None:
        return None
    if pattern is None or not all(token.get("special") for token in added):
        return None
    special = {token["content"] for token in added}
    ranks: dict[bytes, int] = {}
    for text, token_id in model["vocab"].items():
        if text in special:
            continue
        try:
            ranks[bytes(CHARACTER_BYTES[character] for character in text)] = token_id
        except KeyError:
            return None
    if any(bytes([byte]) not in ranks for byte in range(256)) or not _in_order(model, ranks):
        return None
    return BytePairs(ranks, pattern)


def _in_order(model: dict[str, Any], ranks: dict[bytes, int]) -> bool:
    """Whether merges are listed in the order of the ids they make, and what no merge makes is only ever a whole piece."""
    vocab: dict[str, int] = model["vocab"]
    last, made = -1, set[int]()
    for merge in model["merges"]:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        token_id = vocab.get(left + right)
        if token_id is None or token_id < last:
            return False
        last = token_id
        made.add(token_id)
    unmade = [token for token, token_id in ranks.items() if len(token) > 1 and token_id not in made]
    return not unmade or (bool(model.get("ignore_merges")) and not any(_halves(token, ranks) for token in unmade))


def split_pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The pattern of a pre-tokenizer that splits by it and spells bytes, and does nothing else; None of any other one."""
    if not pre_tokenizer:
        return None
    steps = pre_tokenizer.get("pretokenizers", []) if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    last = steps[-1] if steps else {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if len(steps) == 1 and last.get("use_regex", True):
        return GPT2_PATTERN
    split = steps[0] if len(steps) == 2 and not last.get("use_regex", True) else {}
    if split.get("type") != "Split" or split.get("behavior") != "Isolated" or split.get("invert"):
        return None
    return split.get("pattern", {}).get("Regex")


def tokenizer_json(pairs: BytePairs, special_tokens: dict[str, int], *, bos: str | None = None) -> dict[str, Any]:
    """The content of a tokenizer.json with the ids of `pairs`: every pair of tokens whose result is a token is a merge.

    Args:
        pairs: the tables.
        special_tokens: ids by text, declared as special.
        bos: one of them, which the post-processor puts first; None: none.
    """
    spelled = {token: token.decode("latin-1").translate(_SPELL) for token in pairs.ranks}
    merges: list[list[str]] = []
    for token in sorted(pairs.ranks, key=pairs.ranks.__getitem__):
        merges += [[spelled[left], spelled[right]] for left, right in _halves(token, pairs.ranks)]
    split = {"type": "Split", "pattern": {"Regex": pairs.pattern}, "behavior": "Isolated", "invert": False}
    bytes_step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(text, token_id) for text, token_id in special_tokens.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_step]},
        "post_processor": None if bos is None else bos_first(bos, special_tokens[bos]),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            # a piece of text that is a token is that token, as in tiktoken, also where no merges lead to it
            "ignore_merges": True,
            "vocab": {spelled[token]: rank for token, rank in pairs.ranks.items()},
            "merges": merges,
        },
    }


def _halves(token: bytes, ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs of tokens that a token can be made of."""
    cuts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
    return [pair for pair in cuts if pair[0] in ranks and pair[1] in ranks]


def added_token(text: str, token_id: int, *, special: bool = True) -> dict[str, Any]:
    """An entry of a tokenizer.json's added_tokens."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": text, **flags, "special": special}


def bos_first(bos: str, bos_id: int) -> dict[str, Any]:
    """The post-processor of a tokenizer.json that puts BOS before every text."""
    first: list[dict[str, Any]] = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    second: list[dict[str, Any]] = [{"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "type": "TemplateProcessing",
        "single": first,
        "pair": [*first, *second],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }
