"""Tokenizers as SeqIO vocabularies: the same ids in Python and in TensorFlow, the right special ids, equal by content."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seqio
import tensorflow as tf

from model.vocabularies.vocabulary import Vocabulary
from tasks.seqio_bridge.seqio_vocabularies import TokenizerVocabulary, make_vocabulary
from tests.seqio_tokenizers import EOS, KINDS, tokenizer_directory

TEXTS = (
    "To be, or not to be: that is the question.",
    "na\u00efve caf\u00e9 \u65e5\u672c\u8a9e \U0001f642\n\n  two  spaces\ttab 1234567",
    f"a {EOS} and </s> in the text",
)


@pytest.fixture(scope="module", params=KINDS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_directory(tmp_path_factory.mktemp("tokenizer"), request.param)


def test_python_and_tensorflow_give_the_tokenizers_ids(directory: Path) -> None:
    vocabulary: Any = make_vocabulary(directory)
    tokenizer = Vocabulary.open(directory)
    for text in TEXTS:
        expected = tokenizer.encode(text).tolist()
        assert list(vocabulary.encode(text)) == expected
        encoded = vocabulary.encode_tf(tf.constant(text))
        assert encoded.dtype == tf.int32
        assert encoded.numpy().tolist() == expected
        assert tokenizer.eos_id not in expected
        assert vocabulary.decode(expected) == text
        assert vocabulary.decode([*expected, vocabulary.eos_id, 5, 6]) == text
        assert vocabulary.decode_tf(tf.constant(expected)).numpy().decode() == text
    assert (vocabulary.vocab_size, vocabulary.bos_id, vocabulary.eos_id) == (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id)


def test_batches_and_graphs(directory: Path) -> None:
    vocabulary: Any = make_vocabulary(directory)
    ragged = vocabulary.encode_tf(tf.constant(TEXTS))
    assert ragged.to_list() == [list(vocabulary.encode(text)) for text in TEXTS]
    dataset: Any = tf.data.Dataset.from_tensor_slices(list(TEXTS)).map(vocabulary.encode_tf)
    assert dataset.element_spec.shape.as_list() == [None]
    assert [ids.tolist() for ids in dataset.as_numpy_iterator()] == ragged.to_list()
    eos = [[*row, vocabulary.eos_id] for row in ragged.to_list()]
    padded = tf.ragged.constant(eos, dtype=tf.int32).to_tensor(default_value=5)
    if isinstance(vocabulary, TokenizerVocabulary):
        assert [text.decode() for text in vocabulary.decode_tf(padded).numpy()] == list(TEXTS)


def test_it_is_pickled_without_its_tokenizer_and_equal_by_content(directory: Path, tmp_path: Path) -> None:
    vocabulary = make_vocabulary(directory)
    ids = vocabulary.encode("to be")
    data = pickle.dumps(vocabulary)
    assert len(data) < 1000
    again = pickle.loads(data)
    assert again.encode("to be") == ids
    shutil.copytree(directory, tmp_path / "copy")
    assert make_vocabulary(tmp_path / "copy") == vocabulary
    assert make_vocabulary(tokenizer_directory(tmp_path, "bytes" if directory.name != "bytes" else "sentencepiece")) != vocabulary


def test_sentencepiece_is_seqios_own_and_equals_it_wherever_the_file_is(tmp_path: Path) -> None:
    directory = tokenizer_directory(tmp_path, "sentencepiece")
    shutil.copy(directory / "tokenizer.model", tmp_path / "other.model")
    theirs = seqio.SentencePieceVocabulary(str(tmp_path / "other.model"))
    for ours in (make_vocabulary(directory), make_vocabulary(directory / "tokenizer.model")):
        assert isinstance(ours, seqio.SentencePieceVocabulary)
        assert ours == theirs
        assert theirs == ours
        assert (theirs != ours) is False
        assert ours != seqio.SentencePieceVocabulary(str(tmp_path / "other.model"), extra_ids=10)


def test_special_ids_where_the_tokenizer_has_none_or_padding(tmp_path: Path) -> None:
    pairs, text_bytes = (make_vocabulary(tokenizer_directory(tmp_path, kind)) for kind in ("tiktoken", "bytes"))
    assert (pairs.bos_id, pairs.eos_id, pairs.unk_id, pairs.pad_id) == (598, 599, None, 0)
    assert (text_bytes.bos_id, text_bytes.eos_id, text_bytes.unk_id, text_bytes.pad_id) == (1, 2, None, 0)


def test_a_real_id_0_is_lost_when_seqio_packs_which_is_why_stores_are_not_packed_by_it(tmp_path: Path) -> None:
    vocabulary = make_vocabulary(tokenizer_directory(tmp_path, "tiktoken"))
    ids = [5, *vocabulary.encode("!"), 7, 599]
    assert ids == [5, 0, 7, 599]
    dataset = tf.data.Dataset.from_tensors({"targets": tf.constant(ids, tf.int32)})
    packed = next(iter(seqio.LMFeatureConverter(pack=True)(dataset, {"targets": 6}).as_numpy_iterator()))
    assert packed["decoder_target_tokens"].tolist() == [5, 0, 7, 0, 0, 0]
    assert np.count_nonzero(packed["decoder_segment_ids"]) < len(ids)
