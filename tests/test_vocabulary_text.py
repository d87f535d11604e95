"""What vocabularies are trained on: training documents only, no tail, bounded text; and bad documents that are named themselves."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from model.token_store import TokenStore
from model.vocabularies.vocabulary import Vocabulary
from tasks import vocabulary, vocabulary_text
from tasks.artifacts import Artifact, commit
from tasks.data_steps import mixture_steps
from tasks.datasets import DataError, Mixture, Reading
from tasks.download import download_body
from tasks.readers.text_reader import read_documents, split_of
from tasks.sources.local_files import PACKAGED_TEXTS
from tasks.steps import Step
from tasks.tokenization import tokenize_body
from tasks.vocabularies import BytePairTraining, SentencePieceTraining
from tasks.vocabulary import train_byte_pairs, train_sentencepiece, train_vocabulary_body
from tasks.vocabulary_text import TextSource, tails_are_left_out, training_sentences, within_budget

ROOT = Path(__file__).resolve().parent.parent
SONNETS = PACKAGED_TEXTS / "shakespeare" / "sonnets" / "sonnets.txt"
READING = Reading(document="paragraph", min_document_bytes=500, holdout=0.2)


def source(path: Path, reading: Reading = READING, tail: int = 0) -> TextSource:
    return TextSource("sonnets", [path], reading, tail)


def sentences(path: Path, reading: Reading = READING, max_bytes: int = 1 << 30) -> list[str]:
    return list(training_sentences([source(path, reading)], max_bytes))


def test_only_training_documents_take_part() -> None:
    texts = list(read_documents(SONNETS, READING))
    train = [text for text in texts if split_of(text, 0.2) == "train"]
    assert 0 < len(train) < len(texts)
    assert sentences(SONNETS) == train
    some = list(training_sentences([source(SONNETS), source(SONNETS)], 20_000))
    assert some == [*train[: len(some) // 2], *train[: len(some) // 2]]
    assert 20_000 <= sum(map(len, some)) < 24_000


def test_long_documents_are_handed_over_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary_text, "SENTENCE_CHARACTERS", 10)
    (tmp_path / "t.txt").write_text("0123456789abcdef", encoding="utf-8")
    assert sentences(tmp_path / "t.txt", Reading(), 100) == ["0123456789", "abcdef"]


def test_of_questions_and_answers_only_what_is_said_is_trained_on(tmp_path: Path) -> None:
    rows = [{"prompt": "to be?", "completion": "or not"}, {"prompt": "who?", "completion": "I"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    reading = Reading.model_validate({"answers": {"kind": "prompt_completion"}})
    assert sentences(tmp_path / "p.jsonl", reading, 100) == ["to be?", "or not", "who?", "I"]
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": messages}))
    reading = Reading.model_validate({"answers": {"kind": "chat"}})
    assert sentences(tmp_path / "c.jsonl", reading, 100) == ["hello", "good day"]


def test_no_document_of_a_tail_is_trained_on(tmp_path: Path) -> None:
    """Down to the token store: its tail, in tokens of the vocabulary that was trained."""
    words = SONNETS.read_text(encoding="utf-8").split()
    draw = random.Random(3)
    lines = [" ".join(draw.choices(words, k=40)) for _ in range(400)]
    # the tail has a letter of its own, which would be a piece of its own
    lines[-20:] = [f"{line} \u00f8" for line in lines[-20:]]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines), encoding="utf-8")
    mixture = Mixture.model_validate(
        {
            "name": "m",
            "datasets": ({"name": "lines", "source": str(tmp_path / "t.jsonl")},),
            "weights": {"lines": 1.0},
            "tokenizer": SentencePieceTraining(vocab_size=400),
            "holdout_tail": {"lines": 4000},
        }
    )
    steps = mixture_steps(mixture)

    def make(step: Step, body: Any, *inputs: Artifact) -> Artifact:
        directory = step.directory(tmp_path / "root")
        directory.mkdir(parents=True)
        return commit(directory, step, stats=body(step, directory, inputs))

    raw = make(steps.downloads[0], download_body)
    tokenizer = make(steps.tokenizer, train_vocabulary_body, raw)
    store = TokenStore.open(make(steps.tokens[0], tokenize_body, raw, tokenizer))
    left, tail = store.splits["train"].split_tail(4000)
    opened = Vocabulary.open(Path(tokenizer.path))
    assert tail.num_documents >= 20
    assert not any("\u00f8" in name for name in opened.names())
    text = source(tmp_path / "t.jsonl", Reading(), 4000)
    used = list(training_sentences([text], 64 << 20))
    assert tails_are_left_out([text], opened, 64 << 20)
    assert 100 < len(used) <= left.num_documents
    assert used == lines[: len(used)]
    # one tail of other length is another vocabulary
    other = mixture.model_copy(update={"holdout_tail": {"lines": 4001}})
    assert mixture_steps(other).tokenizer.fingerprint != steps.tokenizer.fingerprint


def test_where_the_tail_was_estimated_too_short_more_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary_text, "_BYTES_PER_TOKEN", 0.5)
    text = source(SONNETS, READING, 2000)
    first = list(training_sentences([text], 1 << 30))
    opened = Vocabulary.open_bytes()
    assert not tails_are_left_out([text], opened, 1 << 30)
    second = list(training_sentences([text], 1 << 30))
    assert second == first[: len(second)]
    assert tails_are_left_out([text], opened, 1 << 30)
    assert len(second) < len(first)
    behind = [len(document.encode()) + 2 for document in text.documents()][len(second) :]
    assert 2000 <= sum(behind) < 4000


def test_a_tail_that_leaves_nothing_is_refused() -> None:
    text = source(SONNETS, READING, 1_000_000)
    assert list(training_sentences([text], 1 << 30))
    with pytest.raises(
        DataError, match=r"dataset 'sonnets': holdout_tail=1000000 leaves no document to train the vocabulary on, .* lower it"
    ):
        tails_are_left_out([text], Vocabulary.open_bytes(), 1 << 30)


@pytest.mark.parametrize("training", [SentencePieceTraining(vocab_size=300), BytePairTraining(vocab_size=300)])
def test_a_bad_document_met_in_training_is_named_and_not_the_tokenizer(
    tmp_path: Path, training: SentencePieceTraining | BytePairTraining
) -> None:
    rows = [*[json.dumps({"text": f"line {number} of good text"}) for number in range(300)], '{"text": null}']
    (tmp_path / "t.jsonl").write_text("\n".join(rows), encoding="utf-8")
    text = training_sentences([source(tmp_path / "t.jsonl", Reading())], 1 << 30)
    train = train_sentencepiece if isinstance(training, SentencePieceTraining) else train_byte_pairs
    with pytest.raises(DataError) as raised:
        train(training, text)  # type: ignore[arg-type]
    message = str(raised.value)
    assert message.startswith(f"{tmp_path / 't.jsonl'} line 301 ")
    assert "on_bad_document='skip' it goes on, and the token store's skipped/ then lists them" in message
    assert "tokenizer" not in message
    skipping = Reading(on_bad_document="skip")
    assert len(sentences(tmp_path / "t.jsonl", skipping)) == 300


def many_words(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=1000)) for _ in range(count)]


def test_text_with_too_many_different_words_is_sampled_evenly_and_always_the_same() -> None:
    texts = many_words(1, 1000)
    kept, share = within_budget(texts, str.split, 100_000)
    assert within_budget(texts, str.split, 100_000) == (kept, share)
    assert 60 <= len(kept) <= 110
    assert share < 0.15
    # in their order, and from everywhere
    places = [texts.index(text) for text in kept]
    assert places == sorted(places)
    assert [sum(place // 250 == part for place in places) > 8 for part in range(4)] == [True] * 4
    words = {word for text in kept for word in text.split()}
    assert sum(map(len, words)) + len(words) <= 100_000
    # words that come again cost nothing
    again, share = within_budget(texts[:90] * 50, str.split, 100_000)
    assert (len(again), share) == (4500, 1.0)
    assert list(within_budget(["one very long text"], str.split, 3)[0]) == ["one very long text"]


def test_training_samples_beyond_its_budget_and_not_below(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = many_words(2, 300)
    told: list[str] = []
    monkeypatch.setattr(
        vocabulary, "run_logger", lambda: type("Logger", (), {"warning": lambda _, text, *parts: told.append(text % parts)})()
    )
    whole = (
        train_sentencepiece(SentencePieceTraining(vocab_size=400), iter(texts)),
        train_byte_pairs(BytePairTraining(vocab_size=400), texts),
    )
    assert not told
    monkeypatch.setattr(vocabulary, "_SENTENCEPIECE_CHARACTERS", 100_000)
    monkeypatch.setattr(vocabulary, "_BYTE_PAIR_CHARACTERS", 100_000)
    some = (
        train_sentencepiece(SentencePieceTraining(vocab_size=400), iter(texts)),
        train_byte_pairs(BytePairTraining(vocab_size=400), texts),
    )
    assert len(told) == 2
    assert all("is trained on an even sample of about" in line for line in told)
    assert some[0] != whole[0]
    assert some[1] != whole[1]
    assert some[0] == train_sentencepiece(SentencePieceTraining(vocab_size=400), texts)


def test_the_memory_of_training_is_bounded() -> None:
    # the largest size of this process alone: ru_maxrss would be that of the parent, where it was larger
    code = """
import random, re
from tasks.vocabularies import SentencePieceTraining
from tasks.vocabulary import train_sentencepiece
draw = random.Random(0)
def texts():
    for _ in range(16 << 10):
        yield "".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=1000))
train_sentencepiece(SentencePieceTraining(vocab_size=300), texts())
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 400 << 10  # kB; without a bound it takes 620 MB
