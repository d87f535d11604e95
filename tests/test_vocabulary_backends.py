"""Every kind of tokenizer behind one class: the ids of its own library, special ids never from text, digests, refusals."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
import tokenizers
from sentencepiece import SentencePieceProcessor

from model.vocabularies import byte_pairs
from model.vocabularies.byte_pairs import byte_pairs_of, read_ranks, tokenizer_json
from model.vocabularies.huggingface_vocabulary import HuggingFaceVocabulary
from model.vocabularies.sentencepiece_vocabulary import SentencePieceVocabulary
from model.vocabularies.tiktoken_vocabulary import TiktokenVocabulary
from model.vocabularies.vocabulary import Vocabulary
from tests.synthetic_vocabulary import small_byte_pairs, small_tiktoken, small_vocabulary
from tests.test_hf_tokenizer import train

CHECKOUT = Path(__file__).resolve().parent.parent
FILES = {
    "sentencepiece": ("some.model", small_vocabulary),
    "huggingface": ("tokenizer.json", small_byte_pairs),
    "tiktoken": ("ranks.tiktoken", small_tiktoken),
}
TEXTS = [
    "",
    "To be, or not to be",
    " two  spaces\n\n\tand\r\nlines ",
    "na\u00efve caf\u00e9 \u65e5\u672c\u8a9e \U0001f642 \0 \x7f",
    "<s></s> <unk> <0x0A> <pad> <|begin_of_text|>a<|end_of_text|>",
    "12345 don't I'LL \u017f\u2581x",
]


@pytest.fixture(params=[*FILES, "bytes"])
def vocabulary(request: pytest.FixtureRequest, tmp_path: Path) -> Vocabulary:
    """One of each kind, from a bare file."""
    return opened(request.param, tmp_path)


def opened(kind: str, directory: Path) -> Vocabulary:
    if kind == "bytes":
        return Vocabulary.open_bytes()
    name, content = FILES[kind]
    (directory / name).write_bytes(content())
    return Vocabulary.open(directory / name)


def library(kind: str, path: Path | None) -> Callable[[str], list[int]]:
    """The ids that the kind's own library gives to plain text."""
    if kind == "sentencepiece":
        return SentencePieceProcessor(model_file=str(path)).encode
    if kind == "huggingface":
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        tokenizer.encode_special_tokens = True
        return lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    if kind == "tiktoken":
        ranks, special = read_ranks(small_tiktoken(), ""), {"<|begin_of_text|>": 598, "<|end_of_text|>": 599}
        return tiktoken.Encoding("own", pat_str=byte_pairs.LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special).encode_ordinary
    return lambda text: [byte + 3 for byte in text.encode()]


def test_ids_are_those_of_the_library_and_come_back_as_text(vocabulary: Vocabulary) -> None:
    expected = list(map(library(vocabulary.kind, vocabulary.path), TEXTS))
    ids, lengths = vocabulary.encode_batch(TEXTS)
    assert (ids.dtype, lengths.dtype) == (np.uint32, np.int64)
    assert ids.tolist() == [one for text in expected for one in text]
    assert lengths.tolist() == [len(text) for text in expected]
    assert vocabulary.encode(TEXTS[3]).tolist() == expected[3]
    assert [part.tolist() for part in vocabulary.encode_batch([])] == [[], []]
    # BOS and EOS have no text, and rows past the vocabulary, which a padded embedding has, have none either
    for text in TEXTS[:-1]:
        before = [] if vocabulary.bos_id is None else [vocabulary.bos_id]
        assert vocabulary.decode([*before, *vocabulary.encode(text), vocabulary.eos_id, vocabulary.vocab_size + 7]) == text


def test_text_that_looks_like_a_special_token_is_plain_text(vocabulary: Vocabulary) -> None:
    assert {vocabulary.bos_id, vocabulary.eos_id} <= set(vocabulary.special_tokens.values())
    for name, token_id in vocabulary.special_tokens.items():
        assert token_id < vocabulary.vocab_size
        ids = vocabulary.encode(f"a{name} {name}b")
        assert not set(ids.tolist()) & set(vocabulary.special_tokens.values())
        assert vocabulary.decode(ids) == f"a{name} {name}b"


def test_half_a_surrogate_pair_is_refused_by_every_kind(vocabulary: Vocabulary) -> None:
    with pytest.raises(UnicodeEncodeError):
        vocabulary.encode_batch(["fine", "half \ud800 a pair"])


