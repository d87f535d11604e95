"""Token stores as SeqIO reads them: as a source, as a task, packed, and in a mixture."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seqio

from model.config_base import Config
from model.token_store import StoreError, TokenStore, TokenStoreWriter
from model.vocabularies.vocabulary import Vocabulary
from tasks.artifacts import Artifact, commit
from tasks.seqio_bridge.seqio_registry import add_mixture
from tasks.seqio_bridge.seqio_store import TokenStoreSource, register_store
from tasks.steps import Step
from tests.seqio_tokenizers import tokenizer_directory

TEXTS = {"train": [["to be", "or not"], [], ["to be that", "is", "the question"]], "validation": [["whether"], ["'tis"], ["nobler"]]}


class Nothing(Config):
    """A configuration without fields."""


def made_store(root: Path, kind: str = "bytes", *, loss_mask: bool = False, name: str = "web") -> Artifact:
    """A committed store of TEXTS, three shards a split, beside its committed tokenizer."""
    step = Step("tokenizers", kind, Nothing())
    directory = step.directory(root)
    if not directory.is_dir():
        shutil.copytree(tokenizer_directory(root / "made", kind), directory)
        commit(directory, step, stats={})
    vocabulary = Vocabulary.open(directory)
    tokens = Step("tokens", name, Nothing(), upstream=(step,))
    place = tokens.directory(root)
    writer = TokenStoreWriter(
        place,
        vocab_size=vocabulary.vocab_size,
        bos_id=vocabulary.bos_id,
        eos_id=vocabulary.eos_id,
        tokenizer_digest=vocabulary.digest,
        loss_mask=loss_mask,
    )
    for split, shards in TEXTS.items():
        for index, texts in enumerate(shards):
            with writer.shard(split, index, len(shards), "key") as shard:
                for text in texts:
                    ids = np.array(whole(vocabulary, text))
                    shard.add(ids, len(text), np.arange(len(ids)) >= 2 if loss_mask else None)
    return commit(place, tokens, stats=writer.stats({split: len(shards) for split, shards in TEXTS.items()}))


def whole(vocabulary: Vocabulary, text: str) -> list[int]:
    """The ids of a text with BOS and EOS."""
    return [*([] if vocabulary.bos_id is None else [vocabulary.bos_id]), *vocabulary.encode(text).tolist(), vocabulary.eos_id]


def expected(vocabulary: Vocabulary, split: str) -> list[list[int]]:
    return [whole(vocabulary, text) for shard in TEXTS[split] for text in shard]


def targets(dataset: Any) -> list[list[int]]:
    return [example["targets"].tolist() for example in dataset.as_numpy_iterator()]


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_the_source_yields_the_documents_of_each_shard(kind: str, tmp_path: Path) -> None:
    artifact = made_store(tmp_path, kind)
    vocabulary = Vocabulary.open(tmp_path / "made" / kind)
    source = TokenStoreSource(TokenStore.open(artifact))
    stored = TokenStoreSource(TokenStore.open(artifact), special_ids=True)
    assert sorted(source.splits) == ["train", "validation"]
    assert (source.num_input_examples("train"), source.num_input_examples("validation")) == (5, 3)
    assert len(source.list_shards("train")) == 3
    assert targets(source.get_dataset("train", shuffle=False)) == [ids[1:-1] for ids in expected(vocabulary, "train")]
    assert targets(stored.get_dataset("validation", shuffle=False)) == expected(vocabulary, "validation")
    for index, texts in enumerate(TEXTS["train"]):
        here = source.get_dataset("train", shuffle=False, shard_info=seqio.ShardInfo(index, 3))
        assert targets(here) == [vocabulary.encode(text).tolist() for text in texts]
    orders = {tuple(map(tuple, targets(source.get_dataset("validation", shuffle=True, seed=seed)))) for seed in range(8)}
    assert len(orders) > 1
    with pytest.raises(ValueError, match="split 'test' of a source that has train, validation"):
        source.get_dataset("test")


def test_a_store_is_a_task_that_seqio_packs_and_mixes(tmp_path: Path) -> None:
    artifact = made_store(tmp_path)
    vocabulary = Vocabulary.open(tmp_path / "made" / "bytes")
    register_store("stored", artifact)
    task: Any = register_store("stored", artifact)  # twice does no harm
    assert targets(task.get_dataset(None, "train", shuffle=False)) == expected(vocabulary, "train")
    assert task.output_features["targets"].vocabulary.decode(vocabulary.encode("to be").tolist()) == "to be"
    packed = seqio.get_dataset("stored", {"targets": 64}, seqio.LMFeatureConverter(pack=True), "train", shuffle=False)
    rows = list(packed.as_numpy_iterator())
    together = np.concatenate([row["decoder_target_tokens"][row["decoder_segment_ids"] > 0] for row in rows]).tolist()
    assert together == np.concatenate(expected(vocabulary, "train")).tolist()
    register_store("stored_too", Path(artifact.path), tmp_path / "made" / "bytes")
    add_mixture("stores", {"stored": 0.75, "stored_too": 0.25})
    mixed = seqio.get_mixture_or_task("stores").get_dataset({"targets": 64}, "validation", shuffle=True, seed=0, num_epochs=1)
    assert {tuple(ids) for ids in targets(mixed)} <= {tuple(ids) for ids in expected(vocabulary, "validation")}


def test_a_loss_mask_comes_along(tmp_path: Path) -> None:
    task: Any = register_store("masked_store", made_store(tmp_path, loss_mask=True))
    vocabulary = Vocabulary.open(tmp_path / "made" / "bytes")
    found = list(task.get_dataset(None, "train", shuffle=False).as_numpy_iterator())
    assert [example["targets"].tolist() for example in found] == expected(vocabulary, "train")
    assert [example["loss_mask"].tolist() for example in found] == [[0, 0] + [1] * (len(ids) - 2) for ids in expected(vocabulary, "train")]
    cut = next(iter(task.get_dataset({"targets": 3}, "train", shuffle=False).as_numpy_iterator()))
    assert cut["loss_mask"].tolist() == [0, 0, 1]


def test_another_or_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    artifact = made_store(tmp_path)
    with pytest.raises(StoreError, match="was made with another tokenizer"):
        register_store("wrong", artifact, tokenizer_directory(tmp_path / "other", "sentencepiece"))
    shutil.rmtree(tmp_path / "tokenizers")
    with pytest.raises(StoreError, match=r"the tokenizer it was made with is not in .*; give its directory as tokenizer="):
        register_store("lost", artifact)


def test_documents_without_bos_and_eos_are_found(tmp_path: Path) -> None:
    step = Step("tokens", "bare", Nothing())
    writer = TokenStoreWriter(step.directory(tmp_path), vocab_size=300, bos_id=1, eos_id=2, tokenizer_digest="0" * 64)
    with writer.shard("train", 0, 1, "key") as shard:
        shard.add(np.array([1, 5, 2]), 1)
        shard.add(np.array([5, 6]), 1)
    commit(step.directory(tmp_path), step, stats=writer.stats({"train": 1}))
    source = TokenStoreSource(TokenStore.open(step.directory(tmp_path)))
    with pytest.raises(Exception, match="a document is not between BOS and EOS"):
        targets(source.get_dataset("train", shuffle=False))
