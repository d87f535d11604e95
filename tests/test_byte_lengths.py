"""The UTF-8 bytes that ids stand for, of every kind of tokenizer, against the size of the text itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from model.vocabularies.byte_pairs import LLAMA3_PATTERN, BytePairs, tiktoken_file, tokenizer_json
from model.vocabularies.sentencepiece_json import SentencePieceJson
from model.vocabularies.sentencepiece_vocabulary import SentencePieceVocabulary
from model.vocabularies.vocabulary import Vocabulary
from tests.synthetic_vocabulary import small_byte_pairs, small_tiktoken, small_vocabulary
from tests.test_hf_tokenizer import train

TEXTS = [
    "To be, or not to be: that is the question",
    " leading,  doubled and trailing  ",
    "\n\n\tlines\r\nand\ttabs\n",
    "na\u00efve caf\u00e9 \u20ac 12,345 \u00bd",
    "\u0427\u0442\u043e \u0434\u0435\u043b\u0430\u0442\u044c? \u039f\u1f50\u03c7\u1f76 \u1f00\u03c1\u03c7\u03ae",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\u65e5\u672c\u8a9e\u306e\u6587 \uc548\ub155 \u4e16\u754c",
    "\U0001f642\U0001f469\u200d\U0001f4bb \0\x7f \u1e9e",
    "<s></s> <unk> <0x0A> <|begin_of_text|>",
    "",
]


def size(vocabulary: Vocabulary, text: str) -> int:
    """What the lengths say of a text that stands at the beginning of a document."""
    ids = vocabulary.encode(text)
    return int(vocabulary.opening_byte_lengths()[ids[:1]].sum() + vocabulary.byte_lengths()[ids[1:]].sum())


def json_vocabulary(tmp_path: Path, tokenizer: Tokenizer | dict[str, Any]) -> Vocabulary:
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_str() if isinstance(tokenizer, Tokenizer) else json.dumps(tokenizer))
    return Vocabulary.open(path)


def written(tmp_path: Path, content: bytes) -> Vocabulary:
    (tmp_path / "file").write_bytes(content)
    return Vocabulary.open(tmp_path / "file")


@pytest.mark.parametrize("kind", ["bytes", "tiktoken", "byte-level", "sentencepiece", "sentencepiece without a prefix"])
def test_the_lengths_of_a_texts_ids_add_up_to_its_bytes(tmp_path: Path, kind: str) -> None:
    if kind == "bytes":
        vocabulary = Vocabulary.open_bytes()
    elif kind == "sentencepiece without a prefix":
        vocabulary = Vocabulary.open(train(tmp_path, "bpe", "identity", False, True, add_dummy_prefix=False))
    else:
        vocabulary = written(
            tmp_path, {"tiktoken": small_tiktoken, "byte-level": small_byte_pairs, "sentencepiece": small_vocabulary}[kind]()
        )
    lengths = vocabulary.byte_lengths()
    assert (lengths.dtype, lengths.shape) == (np.int64, (vocabulary.vocab_size,))
    for text in TEXTS:
        assert size(vocabulary, text) == len(text.encode()), text
    assert not lengths[list(vocabulary.special_tokens.values())].any()
    # the space that it puts in front is one more byte for each text that does not begin a document
    prefix = kind == "sentencepiece"
    assert lengths[vocabulary.encode(TEXTS[0])].sum() == len(TEXTS[0]) + prefix
    assert (lengths != vocabulary.opening_byte_lengths()).any() == prefix


def test_a_token_of_characters_that_take_several_bytes_has_all_of_them(tmp_path: Path) -> None:
    tokens = ["\u00e9".encode(), "\u65e5".encode()[:2], "\u65e5".encode(), " \u65e5".encode()]
    ranks = {token: rank for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), *tokens])}
    tiktoken = written(tmp_path, tiktoken_file(ranks))
    byte_level = json_vocabulary(tmp_path, tokenizer_json(BytePairs(ranks, LLAMA3_PATTERN), {"<s>": 260, "</s>": 261}, bos="<s>"))
    for vocabulary in (tiktoken, byte_level):
        assert vocabulary.byte_lengths()[254:].tolist() == [1, 1, 2, 2, 3, 4, 0, 0]
        assert max(vocabulary.encode("\u00e9 \u65e5")) == 259
        assert size(vocabulary, "\u00e9 \u65e5") == 6


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_of_text_that_is_normalized_the_bytes_are_those_that_come_back(tmp_path: Path, model_type: str) -> None:
    vocabulary = Vocabulary.open(train(tmp_path, model_type, "nmt_nfkc", True, True, user_defined_symbols=["<tool>", "\u00e9e"]))
    differ = 0
    for text in [*TEXTS, "\uff21\ufb01 \u2581x", "a<tool>caf\u00e9e <tool>"]:
        decoded = vocabulary.decode(vocabulary.encode(text))
        assert size(vocabulary, text) == len(decoded.encode()), text
        differ += decoded != text
    assert differ > 3


def test_an_unknown_token_has_no_bytes_and_the_text_around_it_has_its_own(tmp_path: Path) -> None:
    vocabulary = Vocabulary.open(train(tmp_path, "unigram", "identity", False, False))
    known = "the sea"
    assert size(vocabulary, known) == len(known)
    assert size(vocabulary, f"{known} \u65e5\u672c {known}") == 2 * (len(known) + 1)
    assert vocabulary.byte_lengths()[vocabulary.unk_id] == 0


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("prefix", [True, False])
def test_a_tokenizer_json_has_the_lengths_of_the_sentencepiece_model_it_was_made_of(tmp_path: Path, model_type: str, prefix: bool) -> None:
    model = train(tmp_path, model_type, "identity", False, True, add_dummy_prefix=prefix, user_defined_symbols=["<tool>"])
    theirs = SentencePieceVocabulary.from_file(model)
    assert theirs.unk_id is not None
    ours = json_vocabulary(tmp_path, SentencePieceJson(theirs.data()).content(bos_id=theirs.bos_id, unk_id=theirs.unk_id))
    np.testing.assert_array_equal(ours.byte_lengths(), theirs.byte_lengths())
    np.testing.assert_array_equal(ours.opening_byte_lengths(), theirs.opening_byte_lengths())
    for text in TEXTS:
        # names of bytes and special tokens in a text are pieces to the library's Unigram model, and are encoded otherwise
        assert size(ours, text) == len(text.encode()) or (model_type == "unigram" and "<s>" in text), text


def test_a_byte_level_tokenizer_json_with_more_than_bytes_in_it(tmp_path: Path) -> None:
    content = json.loads(small_byte_pairs())
    # as text, \u00e9 is two bytes, and as a byte-level spelling one
    added = {**content["added_tokens"][0], "id": 600, "content": "\u00e9t\u00e9", "special": False}
    prefixed = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    plain = json_vocabulary(tmp_path, {**content, "added_tokens": [*content["added_tokens"], added]})
    assert plain.byte_lengths()[600] == 5
    assert size(plain, "un \u00e9t\u00e9 \u00e9") == len("un \u00e9t\u00e9 \u00e9".encode())
    vocabulary = json_vocabulary(tmp_path, {**content, "pre_tokenizer": prefixed})
    for text in TEXTS:
        # one space in front of a text is the same as none
        assert size(vocabulary, text) == len(text.removeprefix(" ").encode()), text
    plain_word, prefixed_word = (one.encode("to")[0] for one in (plain, vocabulary))
    assert plain_word != prefixed_word


def words(**parts: Any) -> Tokenizer:
    """A tokenizer with the given parts and special tokens, which its model has to have as its first ids."""
    tokenizer = Tokenizer(parts.pop("model"))
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def ids(*names: str) -> dict[str, int]:
    return {name: index for index, name in enumerate(("<s>", "</s>", "<unk>", *names))}


def unigram(*names: str) -> models.Unigram:
    return models.Unigram([(name, -1.0) for name in ids(*names)], 2, False)


END = "</w>"
KINDS: dict[str, tuple[Tokenizer, list[str]]] = {
    "metaspace": (
        words(
            model=unigram("\u2581", "\u2581ab", *"abc\u00e9\u65e5"),
            pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first"),
            decoder=decoders.Metaspace(prepend_scheme="first"),
        ),
        ["ab c", "\u65e5 ab\u00e9  ab", "c"],
    ),
    "word pieces": (
        words(
            model=models.WordPiece(ids("ab", "c", "##c", "##\u00e9", ".", "\u65e5"), unk_token="<unk>"),
            normalizer=normalizers.Lowercase(),
            pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
            decoder=decoders.WordPiece(),
        ),
        ["ab abc", "AB c\u00e9 ab.", "c \u65e5 c."],
    ),
    "words": (
        words(model=models.WordLevel(ids("ab", "caf\u00e9", "\u65e5"), unk_token="<unk>"), pre_tokenizer=pre_tokenizers.Whitespace()),
        ["ab caf\u00e9 ab", "\u65e5", "caf\u00e9 \u65e5"],
    ),
    "ends of words": (
        words(
            model=models.BPE(
                ids("a", "b</w>", "c</w>", "ab</w>", "\u00e9</w>"), [("a", "b</w>")], unk_token="<unk>", end_of_word_suffix=END
            ),
            pre_tokenizer=pre_tokenizers.WhitespaceSplit(),
            decoder=decoders.BPEDecoder(suffix=END),
        ),
        ["ab c", "c ab \u00e9 ab", "ac"],
    ),
    "letters": (words(model=unigram(*"ab \u00e9\u65e5")), ["ab a", " b \u00e9\u65e5 "]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_other_tokenizer_json_is_counted_as_its_decoder_gives_text_back(tmp_path: Path, kind: str) -> None:
    tokenizer, texts = KINDS[kind]
    vocabulary = json_vocabulary(tmp_path, tokenizer)
    for text in texts:
        assert 2 not in vocabulary.encode(text), "all of it is known"
        assert size(vocabulary, text) == len(text.encode()), text
    assert vocabulary.byte_lengths()[:3].tolist() == [0, 0, 0]


def test_a_decoder_that_gives_no_text_back_is_refused(tmp_path: Path) -> None:
    tokenizer = words(model=models.WordLevel(ids("-", "+"), unk_token="<unk>"), pre_tokenizer=pre_tokenizers.Whitespace())
    with pytest.raises(ValueError, match="has no token that is a word or a letter"):
        json_vocabulary(tmp_path, tokenizer).byte_lengths()