def test_a_directory_is_the_file_and_its_record(vocabulary: Vocabulary, tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    vocabulary.write(made)
    again = Vocabulary.open(made)
    assert (again.kind, again.digest, again.record) == (vocabulary.kind, vocabulary.digest, vocabulary.record)
    assert np.array_equal(again.encode_batch(TEXTS)[0], vocabulary.encode_batch(TEXTS)[0])
    if vocabulary.path is None:
        assert {path.name for path in made.iterdir()} == {"vocabulary.json"}
        return
    file = made / str(vocabulary.record.file)
    with file.open("ab") as stream:
        stream.write(b"\n")
    with pytest.raises(ValueError, match=r"the file was changed or damaged; run the tokenizer step again"):
        Vocabulary.open(made)
    with pytest.raises(ValueError, match="changed while in use"):
        again.data()
    file.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        Vocabulary.open(made)


def test_the_digest_covers_all_that_changes_an_id_and_nothing_else(tmp_path: Path) -> None:
    record = opened("tiktoken", tmp_path).record
    changes: list[dict[str, Any]] = [
        {"file_sha256": "0" * 64},
        {"bos_id": None},
        {"eos_id": 598},
        {"pattern": r"\p{L}+|\P{L}+"},
        {"special_tokens": {"<|begin_of_text|>": 599, "<|end_of_text|>": 598}},
        {"vocab_size": 601},
        {"kind": "huggingface"},
    ]
    digests = {record.digest, *(replace(record, **change).digest for change in changes)}
    assert len(digests) == 1 + len(changes)
    assert replace(record, file="elsewhere.tiktoken", pad_id=3).digest == record.digest
    # what stores were made with is compared with this: it may only change together with a schema
    assert Vocabulary.open_bytes().digest == "59fa69c1110d534a0116029a8d46f505a038f55412f3e0e85bf9aeadf55b2e19"


def test_kinds_are_told_by_content_not_by_name(tmp_path: Path) -> None:
    for kind, (_, content) in FILES.items():
        (tmp_path / "tokenizer.model").write_bytes(content())
        assert Vocabulary.open(tmp_path / "tokenizer.model").kind == kind


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no bytes"),
        (b"junk", "is not a SentencePiece model"),
        (b"{", "is not JSON"),
        (b"{}", "has no model with a vocab"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0}}}', "is not a tokenizer.json that the tokenizers library reads"),
        (b"YQ== 0\nYg== 1\n", "has no token for the byte 0x00"),
        (b"YQ== 0\nnot base64 1\n", "line 2 is not a base64 token and its rank"),
    ],
)
def test_files_that_are_no_tokenizer_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        Vocabulary.open(path)
    assert str(path) in str(raised.value)


def test_a_directory_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vocabulary\.json is missing: give a directory that the tokenizer step wrote"):
        Vocabulary.open(tmp_path)
    for content in ("[]", "{", json.dumps({"kind": "bytes"})):
        (tmp_path / "vocabulary.json").write_text(content)
        with pytest.raises(ValueError, match="cannot be used"):
            Vocabulary.open(tmp_path)


def edited(tmp_path: Path, config: dict[str, Any] | None = None, **changes: Any) -> Path:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(small_byte_pairs()), **changes}))
    (tmp_path / "tokenizer_config.json").unlink(missing_ok=True)
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_bos_and_eos_of_a_tokenizer_json(tmp_path: Path) -> None:
    def ids(config: dict[str, Any] | None = None, **named: str) -> tuple[int | None, int]:
        vocabulary = HuggingFaceVocabulary.from_file(edited(tmp_path, config), **named)
        return vocabulary.bos_id, vocabulary.eos_id

    begin, end = "<|begin_of_text|>", "<|end_of_text|>"
    assert ids() == (598, 599)
    assert ids({"bos_token": {"content": begin}, "eos_token": end, "pad_token": "<nowhere>"}) == (598, 599)
    assert ids({"bos_token": None, "eos_token": end}) == (None, 599)
    assert ids({"bos_token": begin, "add_bos_token": False, "eos_token": begin}) == (None, 598)
    assert ids({"bos_token": begin, "eos_token": begin}, eos_token=end) == (598, 599)
    token = json.loads(small_byte_pairs())["added_tokens"][1]
    path = edited(tmp_path, added_tokens=[{**token, "content": "<|endoftext|>"}])
    assert (Vocabulary.open(path).bos_id, Vocabulary.open(path).eos_id) == (None, 599)
    with pytest.raises(ValueError, match=r"set tokenizer\.eos_token, and tokenizer\.bos_token where it has one"):
        Vocabulary.open(edited(tmp_path, added_tokens=[]))
    with pytest.raises(ValueError, match="bos_token='<s>' is not a token of"):
        HuggingFaceVocabulary.from_file(edited(tmp_path), bos_token="<s>")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json cannot be used"):
        Vocabulary.open(edited(tmp_path, {"eos_token": 3}))


