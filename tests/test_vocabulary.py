"""The tokenizer step: equal input, equal bytes; Llama's ids; lossless; trained on training documents only; files taken as they are."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from model.vocabularies.byte_pairs import byte_pairs_of
from model.vocabularies.vocabulary import Vocabulary
from tasks import vocabulary_file
from tasks.artifacts import Artifact, commit
from tasks.data_steps import DataSteps, mixture_steps
from tasks.datasets import DataError, Mixture, Reading
from tasks.download import download_body
from tasks.vocabularies import (
    BytePairTraining,
    ByteTokenizer,
    HuggingFaceFile,
    SentencePieceFile,
    SentencePieceTraining,
    TiktokenFile,
    Tokenizer,
)
from tasks.vocabulary import train_byte_pairs, train_sentencepiece, train_vocabulary_body
from tasks.vocabulary_file import inspect_tokenizer, not_exportable, vocabulary_size
from tests.loopback_server import loopback
from tests.synthetic_vocabulary import small_byte_pairs, small_tiktoken, small_vocabulary

ROOT = Path(__file__).resolve().parent.parent
READING = Reading(document="paragraph", min_document_bytes=500, holdout=0.2)


def steps(tokenizer: Tokenizer) -> DataSteps:
    dataset = {"name": "sonnets", "source": "package:shakespeare/sonnets/*.txt", **READING.identity()}
    return mixture_steps(Mixture.model_validate({"name": "m", "datasets": (dataset,), "weights": {"sonnets": 1.0}, "tokenizer": tokenizer}))


def make(root: Path, made: DataSteps) -> tuple[Path, dict[str, object]]:
    inputs: list[Artifact] = []
    for step in made.tokenizer.upstream:
        directory = step.directory(root)
        directory.mkdir(parents=True)
        inputs.append(commit(directory, step, stats=download_body(step, directory, ())))
    directory = made.tokenizer.directory(root)
    directory.mkdir(parents=True)
    return directory, train_vocabulary_body(made.tokenizer, directory, tuple(inputs))


TRAININGS = {
    "bpe": SentencePieceTraining(vocab_size=600),
    "unigram": SentencePieceTraining(vocab_size=600, model_type="unigram"),
    "byte pairs": BytePairTraining(vocab_size=600),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_two_trainings_are_byte_identical_also_in_another_process_with_other_threads(tmp_path: Path, name: str) -> None:
    first, stats = make(tmp_path / "one", steps(TRAININGS[name]))
    file = first / str(json.loads((first / "vocabulary.json").read_text())["file"])
    second, _ = make(tmp_path / "two", steps(TRAININGS[name]))
    assert file.read_bytes() == (second / file.name).read_bytes()
    code = "import sys; from tests.test_vocabulary import *; print(make(Path(sys.argv[2]), steps(TRAININGS[sys.argv[1]]))[1]['digest'])"
    for threads in ("1", "3"):
        done = subprocess.run(
            [sys.executable, "-c", code, name, str(tmp_path / threads)],
            cwd=ROOT, env={**os.environ, "RAYON_NUM_THREADS": threads}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == stats["digest"]
    ids = (598, 599) if name == "byte pairs" else (1, 2)
    opened = Vocabulary.open(first)
    assert stats == {"vocab_size": 600, "bos_id": ids[0], "eos_id": ids[1], "digest": opened.digest}
    assert opened.record.file_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert len((first / "tokenizer.vocab").read_text(encoding="utf-8").splitlines()) == 600


def test_byte_pairs_are_laid_out_as_llama_3_and_lose_nothing(tmp_path: Path) -> None:
    directory, _ = make(tmp_path, steps(TRAININGS["byte pairs"]))
    trained = Vocabulary.open(directory)
    content = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    pairs = byte_pairs_of(content)
    assert pairs is not None
    assert sorted(pairs.ranks.values()) == list(range(598))
    assert [len(token) for token, rank in pairs.ranks.items() if rank < 256] == [1] * 256
    assert [(token["content"], token["id"]) for token in content["added_tokens"]] == [("<|begin_of_text|>", 598), ("<|end_of_text|>", 599)]
    text = "  Shall I\n\ncompare  thee\tto 1609 \u65e5\u672c \U0001f642 \0 <|begin_of_text|> \u00bd "
    assert trained.decode(trained.encode(text)) == text
    # digits by threes, and a word with the space before it: the pattern of Llama 3
    assert any(token.startswith(b" ") and len(token) > 3 for token in pairs.ranks)
    assert max(len(token) for token in pairs.ranks if token.isdigit()) <= 3


def test_the_vocabulary_is_llamas_kind_and_loses_nothing(tmp_path: Path) -> None:
    directory, _ = make(tmp_path, steps(SentencePieceTraining(vocab_size=600)))
    processor = SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    assert [processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id()] == [0, 1, 2, -1]
    assert [processor.id_to_piece(number) for number in (0, 1, 2, 3, 258)] == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    text = "  Shall I\n\ncompare  thee\tto 1609 \u65e5\u672c \U0001f642 \0 <s> </s>? \u00bd "
    ids = processor.encode(text)
    assert processor.decode(ids) == text
    assert not {0, 1, 2} & set(ids)
    pieces = (directory / "tokenizer.vocab").read_text(encoding="utf-8").splitlines()
    assert len(pieces) == 600
    assert pieces[1].startswith("<s>\t")


def test_too_little_text_names_the_field_and_the_remedy() -> None:
    for model_type in ("bpe", "unigram"):
        training = SentencePieceTraining.model_validate({"vocab_size": 4000, "model_type": model_type})
        with pytest.raises(
            DataError, match=r"tokenizer\.vocab_size=4000 cannot be trained on this text: (lower it|set it to \d+ or less), or add text"
        ):
            train_sentencepiece(training, iter(["to be or not to be"]))
    with pytest.raises(DataError, match=r"tokenizer\.vocab_size=2048 cannot be trained on this text"):
        train_sentencepiece(SentencePieceTraining(), iter([]))
    with pytest.raises(DataError, match=r"tokenizer\.vocab_size=4000 cannot be trained on this text: set it to 2\d\d or less, or add text"):
        train_byte_pairs(BytePairTraining(vocab_size=4000), iter(["to be or not to be"]))
    with pytest.raises(DataError, match=r"tokenizer\.pattern='\(' is not a regular expression"):
        train_byte_pairs(BytePairTraining(pattern="("), iter(["to be"]))
    wide = "".join(map(chr, range(0x4E00, 0x4E00 + 2000)))
    with pytest.raises(
        DataError, match=r"tokenizer\.vocab_size=1000 cannot be trained .*: set it to 2260 or more, or lower tokenizer.character_coverage"
    ):
        train_sentencepiece(SentencePieceTraining(vocab_size=1000), iter([wide]))


def test_a_sentencepiece_file_is_taken_as_it_is_and_checked(tmp_path: Path) -> None:
    given = tmp_path / "given.model"
    given.write_bytes(small_vocabulary())
    made = steps(SentencePieceFile(path=str(given)))
    directory, stats = make(tmp_path / "root", made)
    assert (directory / "tokenizer.model").read_bytes() == given.read_bytes()
    assert stats["vocab_size"] == 400
    given.write_bytes(small_vocabulary(500))
    with pytest.raises(DataError, match="changed since the run was planned"):
        train_vocabulary_body(made.tokenizer, directory, ())
    SentencePieceTrainer.train(
        sentence_iterator=iter(["to be or not to be"] * 9), model_prefix=str(tmp_path / "no_eos"), vocab_size=20,
        hard_vocab_limit=False, eos_id=-1, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(DataError, match=r"no_eos\.model' defines no EOS; train it with both"):
        steps(SentencePieceFile(path=str(tmp_path / "no_eos.model")))
    SentencePieceTrainer.train(
        sentence_iterator=iter(["to be or not to be"] * 9), model_prefix=str(tmp_path / "no_bos"), vocab_size=20,
        hard_vocab_limit=False, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(DataError, match=r"no_bos\.model' defines no BOS; train it with both"):
        steps(SentencePieceFile(path=str(tmp_path / "no_bos.model")))


def files(directory: Path) -> dict[str, SentencePieceFile | HuggingFaceFile | TiktokenFile]:
    """A file of each kind."""
    (directory / "given.model").write_bytes(small_vocabulary())
    (directory / "given.json").write_bytes(small_byte_pairs())
    (directory / "given.tiktoken").write_bytes(small_tiktoken())
    return {
        "sentencepiece": SentencePieceFile(path=str(directory / "given.model")),
        "huggingface": HuggingFaceFile(path=str(directory / "given.json")),
        "tiktoken": TiktokenFile(path=str(directory / "given.tiktoken")),
    }


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface", "tiktoken"])
def test_a_file_of_any_kind_becomes_a_tokenizer_directory(tmp_path: Path, kind: str) -> None:
    tokenizer = files(tmp_path)[kind]
    info = inspect_tokenizer(tokenizer)
    directory, stats = make(tmp_path / "root", steps(tokenizer))
    made = Vocabulary.open(directory)
    assert stats == {"vocab_size": info.vocab_size, "bos_id": info.bos_id, "eos_id": info.eos_id, "digest": info.digest}
    assert (made.kind, made.digest, made.vocab_size) == (kind, info.digest, vocabulary_size(tokenizer))
    assert (directory / str(made.record.file)).read_bytes() == Path(tokenizer.path).read_bytes()
    assert {path.name for path in directory.iterdir()} == {made.record.file, "vocabulary.json", "tokenizer.vocab"}
    moved = tokenizer.model_copy(update={"path": f"file://{tokenizer.path}"})
    assert inspect_tokenizer(moved) == info
    for wrong, message in (
        ({"sha256": "0" * 64}, "not the declared 000"),
        ({"vocab_size": 99}, "ids, not vocab_size=99; correct vocab_size"),
    ):
        with pytest.raises(DataError, match=message):
            inspect_tokenizer(tokenizer.model_copy(update=wrong))
    assert not_exportable(tokenizer) is None


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface", "tiktoken"])
def test_a_plan_opens_a_file_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    tokenizer = files(tmp_path)[kind]
    opened: list[Path] = []
    real = vocabulary_file._open
    monkeypatch.setattr(vocabulary_file, "_SETTLED_NANOSECONDS", 365 * 86_400 * 10**9)
    monkeypatch.setattr(vocabulary_file, "_open", lambda config, file: opened.append(file) or real(config, file))
    file, beside = Path(tokenizer.path), tmp_path / "tokenizer_config.json"

    def ask() -> int:
        before = len(opened)
        for _ in range(3):
            assert inspect_tokenizer(tokenizer).vocab_size == vocabulary_size(tokenizer)
            assert not_exportable(tokenizer) is None
        vocabulary_file.open_tokenizer(tokenizer)  # the step that takes it always looks itself
        return len(opened) - before - 1

    assert ask() >= 3  # so young that it could change again without a trace
    os.utime(file, (1e9, 1e9))
    assert ask() == 1
    assert ask() == 0
    os.utime(file, (1e9 + 1, 1e9 + 1))
    assert ask() == 1
    beside.write_text("{}")
    os.utime(beside, (1e9, 1e9))
    if kind != "huggingface":
        assert ask() == 1
        return
    with pytest.raises(DataError, match="does not tell what ends a document"):
        ask()
    beside.unlink()
    assert ask() == 0
    # the configuration counts too
    assert inspect_tokenizer(tokenizer.model_copy(update={"bos_token": "<|end_of_text|>"})).bos_id == 599


def test_what_identifies_a_file_is_what_changes_an_id(tmp_path: Path) -> None:
    given = files(tmp_path)
    other = TiktokenFile(path=given["tiktoken"].path, pattern=r"\p{L}+|\P{L}+")
    digests = {inspect_tokenizer(one).digest for one in (*given.values(), other, ByteTokenizer())}
    assert len(digests) == 5
    without = TiktokenFile(path=given["tiktoken"].path, bos_token=None)
    assert inspect_tokenizer(without).bos_id is None
    assert inspect_tokenizer(without).digest != inspect_tokenizer(given["tiktoken"]).digest


def test_bytes_are_a_directory_with_nothing_but_the_record(tmp_path: Path) -> None:
    directory, stats = make(tmp_path, steps(ByteTokenizer()))
    assert stats == {"vocab_size": 259, "bos_id": 1, "eos_id": 2, "digest": Vocabulary.open_bytes().digest}
    assert [path.name for path in directory.iterdir()] == ["vocabulary.json"]
    assert Vocabulary.open(directory).encode("ab").tolist() == [100, 101]


def test_sizes_are_known_before_anything_is_made() -> None:
    assert vocabulary_size(SentencePieceTraining(vocab_size=1234)) == 1234
    assert vocabulary_size(BytePairTraining(vocab_size=1234)) == 1234
    assert vocabulary_size(ByteTokenizer()) == 259


def test_of_a_url_a_plan_takes_what_is_declared() -> None:
    pinned, named = f"hf://meta/llama@{'0123abcd' * 5}/tokenizer.json", {"eos_token": "<|end_of_text|>"}
    declared = inspect_tokenizer(HuggingFaceFile(path=pinned, vocab_size=128256, **named))
    assert (declared.vocab_size, declared.digest, declared.eos_id) == (128256, None, None)
    tiktoken = inspect_tokenizer(TiktokenFile(path="gs://b/t", sha256="0" * 64, vocab_size=128002))
    assert (tiktoken.bos_id, tiktoken.eos_id) == (128000, 128001)
    with pytest.raises(DataError, match="is a URL and vocab_size is not set: a plan downloads nothing, so set it"):
        inspect_tokenizer(HuggingFaceFile(path=pinned, **named))
    with pytest.raises(DataError, match="is a URL and eos_token is not set: set it, and bos_token where the tokenizer has one"):
        inspect_tokenizer(HuggingFaceFile(path=pinned, vocab_size=128256))
    # a branch moves
    for path in ("hf://meta/llama/tokenizer.json", "hf://meta/llama@main/tokenizer.json", "https://host/tokenizer.json?secret=1"):
        with pytest.raises(DataError, match="can change: set sha256 to the digest of the file") as raised:
            inspect_tokenizer(HuggingFaceFile(path=path, vocab_size=128256, **named))
        assert "secret" not in str(raised.value)


def test_a_tokenizer_at_a_url_is_fetched_and_nothing_beside_it(tmp_path: Path) -> None:
    data = small_byte_pairs()
    digest = hashlib.sha256(data).hexdigest()
    with loopback() as server:
        server.put("/org/tokenizer.json", data)
        server.put("/org/tokenizer_config.json", json.dumps({"bos_token": None, "eos_token": "<|end_of_text|>"}).encode())
        url = f"{server.url}/org/tokenizer.json"
        named: dict[str, Any] = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
        directory, stats = make(tmp_path / "one", steps(HuggingFaceFile(path=url, sha256=digest, vocab_size=600, **named)))
        assert Vocabulary.open(directory).digest == stats["digest"]
        assert (stats["bos_id"], stats["eos_id"]) == (598, 599)
        with pytest.raises(DataError, match="has 600 ids, not vocab_size=601"):
            make(tmp_path / "two", steps(HuggingFaceFile(path=url, sha256=digest, vocab_size=601, **named)))
