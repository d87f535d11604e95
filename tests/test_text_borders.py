"""Long texts in parts: the same ids as in one piece wherever they are cut, and a limit where they cannot be."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from model.vocabularies import sentencepiece_vocabulary, text_borders, vocabulary
from model.vocabularies.byte_pairs import GPT2_PATTERN, LLAMA3_PATTERN, added_token
from model.vocabularies.text_borders import encode_parts, parts_of_text, pattern_borders, piece_borders
from model.vocabularies.tiktoken_vocabulary import TiktokenVocabulary
from model.vocabularies.vocabulary import TextTooLong, Vocabulary
from tests.synthetic_vocabulary import small_byte_pairs
from tests.test_accelerated_encoder import PIECES
from tests.test_hf_tokenizer import train
from tests.test_vocabulary_backends import edited, opened

# Beside what is hostile to any encoder: pieces that meet at a border, and characters that normalization joins or takes apart.
PARTS = (
    *PIECES,
    *("fox", "the fox", "the f", " b", "hello, w", "the1", "\u3002", "\u3042\u304c", "\u00e9,", "\ufb01,", "a\u0301.", "\u1100\u1161,"),
    *("\uac00\u11a8.", "\u00bd ", "a'b", "x'S y", "A'll,", "\u0130,", "\u212b ", "\ufdfa.", "\u21671", " \u0338", "<\u0338", "=\u0338a,"),
)
DRAW = random.Random(1)
TEXTS = ["".join(DRAW.choices(PARTS, k=DRAW.randint(1, 40))) for _ in range(150)]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def split_by(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**BYTE_LEVEL, "use_regex": False}]}


JSON_FILES: dict[str, dict[str, Any]] = {
    "llama3": {},
    "gpt2": {"pre_tokenizer": {**BYTE_LEVEL, "use_regex": True}},
    "qwen2": {"pre_tokenizer": split_by(text_borders._QWEN2_PATTERN), "normalizer": {"type": "NFC"}},
    "o200k": {"pre_tokenizer": split_by(text_borders._O200K_PATTERN), "normalizer": {"type": "NFD"}},
    "nfkd": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKD"}]}},
    "nfkc": {"normalizer": {"type": "NFKC"}, "pre_tokenizer": split_by(text_borders._O200K_PATTERN)},
}
# The last two values: whether white space is tidied up, and whether unknown characters are spelled in bytes.
MODELS: dict[str, tuple[tuple[str, str, bool, bool], dict[str, Any]]] = {
    "as it is": (("bpe", "identity", False, True), {}),
    "normalized": (("bpe", "nmt_nfkc", True, True), {}),
    "unknown": (("bpe", "identity", False, False), {}),
    "tidied, unknown": (("bpe", "nmt_nfkc", True, False), {}),
    "suffix": (("bpe", "identity", False, True), {"treat_whitespace_as_suffix": True}),
    "no prefix": (("bpe", "identity", False, True), {"add_dummy_prefix": False}),
    "own pieces": (("bpe", "identity", False, True), {"user_defined_symbols": ["fox", "the f", " b"]}),
    "over spaces": (("bpe", "identity", False, True), {"split_by_whitespace": False}),
}


def with_added_tokens(tmp_path: Path, **changes: Any) -> Vocabulary:
    """A tokenizer.json that finds tokens in the text, some of which begin or end where a border could be."""
    found = [{**added_token(text, 700 + index), "special": False} for index, text in enumerate(("  ", "hello, w", "the1"))]
    own = json.loads(small_byte_pairs())["added_tokens"]
    return Vocabulary.open(edited(tmp_path, **{"added_tokens": [*own, *found], **changes}))


def length_of_long_texts(monkeypatch: pytest.MonkeyPatch, characters: int) -> None:
    for module in (text_borders, sentencepiece_vocabulary, vocabulary):
        monkeypatch.setattr(module, "LONG_TEXT", characters)


def made(kind: str, tmp_path: Path) -> Vocabulary:
    if kind == "tiktoken":
        return opened("tiktoken", tmp_path)
    if kind in MODELS:
        names, options = MODELS[kind]
        return Vocabulary.open(train(tmp_path, *names, **options))
    return with_added_tokens(tmp_path, **JSON_FILES[kind])


@pytest.mark.parametrize("kind", ["tiktoken", *JSON_FILES, *MODELS])
def test_parts_have_the_ids_of_the_whole(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = made(kind, tmp_path)
    expected = [tokenizer.encode(text).tolist() for text in TEXTS]
    for characters in (1, 4):
        length_of_long_texts(monkeypatch, characters)
        assert [tokenizer.encode(text).tolist() for text in TEXTS] == expected
        ids, lengths = tokenizer.encode_batch(TEXTS)
        assert (ids.tolist(), lengths.tolist()) == ([one for text in expected for one in text], list(map(len, expected)))
        assert sum(len(tokenizer.parts(text)) - 1 for text in TEXTS) > 300


def test_special_tokens_never_come_out_of_the_parts_of_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a Unigram model has its special pieces in the text too
    pieces = ["<unk>", "end", *"end, ".replace(" ", "\u0120")]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram([(piece, -len(piece) / 10) for piece in pieces], 0, False))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(["end"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "end"}), encoding="utf-8")
    opened_one = Vocabulary.open(tmp_path / "tokenizer.json")
    text = "e, end, n,end dn, " * 20
    expected = opened_one.encode(text).tolist()
    assert [pieces[one] for one in expected] == list(text.replace(" ", "\u0120"))
    length_of_long_texts(monkeypatch, 2)
    assert len(opened_one.parts(text)) > 50
    assert opened_one.encode(text).tolist() == expected


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {**BYTE_LEVEL, "add_prefix_space": True, "use_regex": True}},
        {"pre_tokenizer": split_by(r"\p{N}")},
        {"pre_tokenizer": None},
        {"normalizer": {"type": "Replace", "pattern": {"String": ","}, "content": "x"}},
        {
            "added_tokens": [
                {**added_token("<|end_of_text|>", 599), "special": True},
                {**added_token("a", 700), "special": False, "rstrip": True},
            ]
        },
    ],
)
def test_what_is_not_known_to_be_exact_is_not_cut(change: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = Vocabulary.open(edited(tmp_path, {"eos_token": "<|end_of_text|>"}, **change))
    text = "some words, " * 90_000
    assert tokenizer.parts(text) == [text]
    with pytest.raises(TextTooLong, match=r"a document of 1,080,000 bytes, .* encode 1,080,000 at once.* limit is 1,048,576: split it"):
        tokenizer.check_length(text)
    tokenizer.check_length(text[: 1 << 20])


def test_texts_are_only_as_long_as_their_longest_part(tmp_path: Path) -> None:
    for directory in ("json", "tiktoken", "sentencepiece", "unigram"):
        (tmp_path / directory).mkdir()
    words, run = "some words, " * 600_000, "a" * (1 << 20)
    tiktoken = opened("tiktoken", tmp_path / "tiktoken")
    for tokenizer in (opened("huggingface", tmp_path / "json"), tiktoken):
        tokenizer.check_length(words)
        tokenizer.check_length(f"{run[1:]} {run[1:]}")
        with pytest.raises(TextTooLong, match=r"2,097,154 bytes, of which this \w+ tokenizer has to encode 1,048,579 at once"):
            tokenizer.check_length(f"{run[1:]}, {run}a")
    pieces = opened("sentencepiece", tmp_path / "sentencepiece")
    pieces.check_length(words)
    pieces.check_length("\u65e5" * 3_000_000)
    unigram = Vocabulary.open(train(tmp_path / "unigram", "unigram", "identity", False, True))
    with pytest.raises(TextTooLong, match="the limit is 4,194,304"):
        unigram.check_length(words)
    Vocabulary.open_bytes().check_length(run * 20)
    other = TiktokenVocabulary.from_file(tiktoken.path or "", pattern=r"\p{L}+|\P{L}+")
    assert other.parts(words) == [words]


def test_a_border_is_only_where_nothing_can_go_over_it() -> None:
    assert pattern_borders(r"\p{L}+|\P{L}+") is None
    assert pattern_borders(None) is None
    borders = pattern_borders(LLAMA3_PATTERN)
    assert borders is not None
    assert [borders("don't, e\u0301, \u00e9. 12 x", start) for start in (1, 6, 11, 14)] == [5, None, None, None]
    spared = pattern_borders(GPT2_PATTERN, ["t, ", "x 1"])
    assert spared is not None
    assert [spared("at, all. x 1b2", start) for start in (1, 8, 10, 12)] == [7, 13, 13, 13]
    pieces = piece_borders(["ab", "bc", "cab"])
    assert [pieces("abcabbc", start) for start in (1, 6)] == [5, None]
    assert piece_borders([], {"b"})("abc", 1) == 2


def test_parts_are_about_as_long_as_they_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_borders, "LONG_TEXT", 10)
    text = "aaa bbb ccc ddd eee fff ggg hhh"
    assert parts_of_text(text, pattern_borders(GPT2_PATTERN)) == ["aaa bbb ccc", " ddd eee fff", " ggg hhh"]
    assert parts_of_text(text, None) == [text]
    asked: list[list[str]] = []

    def encode(parts: list[str]) -> Iterator[np.ndarray]:
        asked.append(parts)
        return (np.array([len(part)], np.uint32) for part in parts)

    ids = encode_parts(["abc", "", text, "defg", "hijk"], lambda long: parts_of_text(long, pattern_borders(GPT2_PATTERN)), encode)
    assert [one.tolist() for one in ids] == [[3], [0], [11, 12, 8], [4], [4]]
    assert asked == [["abc", ""], ["aaa bbb ccc"], [" ddd eee fff"], [" ggg hhh"], ["defg", "hijk"]]
