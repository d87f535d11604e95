"""The tokenizer files: contents, refusals, and the same ids in the `tokenizers` library and in transformers."""

import io
import json
import random
from pathlib import Path
from typing import Any

import jax
import pytest
import sentencepiece
import tokenizers

from model.config import LlamaConfig
from model.hf import save_hf
from model.hf_config import SpecialIds
from model.hf_tokenizer import HfTokenizer, exportable
from model.parameters import init_params
from model.vocabularies.vocabulary import Vocabulary
from tests.synthetic_vocabulary import small_byte_pairs, small_tiktoken, small_vocabulary

SENTENCE = "the quick brown fox jumps over a lazy dog while seventeen zebras quietly examine my broken typewriter and hum an old song again"
WORDS = SENTENCE.split()
KINDS = [
    ("bpe", "identity", False, True),
    ("bpe", "nmt_nfkc", True, True),
    ("unigram", "nmt_nfkc", True, False),
    ("unigram", "identity", True, True),
]
TEXTS = [
    *(
        "",
        " ",
        "   ",
        "x",
        "Hello, world!",
        "  two  spaces ",
        " lead",
        "trail ",
        "a\tb",
        "\n\nA\n",
        "line\n  line",
        "\r\n",
        "\u2581x",
        "\x00a",
    ),
    *(
        "na\u00efve caf\u00e9 \u2014 \u6771\u4eac \U0001f642",
        "\ufb01ne \u00bd A\u030a",
        "a\u00a0b\u3000c",
        "\u200bzero",
        "the the  the   the",
    ),
]


def train(
    directory: Path, model_type: str, normalization: str, remove_extra_whitespaces: bool, byte_fallback: bool, **options: Any
) -> Path:
    """A small SentencePiece model of its own, as a file."""
    rng, model = random.Random(0), io.BytesIO()
    lines = [" ".join(rng.choice(WORDS) for _ in range(12)) for _ in range(400)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        **{
            "vocab_size": 400 if byte_fallback else 140,
            "model_type": model_type,
            "byte_fallback": byte_fallback,
            "normalization_rule_name": normalization,
            "remove_extra_whitespaces": remove_extra_whitespaces,
            "hard_vocab_limit": False,
            "num_threads": 1,
            "minloglevel": 2,
            **options,
        },
    )
    path = directory / "spm.model"
    path.write_bytes(model.getvalue())
    return path


def texts() -> list[str]:
    rng = random.Random(1)
    parts = [
        " ",
        "  ",
        "\n",
        "\t",
        "a",
        "e",
        "the ",
        "quick",
        "zebras ",
        "\u00e9",
        "\u6771",
        "\U0001f642",
        ".",
        "'s",
        "\u00bd",
        "\ufb01",
        "\u3000",
    ]
    return TEXTS + ["".join(rng.choices(parts, k=rng.randint(1, 20))) for _ in range(300)]


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_json_encodes_and_decodes_as_sentencepiece(kind: tuple, tmp_path: Path) -> None:
    path = train(tmp_path, *kind)
    exported = HfTokenizer(path, vocab_size=400, seq_len=64)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(exported.tokenizer_json()))
    ours = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert theirs.get_vocab_size() == ours.get_piece_size()
    for text in texts():
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text), repr(text)
    assert theirs.encode("the fox").ids == [ours.bos_id(), *ours.encode("the fox")]
    assert theirs.decode(theirs.encode("the quick fox").ids) == "the quick fox"


def test_the_four_kinds_differ_from_each_other(tmp_path: Path) -> None:
    ids = set()
    for kind in KINDS:
        ids.add(tuple(sentencepiece.SentencePieceProcessor(model_file=str(train(tmp_path, *kind))).encode("  two\n  brown zebras")))
    assert len(ids) == 4


