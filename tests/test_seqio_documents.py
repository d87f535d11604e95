"""The documents of SeqIO tasks: BOS and EOS as ids exactly once whatever the task adds, and whose ids a vocabulary gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import seqio
import tensorflow as tf

from model.vocabularies.vocabulary import Vocabulary
from tasks.seqio_bridge.seqio_documents import TaskDocuments
from tasks.seqio_bridge.seqio_registry import prepend_bos, replace_task
from tasks.seqio_bridge.seqio_vocabularies import make_vocabulary
from tasks.sources import DataError
from tests.seqio_tokenizers import tokenizer_directory

TEXTS = ("to be", "or not", "", "that is")


def source(*examples: dict[str, Any]) -> Any:
    """A SeqIO source of two shards over these examples."""
    columns: Any = {key: [example[key] for example in examples] for key in examples[0]}

    def _read(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        return tf.data.Dataset.from_tensor_slices(columns)

    return seqio.FunctionDataSource(_read, splits=["train"])


def text_task(steps: Sequence[Any], vocabulary: seqio.Vocabulary) -> seqio.Task:
    texts = source(*({"targets": text} for text in TEXTS))
    return replace_task("documents", texts, [seqio.preprocessors.tokenize, *steps], vocabulary, add_eos=True)


def ids_of(documents: TaskDocuments, split: str = "train") -> list[list[int]]:
    return [document.ids.tolist() for document in documents.read(split, 0, 1)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tokenizers")
    for kind in ("sentencepiece", "bytes", "tiktoken"):
        tokenizer_directory(root, kind)
    return root


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes", "tiktoken"])
@pytest.mark.parametrize("steps", [[], [seqio.preprocessors.append_eos], [prepend_bos], [prepend_bos, seqio.preprocessors.append_eos]])
def test_bos_and_eos_are_there_once_whatever_the_task_adds(kind: str, steps: list[Any], directory: Path) -> None:
    tokenizer = Vocabulary.open(directory / kind)
    documents = TaskDocuments(text_task(steps, make_vocabulary(directory / kind)), tokenizer)
    expected = [[tokenizer.bos_id, *tokenizer.encode(text).tolist(), tokenizer.eos_id] for text in TEXTS]
    assert ids_of(documents) == expected
    sizes = [document.source_bytes for document in documents.read("train", 0, 1)]
    assert sizes == [len(text) for text in TEXTS]
    assert (documents.splits, documents.num_shards("train"), documents.has_loss_mask) == (["train"], 1, False)


def test_seqios_bytes_become_ours(directory: Path) -> None:
    tokenizer = Vocabulary.open(directory / "bytes")
    task = text_task([seqio.preprocessors.append_eos], seqio.ByteVocabulary())
    plain: Any = task
    first = next(iter(plain.get_dataset(None, "train", shuffle=False).as_numpy_iterator()))["targets"]
    assert first[-1] == 1  # their EOS is our BOS
    assert ids_of(TaskDocuments(task, tokenizer)) == [[1, *tokenizer.encode(text).tolist(), 2] for text in TEXTS]
    with pytest.raises(DataError, match=r"the mixture's tokenizer is tiktoken .* with 600 ids"):
        TaskDocuments(task, Vocabulary.open(directory / "tiktoken"))
    with pytest.raises(DataError, match=r"set mixture\.tokenizer to the task's own model file"):
        TaskDocuments(text_task([], seqio.ByteVocabulary(extra_ids=100)), tokenizer)


def test_other_vocabularies_are_refused(directory: Path, tmp_path: Path) -> None:
    model = str(directory / "sentencepiece" / "tokenizer.model")
    tokenizer = Vocabulary.open(directory / "sentencepiece")
    TaskDocuments(text_task([], seqio.SentencePieceVocabulary(model)), tokenizer)
    TaskDocuments(text_task([], seqio.SentencePieceVocabulary(f"file://{model}")), tokenizer)
    for changed in (seqio.SentencePieceVocabulary(model, extra_ids=100), seqio.SentencePieceVocabulary(model, use_fast_tokenizer=True)):
        with pytest.raises(DataError, match="extra_ids, normalizer_spec_overrides or use_fast_tokenizer"):
            TaskDocuments(text_task([], changed), tokenizer)
    with pytest.raises(DataError, match="has a PassThroughVocabulary, of which nobody can tell"):
        TaskDocuments(text_task([], seqio.PassThroughVocabulary(400)), tokenizer)
    with pytest.raises(DataError, match="the mixture's tokenizer is sentencepiece"):
        TaskDocuments(text_task([], make_vocabulary(directory / "tiktoken")), tokenizer)


def test_special_ids_inside_a_document_are_an_error(directory: Path) -> None:
    vocabulary = make_vocabulary(directory / "tiktoken")
    task = replace_task("inside", source({"targets": [5, 599, 7]}, {"targets": [5, 6, 7]}), [cast], vocabulary, add_eos=False)
    with pytest.raises(DataError, match=r"document 0 of train shard 0 is \[598, 5, 599, 7\] .*, with EOS \(id 599\) inside it"):
        ids_of(TaskDocuments(task, Vocabulary.open(directory / "tiktoken")))


def cast(dataset: tf.data.Dataset) -> tf.data.Dataset:
    return dataset.map(lambda example: {key: tf.cast(value, tf.int32) for key, value in example.items()})


def test_inputs_come_before_targets_without_a_loss(directory: Path) -> None:
    vocabulary = make_vocabulary(directory / "bytes")
    tokenizer = Vocabulary.open(directory / "bytes")
    features = {name: seqio.Feature(vocabulary) for name in ("inputs", "targets")}
    if "questions" in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove("questions")
    steps = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
    task = seqio.TaskRegistry.add(
        "questions",
        source=source({"inputs": "ab", "targets": "c"}, {"inputs": "", "targets": "de"}),
        preprocessors=steps,
        output_features=features,
    )
    documents = TaskDocuments(task, tokenizer)
    assert documents.has_loss_mask
    first, second = documents.read("train", 0, 1)
    assert first.ids.tolist() == [1, *tokenizer.encode("abc").tolist(), 2]
    assert first.loss_mask is not None
    assert first.loss_mask.tolist() == [False, False, False, True, True]
    assert first.source_bytes == 3
    assert second.loss_mask is not None
    assert second.loss_mask.tolist() == [False, True, True, True]


def test_a_task_may_say_itself_where_the_loss_counts(directory: Path) -> None:
    steps = [cast]
    task = replace_task(
        "masked",
        source({"targets": [1, 70, 2, 71, 2], "loss_mask": [0, 0, 1, 1, 1]}),
        steps,
        make_vocabulary(directory / "bytes"),
        add_eos=False,
    )
    documents = TaskDocuments(task, Vocabulary.open(directory / "bytes"))
    assert documents.has_loss_mask
    (document,) = documents.read("train", 0, 1)
    assert document.ids.tolist() == [1, 70, 2, 71, 2]
    assert document.loss_mask is not None
    assert document.loss_mask.tolist() == [False, False, True, True, True]


def test_random_steps_are_the_same_each_time(directory: Path) -> None:
    @seqio.map_over_dataset(num_seeds=1)
    def _shift(example: dict[str, Any], seed: Any) -> dict[str, Any]:
        return {"targets": example["targets"] + tf.random.stateless_uniform([], seed, 0, 50, tf.int32)}

    task = text_task([_shift], make_vocabulary(directory / "bytes"))
    documents = TaskDocuments(task, Vocabulary.open(directory / "bytes"))
    found = ids_of(documents)
    assert found == ids_of(documents)
    assert found[0][1] - 3 != ord("t") or found[1][1] - 3 != ord("o")


def test_what_tensorflow_says_is_a_data_error(directory: Path) -> None:
    def _broken(dataset: tf.data.Dataset) -> tf.data.Dataset:
        return dataset.map(lambda example: {"targets": tf.ensure_shape(example["targets"], [2])})

    documents = TaskDocuments(text_task([_broken], make_vocabulary(directory / "bytes")), Vocabulary.open(directory / "bytes"))
    with pytest.raises(DataError, match=r"SeqIO task 'documents', split 'train', shard 0: .*shape"):
        ids_of(documents)
