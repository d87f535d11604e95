"""The tokenizer step: equal input, equal bytes; Llama's ids; lossless; trained on training documents only."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from tasks import vocabulary
from tasks.artifacts import Artifact, commit
from tasks.data_steps import DataSteps, mixture_steps
from tasks.datasets import DataError, Mixture, Reading, SentencePieceFile, SentencePieceTraining
from tasks.download import download_body
from tasks.sources import PACKAGED_TEXTS
from tasks.text_reader import read_documents, split_of
from tasks.vocabulary import train_sentencepiece, train_vocabulary_body, training_sentences
from tests.synthetic_vocabulary import small_vocabulary

ROOT = Path(__file__).resolve().parent.parent
READING = Reading(document="paragraph", min_document_bytes=500, holdout=0.2)


def steps(tokenizer: SentencePieceTraining | SentencePieceFile) -> DataSteps:
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


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_two_trainings_are_byte_identical_also_in_another_process(tmp_path: Path, model_type: str) -> None:
    training = SentencePieceTraining.model_validate({"vocab_size": 600, "model_type": model_type})
    first, stats = make(tmp_path / "one", steps(training))
    model = (first / "tokenizer.model").read_bytes()
    second, _ = make(tmp_path / "two", steps(training))
    assert model == (second / "tokenizer.model").read_bytes()
    assert stats == {"vocab_size": 600, "bos_id": 1, "eos_id": 2, "sha256": hashlib.sha256(model).hexdigest()}
    code = (
        "import sys; from tests.test_vocabulary import *; training = SentencePieceTraining(vocab_size=600, model_type=sys.argv[1]); "
        "directory, stats = make(Path(sys.argv[2]), steps(training)); print(stats['sha256'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, model_type, str(tmp_path / "three")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == stats["sha256"]


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


def test_only_training_documents_take_part() -> None:
    path = PACKAGED_TEXTS / "shakespeare" / "sonnets" / "sonnets.txt"
    texts = list(read_documents(path, READING))
    train = [text for text in texts if split_of(text, 0.2) == "train"]
    assert 0 < len(train) < len(texts)
    assert list(training_sentences([([path], READING)], 1 << 30)) == train
    some = list(training_sentences([([path], READING), ([path], READING)], 20_000))
    assert some == [*train[: len(some) // 2], *train[: len(some) // 2]]
    assert 20_000 <= sum(map(len, some)) < 24_000


def test_long_documents_and_zero_characters_are_handed_over_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "_SENTENCE_CHARACTERS", 10)
    (tmp_path / "t.txt").write_text("0123456789abcdef\0xyz", encoding="utf-8")
    assert list(training_sentences([([tmp_path / "t.txt"], Reading())], 100)) == ["0123456789", "abcdef", "xyz"]


def test_too_little_text_names_the_field_and_the_remedy() -> None:
    for model_type in ("bpe", "unigram"):
        training = SentencePieceTraining.model_validate({"vocab_size": 4000, "model_type": model_type})
        with pytest.raises(
            DataError, match=r"tokenizer\.vocab_size=4000 cannot be trained on this text: (lower it|set it to \d+ or less), or add text"
        ):
            train_sentencepiece(training, iter(["to be or not to be"]))
    with pytest.raises(DataError, match=r"tokenizer\.vocab_size=2048 cannot be trained on this text"):
        train_sentencepiece(SentencePieceTraining(), iter([]))
    wide = "".join(map(chr, range(0x4E00, 0x4E00 + 2000)))
    with pytest.raises(
        DataError, match=r"tokenizer\.vocab_size=1000 cannot be trained .*: set it to 2260 or more, or lower tokenizer.character_coverage"
    ):
        train_sentencepiece(SentencePieceTraining(vocab_size=1000), iter([wide]))


def test_a_file_is_taken_as_it_is_and_checked(tmp_path: Path) -> None:
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