def test_a_tokenizer_json_does_nothing_but_split_text(tmp_path: Path) -> None:
    plain = Vocabulary.open(edited(tmp_path)).encode("To be, or not to be")
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    assert (
        Vocabulary.open(edited(tmp_path, truncation=truncation, padding=padding)).encode("To be, or not to be").tolist() == plain.tolist()
    )


def test_a_unigram_tokenizer_json_gives_no_special_id_for_text_either(tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", *"<>s/ab"]
    vocab = [(piece, 0.0 if len(piece) > 1 else -1.0) for piece in pieces]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(vocab, 0, False))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.encode_special_tokens = True
    assert 2 in tokenizer.encode("ab</s>").ids  # the library's own answer
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = Vocabulary.open(tmp_path / "tokenizer.json")
    ids, lengths = vocabulary.encode_batch(["a", "ab</s>a", "b"])
    assert [pieces[one] for one in ids] == [*"a", *"ab</s>a", *"b"]
    assert lengths.tolist() == [1, 7, 1]


def test_what_tiktoken_gives_up_on_is_encoded_all_the_same(tmp_path: Path) -> None:
    vocabulary = opened("tiktoken", tmp_path)
    text = " " * 1_000_000
    assert vocabulary.decode(vocabulary.encode(text)) == text
    other = opened("huggingface", tmp_path)
    assert np.array_equal(vocabulary.encode(text), other.encode(text))


def test_tiktoken_files_and_tokenizer_json_are_two_spellings_of_one_thing(tmp_path: Path) -> None:
    ranks = read_ranks(small_tiktoken(), "x")
    assert byte_pairs.tiktoken_file(ranks) == small_tiktoken()
    pairs = byte_pairs.BytePairs(ranks, byte_pairs.LLAMA3_PATTERN)
    assert byte_pairs_of(tokenizer_json(pairs, {"<|end|>": 700})) == pairs
    assert base64.b64decode(small_tiktoken().splitlines()[0].split()[0]) == b"!"


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": None},
        {"added_tokens": [{**byte_pairs.added_token("  ", 599), "special": False}]},
    ],
)
def test_files_that_tiktoken_would_encode_otherwise_are_told(change: dict[str, Any]) -> None:
    content = json.loads(small_byte_pairs())
    assert byte_pairs_of(content) is not None
    assert byte_pairs_of({**content, **change}) is None
    merges = content["model"]["merges"]
    assert byte_pairs_of({**content, "model": {**content["model"], "merges": merges[::-1]}}) is None
    assert byte_pairs_of({**content, "model": {**content["model"], "merges": merges[:-40]}}) is None


def test_special_tokens_of_a_tiktoken_file(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(small_tiktoken())
    vocabulary = TiktokenVocabulary.from_file(tmp_path / "t", special_tokens=("<a>", "<b>", "<c>"), bos_token=None, eos_token="<b>")
    assert (vocabulary.vocab_size, vocabulary.bos_id, vocabulary.eos_id) == (601, None, 599)
    assert vocabulary.special_tokens == {"<a>": 598, "<b>": 599, "<c>": 600}
    assert vocabulary.names()[600] == "<c>"
    with pytest.raises(ValueError, match="names a token twice"):
        TiktokenVocabulary.from_file(tmp_path / "t", special_tokens=("<a>", "<a>"), bos_token=None, eos_token="<a>")
    with pytest.raises(ValueError, match="eos_token='<b>' is none of special_tokens"):
        TiktokenVocabulary.from_file(tmp_path / "t", special_tokens=("<a>",), bos_token=None, eos_token="<b>")
    with pytest.raises(ValueError, match=r"pattern='\(' cannot be used"):
        TiktokenVocabulary.from_file(tmp_path / "t", pattern="(")


def test_a_sentencepiece_model_without_eos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="defines no EOS"):
        SentencePieceVocabulary.from_file(train(tmp_path, "bpe", "identity", False, True, eos_id=-1))


def test_each_kind_loads_its_own_library_only(tmp_path: Path) -> None:
    for kind in FILES:
        (tmp_path / kind).mkdir()
        opened(kind, tmp_path).write(tmp_path / kind)
    code = (
        "import sys; from model.vocabularies.vocabulary import Vocabulary; kinds = sys.argv[2:]\n"
        "assert not {'sentencepiece', 'tokenizers', 'tiktoken', 'jax'} & set(sys.modules)\n"
        "for kind in kinds: Vocabulary.open(sys.argv[1] + '/' + kind)\n"
        "assert not {'sentencepiece', 'tokenizers', 'tiktoken'} & set(sys.modules)\n"
        "Vocabulary.open(sys.argv[1] + '/tiktoken').encode('a')\n"
        "assert {'sentencepiece', 'tokenizers', 'tiktoken'} & set(sys.modules) == {'tiktoken'}"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path), *FILES], cwd=CHECKOUT, check=True)
