"""Fast encoders: the ids of the vocabulary's own library on 20,000 hostile strings, and what happens where they are not."""

from __future__ import annotations

import itertools
import json
import random
import sys
import threading
import weakref
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from model.vocabularies import fast_encoders, guarded_encoder
from model.vocabularies.accelerated_encoder import CheckedEncoder
from model.vocabularies.fast_encoders import GigatokenEncoder
from model.vocabularies.sentencepiece_json import SentencePieceJson
from model.vocabularies.vocabulary import Encoded, Vocabulary, joined, parts_of
from tasks.sources.local_files import PACKAGED_TEXTS
from tasks.vocabularies import SentencePieceTraining
from tasks.vocabulary import train_sentencepiece
from tests.test_hf_tokenizer import train
from tests.test_vocabulary_backends import FILES, edited, library, opened

PIECES = (
    *(
        "hello",
        " world",
        "the",
        " ",
        "  ",
        "   ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "\r",
        " \n ",
        "\u00a0",
        "\u3000",
        "\u2028",
        "\u200b",
        "\ufeff",
    ),
    *("'s", "'S", "I'LL", "don't", "\u017f", "1", "12", "1234", "3.14", "\u0967\u0968", "\u00bd", "\u2167", "--", "==== ", "_", "..."),
    *(
        "\x00",
        "\x01",
        "\x7f",
        "\x85",
        "\u00e9",
        "e\u0301",
        "\u0130",
        "\u00df",
        "\ufb01",
        "q\u0323\u0307",
        "\u0391\u03b3",
        "\u65e5\u672c\u8a9e",
    ),
    *("\ud55c\uad6d", "\u0627\u0644\u0639", "\u0939\u093f\u0928\u094d", "\ufdfa", "\U0001f642", "\U0001f468\u200d\U0001f469", "\ue000"),
    *("<s>", "</s>", "<unk>", "<0x41>", "<|begin_of_text|>", "<|end_of_text|>", "\u2581", "\u2581\u2581x", "a" * 50, " " * 70, "9" * 40),
    # letters and digits that Unicode has had for a few years only: the libraries do not agree about them
    *("\U00011de0\U00011de1", "\U00011dda", "\U00010d40\U00010d41", "\u1c89", "\ua7ce", "\U0001fae9", "\U00016ea0"),
)


def hostile(number: int) -> list[str]:
    """Strings of up to some hundred characters, always the same ones."""
    draw = random.Random(0)
    strings = [""]
    for _ in range(number - 1):
        parts = draw.choices(PIECES, k=draw.randint(1, 12))
        if draw.random() < 0.1:
            low, high = draw.choice([(0x20, 0x2FF), (0x300, 0xD7FF), (0xE000, 0xFFFF), (0x1F300, 0x1FAFF)])
            parts += [chr(draw.randint(low, high)) for _ in range(8)]
        strings.append("".join(parts))
    return strings


STRINGS = hostile(20_000)


@pytest.fixture(params=FILES)
def vocabulary(request: pytest.FixtureRequest, tmp_path: Path) -> Vocabulary:
    return opened(request.param, tmp_path)


def same(first: Encoded, second: Encoded) -> bool:
    return np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])


@pytest.mark.parametrize("accelerator", ["auto", "none"])
def test_ids_are_the_librarys_on_hostile_strings(vocabulary: Vocabulary, accelerator: Literal["auto", "none"]) -> None:
    if accelerator == "auto":
        pytest.importorskip("gigatoken", reason="gigatoken is not installed: pip install 'prefect-llama[fast]'")
    encoder = CheckedEncoder(vocabulary, accelerator)
    batches = [encoder.encode_batch(STRINGS[start : start + 997]) for start in range(0, len(STRINGS), 997)]
    ids = np.concatenate([batch[0] for batch in batches])
    lengths = np.concatenate([batch[1] for batch in batches])
    expected = list(map(library(vocabulary.kind, vocabulary.path), STRINGS))
    assert lengths.tolist() == [len(one) for one in expected]
    assert ids.tolist() == list(itertools.chain.from_iterable(expected))
    assert not set(vocabulary.special_tokens.values()) & set(ids.tolist())
    assert encoder.mismatch is None
    assert encoder.refused == []
    library_of = {"sentencepiece": ["tiktoken", "sentencepiece"], "huggingface": ["tiktoken", "tokenizers"], "tiktoken": ["tiktoken"]}
    chain = (["gigatoken"] if accelerator == "auto" else []) + library_of[vocabulary.kind]
    assert encoder.backend == ", checked against ".join(chain)


