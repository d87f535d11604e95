"""The process that tokenizes through SeqIO: every shard of a registered task, each committed on its own, and errors by kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import seqio

from model.token_store import TokenStore, TokenStoreWriter
from model.vocabularies.vocabulary import Vocabulary
from tasks.artifacts import commit
from tasks.data_steps import RegisteredTask, TfdsTask
from tasks.mixture_config import PromptCompletion, Reading
from tasks.seqio_bridge import tokenize_worker
from tasks.seqio_bridge.seqio_vocabularies import make_vocabulary
from tasks.seqio_bridge.tokenization_spec import TokenizationSpec
from tasks.shard_tokenizer import store_writer
from tasks.sources import DataError
from tasks.steps import Step
from tests.seqio_tokenizers import tokenizer_directory
from tests.test_seqio_registry import add_text_line_task, lines
from tests.test_seqio_sources import TEXTS, TinyTexts


def events(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_registered_task_becomes_a_store_shard_by_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tokenizer_directory(tmp_path, "tiktoken")
    vocabulary = Vocabulary.open(tokenizer)
    texts = [[f"file {number}", "and", "more"][: number + 1] for number in range(3)]
    for number, content in enumerate(texts):
        lines(tmp_path / f"{number}.txt", *content)
    add_text_line_task("three_files", tmp_path / "*.txt", make_vocabulary(tokenizer))
    config = RegisteredTask(task="three_files")
    step = Step("tokens", "theirs", config)
    place = step.directory(tmp_path / "root")
    spec = TokenizationSpec(store=str(place), tokenizer=str(tokenizer), key="key", registered=config)
    (tmp_path / "spec.json").write_text(spec.model_dump_json(), encoding="utf-8")
    assert tokenize_worker.main([str(tmp_path / "spec.json")]) == 0
    counts = [{"split": "train", "shard": number, "of": 3, "documents": number + 1} for number in range(3)]
    first, *others = events(capsys)
    assert first == {"event": "shards", "counts": {"train": 3}, "loss_mask": False}
    assert [{key: event[key] for key in counts[0]} for event in others] == counts
    writer = TokenStoreWriter(
        place, vocab_size=vocabulary.vocab_size, bos_id=vocabulary.bos_id, eos_id=vocabulary.eos_id, tokenizer_digest=vocabulary.digest
    )
    stream = TokenStore.open(commit(place, step, stats=writer.stats({"train": 3}))).splits["train"]
    expected = [[vocabulary.bos_id, *vocabulary.encode(text).tolist(), vocabulary.eos_id] for content in texts for text in content]
    assert [stream.document(index).tolist() for index in range(stream.num_documents)] == expected
    assert stream.source_bytes == sum(len(text) for content in texts for text in content)
    # what is there is kept; what was damaged is made again
    damaged = place / "train" / "shard-00001-of-00003" / "tokens.bin"
    before = damaged.read_bytes()
    damaged.write_bytes(before[::-1])
    tokenize_worker.tokenize_shards(spec)
    assert [event["shard"] for event in events(capsys) if event["event"] == "shard"] == [1]
    assert damaged.read_bytes() == before


def test_errors_are_told_by_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_directory(tmp_path, "bytes")
    add_text_line_task("one_file", lines(tmp_path / "a.txt", "text"), seqio.ByteVocabulary())
    spec = TokenizationSpec(store=str(tmp_path / "store"), tokenizer=str(tokenizer), key="key", registered=RegisteredTask(task="one_fil"))
    (tmp_path / "spec.json").write_text(spec.model_dump_json(), encoding="utf-8")
    assert tokenize_worker.main([str(tmp_path / "spec.json")]) == 1
    (event,) = events(capsys)
    assert (event["event"], event["kind"]) == ("error", "data")
    assert "did you mean 'one_file'" in event["message"]

    def _full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device", "tokens.bin")

    changed = spec.model_copy(update={"registered": RegisteredTask(task="one_file")})
    (tmp_path / "spec.json").write_text(changed.model_dump_json(), encoding="utf-8")
    monkeypatch.setattr(tokenize_worker, "_write_shard", _full)
    assert tokenize_worker.main([str(tmp_path / "spec.json")]) == 1
    event = events(capsys)[-1]
    assert (event["event"], event["errno"], event["message"]) == ("error", 28, "No space left on device: tokens.bin")


def test_a_spec_names_one_source() -> None:
    with pytest.raises(ValueError, match="set that one alone"):
        TokenizationSpec(store="s", tokenizer="t", key="k")
    both = {"registered": RegisteredTask(task="a"), "tfds": TfdsTask(name="a:1.0.0", reading=Reading())}
    with pytest.raises(ValueError, match="set that one alone"):
        TokenizationSpec(store="s", tokenizer="t", key="k", **both)


def test_answers_of_tfds_become_a_store_with_a_loss_mask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TinyTexts(data_dir=str(tmp_path / "tfds")).download_and_prepare()
    capsys.readouterr()
    tokenizer = tokenizer_directory(tmp_path, "bytes")
    vocabulary = Vocabulary.open(tokenizer)
    answers = PromptCompletion(prompt_key="question", completion_key="answer")
    config = TfdsTask(name="tiny_texts:1.2.3", reading=Reading(answers=answers, holdout=0.2))
    step = Step("tokens", "tiny", config)
    place = step.directory(tmp_path / "root")
    seqio.set_tfds_data_dir_override(str(tmp_path / "tfds"))
    try:
        tokenize_worker.tokenize_shards(TokenizationSpec(store=str(place), tokenizer=str(tokenizer), key="key", tfds=config))
    finally:
        seqio.set_tfds_data_dir_override(None)
    first, *others = events(capsys)
    assert first == {"event": "shards", "counts": {"train": 1, "validation": 1}, "loss_mask": True}
    assert sum(event["documents"] for event in others) == len(TEXTS)
    writer = store_writer(place, vocabulary, loss_mask=True)
    store = TokenStore.open(commit(place, step, stats=writer.stats(first["counts"])))
    found: dict[str, str] = {}
    for stream in store.splits.values():
        start = 0
        for index in range(stream.num_documents):
            ids = stream.document(index)
            mask = stream.loss_mask(start, start := start + len(ids))
            learned = ids[mask == 1]
            assert (ids[0], learned[-1]) == (1, 2)
            found[vocabulary.decode(ids[mask == 0])] = vocabulary.decode(learned)
    assert found == {f"{number}?": text for number, text in enumerate(TEXTS)}


def test_a_tfds_version_that_is_not_pinned_is_an_error(tmp_path: Path) -> None:
    tokenizer = tokenizer_directory(tmp_path, "bytes")
    tfds = TfdsTask(name="lm1b", reading=Reading())
    with pytest.raises(DataError, match="tfds://lm1b has no version"):
        tokenize_worker.tokenize_shards(TokenizationSpec(store=str(tmp_path / "store"), tokenizer=str(tokenizer), key="key", tfds=tfds))