def test_files_written_beside_an_export(tmp_path: Path) -> None:
    path = train(tmp_path, "bpe", "identity", False, True, pad_id=3)
    config = LlamaConfig(seq_len=64, hidden_dim=16, intermediate_dim=16, num_layers=1, num_heads=2, num_kv_heads=2, vocab_size=400)
    save_hf(tmp_path / "hf", config, init_params(config, jax.random.key(0)), tokenizer=path)
    read = {
        name: json.loads((tmp_path / "hf" / f"{name}.json").read_text()) for name in ("config", "generation_config", "tokenizer_config")
    }
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == path.read_bytes()
    assert read["generation_config"] == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    assert {key: read["config"][key] for key in read["generation_config"]} == read["generation_config"]
    named = {key: read["tokenizer_config"][key] for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    assert named == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    assert read["tokenizer_config"]["add_bos_token"] is True
    assert read["tokenizer_config"]["add_eos_token"] is False
    assert read["tokenizer_config"]["model_max_length"] == 64


def test_special_tokens_that_the_model_lacks_are_left_out(tmp_path: Path) -> None:
    exported = HfTokenizer(train(tmp_path, "bpe", "identity", False, True, bos_id=-1), vocab_size=400, seq_len=64)
    assert exported.special == SpecialIds(bos=None, eos=2, pad=None)
    assert not {"bos_token", "pad_token"} & exported.tokenizer_config().keys()
    assert exported.tokenizer_json()["post_processor"] is None


def test_unusable_tokenizers_are_named(tmp_path: Path) -> None:
    path = train(tmp_path, "bpe", "identity", False, True)
    with pytest.raises(ValueError, match=r"ids, more than model.vocab_size=100"):
        HfTokenizer(path, vocab_size=100, seq_len=64)
    suffixed = train(tmp_path, "bpe", "identity", False, True, treat_whitespace_as_suffix=True)
    with pytest.raises(ValueError, match="treat_whitespace_as_suffix=true: train it with false"):
        HfTokenizer(suffixed, vocab_size=400, seq_len=64)
    with pytest.raises(ValueError, match="model_type=CHAR"):
        HfTokenizer(train(tmp_path, "char", "identity", False, False), vocab_size=400, seq_len=64)
    path.write_bytes(b"no model")
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        HfTokenizer(path, vocab_size=400, seq_len=64)


BYTES = "bytes"
FILES = {"sentencepiece": small_vocabulary, "huggingface": small_byte_pairs, "tiktoken": small_tiktoken}
PLAIN = [*(text for text in TEXTS if "\u2581" not in text), "<s> and </s>, <|end_of_text|", "'S 1234 I'll"]


def directory_of(kind: str, tmp_path: Path) -> Path:
    """A tokenizer directory of that kind."""
    if kind == BYTES:
        vocabulary = Vocabulary.open_bytes()
    else:
        (tmp_path / "file").write_bytes(FILES[kind]())
        vocabulary = Vocabulary.open(tmp_path / "file")
    (tmp_path / kind).mkdir()
    vocabulary.write(tmp_path / kind)
    return tmp_path / kind


@pytest.mark.parametrize("kind", [*FILES, BYTES])
def test_every_kind_is_written_with_the_same_ids_and_one_bos(kind: str, tmp_path: Path) -> None:
    directory = directory_of(kind, tmp_path)
    vocabulary = Vocabulary.open(directory)
    assert exportable(vocabulary) is None
    exported = HfTokenizer(directory, vocab_size=700, seq_len=64)
    (tmp_path / "hf").mkdir()
    exported.write(tmp_path / "hf")
    written = {"tokenizer.json", "tokenizer_config.json"} | ({"tokenizer.model"} if kind == "sentencepiece" else set())
    assert {path.name for path in (tmp_path / "hf").iterdir()} == written
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    for text in PLAIN:
        if any(name in text for name in vocabulary.special_tokens):
            continue  # transformers finds special tokens in text
        assert theirs.encode(text).ids == [vocabulary.bos_id, *vocabulary.encode(text).tolist()], repr(text)
        assert theirs.encode(text, add_special_tokens=False).ids == vocabulary.encode(text).tolist()
    assert theirs.decode(theirs.encode("caf\u00e9 \U0001f642").ids) == "caf\u00e9 \U0001f642"
    assert theirs.get_vocab_size() == vocabulary.vocab_size
    assert {name: theirs.token_to_id(name) for name in vocabulary.special_tokens} == vocabulary.special_tokens
    config = exported.tokenizer_config()
    assert [vocabulary.special_tokens[config[field]] for field in ("bos_token", "eos_token")] == [vocabulary.bos_id, vocabulary.eos_id]
    # and what was written is a tokenizer that can be trained with
    again = Vocabulary.open(tmp_path / "hf" / "tokenizer.json")
    assert (again.bos_id, again.eos_id, again.vocab_size) == (vocabulary.bos_id, vocabulary.eos_id, vocabulary.vocab_size)


def test_the_post_processor_of_a_tokenizer_json_is_replaced(tmp_path: Path) -> None:
    content = json.loads(small_byte_pairs())
    end = {"SpecialToken": {"id": "<|end_of_text|>", "type_id": 0}}
    template = content["post_processor"]
    template["single"] = [*template["single"], end, end]
    template["special_tokens"]["<|end_of_text|>"] = {"id": "<|end_of_text|>", "ids": [599], "tokens": ["<|end_of_text|>"]}
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, "truncation": truncation}))
    theirs = tokenizers.Tokenizer.from_str(
        json.dumps(HfTokenizer(tmp_path / "tokenizer.json", vocab_size=600, seq_len=64).tokenizer_json())
    )
    vocabulary = Vocabulary.open(tmp_path / "tokenizer.json")
    assert theirs.encode("to be or not to be").ids == [598, *vocabulary.encode("to be or not to be").tolist()]


@pytest.mark.oracle
@pytest.mark.parametrize("kind", [*FILES, BYTES])
def test_transformers_loads_every_kind(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'prefect-llama[hf]'")
    directory = directory_of(kind, tmp_path)
    vocabulary = Vocabulary.open(directory)
    config = LlamaConfig(seq_len=64, hidden_dim=16, intermediate_dim=16, num_layers=1, num_heads=2, num_kv_heads=2, vocab_size=700)
    save_hf(tmp_path / "hf", config, init_params(config, jax.random.key(0)), tokenizer=directory)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id)
    for text in ("To be, or not to be", "  two\n\n spaces caf\u00e9 \U0001f642", "12345 I'LL"):
        ids = theirs(text)["input_ids"]
        assert ids == [vocabulary.bos_id, *vocabulary.encode(text).tolist()]
        assert theirs.decode(ids, skip_special_tokens=True) == text