def test_ids_are_the_librarys_on_real_text_in_batches_of_any_size(vocabulary: Vocabulary) -> None:
    plays = [path.read_text(encoding="utf-8") for path in sorted((PACKAGED_TEXTS / "shakespeare" / "plays").glob("*.txt"))[:3]]
    texts = [paragraph for play in plays for paragraph in play.split("\n\n")] + plays
    expected = vocabulary.encode_batch(texts)
    for size in (1 << 20, 613):
        encoder = CheckedEncoder(vocabulary)
        parts = [encoder.encode_batch(texts[start : start + size]) for start in range(0, len(texts), size)]
        assert same((np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])), expected)


@pytest.mark.parametrize("text", [" " * 1_000_000, "a" * 300_000, "\n" * 300_000, "1" * 300_000])
def test_long_runs_of_one_character(vocabulary: Vocabulary, text: str) -> None:
    assert same(CheckedEncoder(vocabulary).encode_batch(["x", text, "y"]), vocabulary.encode_batch(["x", text, "y"]))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (("unigram", "identity", False, True), "the SentencePiece model is no bpe with byte_fallback"),
        (("bpe", "nmt_nfkc", False, True), "the SentencePiece model normalizes text"),
        (("bpe", "identity", True, True), "the SentencePiece model normalizes text"),
    ],
)
def test_sentencepiece_models_that_do_more_are_left_to_the_library(kind: tuple[Any, ...], why: str, tmp_path: Path) -> None:
    vocabulary = Vocabulary.open(train(tmp_path, *kind))
    encoder = CheckedEncoder(vocabulary)
    assert same(encoder.encode_batch(STRINGS[:300]), vocabulary.encode_batch(STRINGS[:300]))
    assert (encoder.backend, encoder.refused) == ("sentencepiece", [why])


def test_user_defined_pieces_and_other_tokenizer_json_are_left_to_the_library(tmp_path: Path) -> None:
    encoder = CheckedEncoder(Vocabulary.open(train(tmp_path, "bpe", "identity", False, True, user_defined_symbols=["fox"])))
    encoder.encode_batch(["the fox"])
    assert (encoder.backend, encoder.refused) == ("sentencepiece", ["the SentencePiece model has user-defined or unused pieces"])
    encoder = CheckedEncoder(Vocabulary.open(edited(tmp_path, normalizer={"type": "NFC"})))
    encoder.encode_batch(["the fox"])
    assert (encoder.backend, encoder.refused) == ("tokenizers", ["the tokenizer.json is no plain byte-level BPE"])


def test_characters_of_which_tiktoken_joins_some_bytes_only(tmp_path: Path) -> None:
    # the vocabulary has a few characters of two, three and four bytes; the texts have others that begin with the same bytes
    words = ["caf\u00e9", "\u65e5\u672c", "it\u2019s", "\U0001f642", "\u4e00\u4e00", "plain", "words"]
    lines = (" ".join(words[(first + step) % 7] for step in (0, 2, 3)) for first in range(700))
    (tmp_path / "spm.model").write_bytes(train_sentencepiece(SentencePieceTraining(vocab_size=300), lines))
    vocabulary = Vocabulary.open(tmp_path / "spm.model")
    texts = [
        "\u00e9\u00e8 \u00e9e",
        "\u65e5\u65e6\u4e01\u4e00 \u2018x\u2019",
        "\U0001f642\U0001f643\U0001f300",
        "\u00e8",
        "\u2581\u65e6",
        "",
    ]
    encoder = CheckedEncoder(vocabulary, "none")
    assert same(encoder.encode_batch(texts * 50), vocabulary.encode_batch(texts * 50))
    assert encoder.backend == "tiktoken, checked against sentencepiece"
    pairs = SentencePieceJson(vocabulary.data()).byte_pairs()
    assert pairs is not None
    assert [several for several in pairs[1] if len(several) > 1]


def test_bytes_need_no_help() -> None:
    encoder = CheckedEncoder(Vocabulary.open_bytes())
    assert encoder.encode_batch(["ab", ""])[0].tolist() == [100, 101]
    assert encoder.backend == "bytes"


