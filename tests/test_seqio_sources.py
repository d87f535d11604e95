"""TFDS datasets as sources of text: the real thing, prepared here, read by the rules of a `Reading`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seqio
import tensorflow_datasets as tfds

from model.vocabularies.vocabulary import Vocabulary
from tasks.mixture_config import Chat, PromptCompletion, Reading
from tasks.readers.conversation import encode_answers
from tasks.readers.text_reader import split_of
from tasks.seqio_bridge.seqio_registry import add_tfds_task
from tasks.seqio_bridge.seqio_sources import TfdsTextSource
from tasks.sources import DataError
from tests.seqio_tokenizers import tokenizer_directory

TEXTS = [f"text number {number} of the training split" for number in range(40)]
HELD_OUT = ["one", "two", "three"]


class TinyTexts(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Texts, empty ones and bad ones, questions and conversations. It is not registered, so it is read from its files alone."""

    VERSION = tfds.core.Version("1.2.3")
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        message = {"role": tfds.features.Text(), "content": tfds.features.Text()}
        features = {
            "body": {"text": tfds.features.Text()},
            "sometimes": tfds.features.Text(),
            "question": tfds.features.Text(),
            "answer": tfds.features.Text(),
            "messages": tfds.features.Sequence(message),
            "number": tfds.features.Scalar(np.int64),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {"train": self._generate_examples(TEXTS), "validation": self._generate_examples(HELD_OUT)}

    def _generate_examples(self, texts: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, text in enumerate(texts):
            messages = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": text}]
            sometimes = ["", " \n ", b"bad \xff", "x" * 100][number % 4] if number < 4 else text
            example = {"body": {"text": text}, "sometimes": sometimes, "messages": messages, "number": number}
            yield number, {**example, "question": f"{number}?", "answer": text}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = str(tmp_path_factory.mktemp("tfds"))
    TinyTexts(data_dir=directory).download_and_prepare()
    return directory


def texts_of(source: Any, split: str, **arguments: Any) -> list[str]:
    return [example["targets"].decode() for example in source.get_dataset(split, shuffle=False, **arguments).as_numpy_iterator()]


def test_the_datasets_own_splits_are_read(data_dir: str, tmp_path: Path) -> None:
    reading = Reading(text_key="body.text")
    tokenizer = tokenizer_directory(tmp_path, "sentencepiece")
    task: Any = add_tfds_task("tiny", "tiny_texts:1.2.3", reading, tokenizer, data_dir)
    assert isinstance(task.source, seqio.TfdsDataSource)
    assert list(task.splits) == ["train", "validation"]
    assert (task.source.num_input_examples("train"), len(task.source.list_shards("train"))) == (40, 1)
    vocabulary = Vocabulary.open(tokenizer)
    for split, texts in (("train", TEXTS), ("validation", HELD_OUT)):
        assert sorted(texts_of(task.source, split)) == sorted(texts)
        found = [example["targets"].tolist() for example in task.get_dataset(None, split, shuffle=False).as_numpy_iterator()]
        assert sorted(found) == sorted([1, *vocabulary.encode(text).tolist(), 2] for text in texts)


def test_a_holdout_is_chosen_by_the_text_out_of_train(data_dir: str) -> None:
    source = TfdsTextSource("tiny_texts:1.2.3", Reading(text_key="body.text", holdout=0.2), data_dir)
    assert list(source.splits) == ["train", "validation"]
    assert source.num_input_examples("train") is None
    for split in ("train", "validation"):
        expected = [text for text in TEXTS if split_of(text, 0.2) == split]
        assert len(expected) > 2
        assert sorted(texts_of(source, split)) == sorted(expected)


def test_bad_texts_are_refused_or_skipped_and_counted(data_dir: str) -> None:
    fields = {"text_key": "sometimes", "max_document_bytes": 90}
    source = TfdsTextSource("tiny_texts:1.2.3", Reading(**fields, on_bad_document="skip"), data_dir)
    assert sorted(texts_of(source, "train")) == sorted(TEXTS[4:])
    assert source.skipped == {"empty": 2, "undecodable": 1, "too_long": 1}
    strict = TfdsTextSource("tiny_texts:1.2.3", Reading(**fields), data_dir)
    with pytest.raises(Exception, match="DataError"):
        texts_of(strict, "train")
    assert isinstance(strict.failure, DataError)
    assert str(strict.failure).startswith("tfds://tiny_texts:1.2.3, example ")
    missing = TfdsTextSource("tiny_texts:1.2.3", Reading(text_key="txt"), data_dir)
    with pytest.raises(Exception, match="DataError"):
        texts_of(missing, "train")
    assert "no key 'txt', but an object with the keys ['answer', 'body', 'messages'" in str(missing.failure)


def test_answers_of_tfds(data_dir: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_directory(tmp_path, "bytes")
    vocabulary = Vocabulary.open(tokenizer)
    for answers in (PromptCompletion(prompt_key="question", completion_key="answer"), Chat()):
        task: Any = add_tfds_task("answers", "tiny_texts:1.2.3", Reading(answers=answers), tokenizer, data_dir)
        documents = texts_of(task.source, "validation")
        examples = list(task.get_dataset(None, "validation", shuffle=False).as_numpy_iterator())
        assert len(examples) == 3
        for example, document in zip(examples, documents, strict=True):
            ids, mask = encode_answers(document, answers, vocabulary)
            assert example["targets"].tolist() == ids.tolist()
            assert example["loss_mask"].tolist() == mask.astype(int).tolist()


def test_what_cannot_be_used_is_said(data_dir: str) -> None:
    with pytest.raises(DataError, match=r"tfds://tiny_texts has no version.*tiny_texts has 1\.2\.3"):
        TfdsTextSource("tiny_texts", Reading(), data_dir)
    with pytest.raises(DataError, match=r"tfds://no_such_set:1\.0\.0 cannot be used .*set TFDS_DATA_DIR to where it is"):
        assert TfdsTextSource("no_such_set:1.0.0", Reading(), data_dir).splits
    source = TfdsTextSource("tiny_texts:1.2.3", Reading(), data_dir)
    with pytest.raises(ValueError, match="split 'test' of a text source that has train, validation"):
        source.get_dataset("test")