def test_without_gigatoken_the_next_best_is_used(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    encoder = CheckedEncoder(vocabulary)
    assert same(encoder.encode_batch(STRINGS[:500]), vocabulary.encode_batch(STRINGS[:500]))
    assert encoder.refused == ["gigatoken is not installed: pip install gigatoken"]
    with pytest.raises(ValueError, match="accelerator='fast' is not known"):
        CheckedEncoder(vocabulary, "fast")  # pyright: ignore[reportArgumentType]


def test_all_characters_that_are_taken_for_stable_are_encoded_alike(tmp_path: Path) -> None:
    pytest.importorskip("gigatoken", reason="gigatoken is not installed: pip install 'prefect-llama[fast]'")
    stable = [chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000 and not guarded_encoder._not_stable().match(chr(code))]
    assert len(stable) > 50_000
    vocabulary = opened("huggingface", tmp_path)
    encoder = CheckedEncoder(vocabulary)
    # in the surroundings in which newer characters are compared one block after the other
    texts = [
        "".join(f" {one}{one} a{one}b 1{one}2!{one}!\n{one}\n" for one in stable[start : start + 64]) for start in range(0, len(stable), 64)
    ]
    encoder.encode_batch(["a"])
    fast, _ = GigatokenEncoder(json.dumps(plain_json(vocabulary))).encode_each(texts)
    expected = parts_of(vocabulary.encode_batch(texts))
    assert all(ids is not None and np.array_equal(ids, other) for ids, other in zip(fast, expected, strict=True))


def plain_json(vocabulary: Vocabulary) -> dict[str, Any]:
    assert vocabulary.path is not None
    return {**json.loads(vocabulary.path.read_text(encoding="utf-8")), "added_tokens": [], "post_processor": None}


def test_many_threads_share_an_encoder(vocabulary: Vocabulary) -> None:
    encoder = CheckedEncoder(vocabulary)
    expected = [vocabulary.encode_batch(STRINGS[start::8]) for start in range(8)]
    equal: list[bool] = []

    def work(start: int) -> None:
        texts = STRINGS[start::8]
        parts = [encoder.encode_batch(texts[at : at + 100]) for at in range(0, len(texts), 100)]
        equal.append(same(joined(one for part in parts for one in parts_of(part)), expected[start]))

    threads = [threading.Thread(target=work, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [True] * 8


def test_gigatoken_gives_the_same_ids_one_by_one_and_together(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gigatoken", reason="gigatoken is not installed: pip install 'prefect-llama[fast]'")
    monkeypatch.setattr(fast_encoders, "_TAKING_TURNS", 0)
    assert same(CheckedEncoder(vocabulary).encode_batch(STRINGS[:4000]), vocabulary.encode_batch(STRINGS[:4000]))


def test_gigatoken_is_made_anew_before_its_memory_grows_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gigatoken", reason="gigatoken is not installed: pip install 'prefect-llama[fast]'")
    encoder = GigatokenEncoder(json.dumps(plain_json(opened("huggingface", tmp_path))))
    made: list[int] = []
    load = encoder._load
    monkeypatch.setattr(encoder, "_load", lambda: made.append(1) or load())
    resident = [1 << 30]
    monkeypatch.setattr(fast_encoders, "resident_bytes", lambda: resident[0])
    monkeypatch.setattr(fast_encoders, "_LEAST_CHARACTERS", 1000)

    def fresh(text: str) -> bool:
        return encoder.encode_each([text])[1]

    # objects of other tests that are not yet collected must not share the room
    monkeypatch.setattr(fast_encoders, "_live", weakref.WeakSet(encoder._idle))
    encoder._idle[0]._resident_bytes = resident[0]
    assert [fresh("a" * 2000), fresh("a"), len(made)] == [True, False, 0]
    resident[0] += fast_encoders._GROWTH_BYTES  # large now: the next text gets a new one, the first of which is checked
    assert [fresh("a"), fresh("a"), len(made)] == [False, True, 1]
    resident[0] += fast_encoders._GROWTH_BYTES
    assert [fresh("a"), len(made)] == [False, 1]  # not before it has encoded something
    # where the system does not tell how large a process is, text alone counts
    monkeypatch.setattr(fast_encoders, "resident_bytes", lambda: None)
    monkeypatch.setattr(fast_encoders, "_MOST_CHARACTERS", 5000)
    assert [fresh("a" * 6000), fresh("a"), len(made)] == [False, True, 2]


def test_memory_stays_bounded_on_text_of_new_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gigatoken", reason="gigatoken is not installed: pip install 'prefect-llama[fast]'")
    if fast_encoders.resident_bytes() is None:
        pytest.skip("the system does not tell how large a process is")
    monkeypatch.setattr(fast_encoders, "_GROWTH_BYTES", 24 << 20)
    monkeypatch.setattr(fast_encoders, "_LEAST_CHARACTERS", 1 << 20)
    encoder = GigatokenEncoder(json.dumps(plain_json(opened("huggingface", tmp_path))))
    draw = np.random.default_rng(0)
    sizes = []
    for _ in range(16):
        letters = draw.integers(97, 123, (100_000, 12), np.uint8)
        letters[:, 0] = 32
        encoder.encode_each([letters.tobytes().decode()])
        sizes.append(fast_encoders.resident_bytes() or 0)
    # 19 MB of words that were never seen would take some 200 MB
    assert max(sizes) - sizes[0] < 120 << 20
