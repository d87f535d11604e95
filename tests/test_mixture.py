"""The mixture step: entropy, relative places, stages, and stores that do not belong together."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.batches import BatchLoader
from model.config_base import Config
from model.mixture_store import MixtureStore
from model.token_store import StoreError, TokenStoreWriter
from model.vocabularies.vocabulary import Vocabulary
from tasks.artifacts import Artifact, commit
from tasks.data_steps import Mixing
from tasks.datasets import DataError
from tasks.mixture import mix_body, unigram_entropy
from tasks.steps import Step
from tests.synthetic_vocabulary import small_vocabulary

DOCUMENTS = {"plays": [[1, 10, 11, 10, 2], [1, 10, 12, 2]] * 9, "sonnets": [[1, 20, 2]] * 9, "wiki": []}


class Nothing(Config):
    """A configuration without fields."""


@pytest.fixture(autouse=True)
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """These stores have no text that SeqIO could read; what SeqIO says of real ones is tested with the tokenization."""
    monkeypatch.setattr("tasks.mixture.seqio_rates", lambda step, directory, inputs: step.config.stages[0]["shares"])


@pytest.fixture
def tokenizer(tmp_path: Path) -> Artifact:
    step = Step("tokenizers", "m", Nothing())
    directory = step.directory(tmp_path / "root")
    directory.mkdir(parents=True)
    (tmp_path / "any.model").write_bytes(small_vocabulary())
    Vocabulary.open(tmp_path / "any.model").write(directory)
    return commit(directory, step, stats={})


def store(root: Path, name: str, digest: str | None = None) -> Artifact:
    step = Step("tokens", name, Nothing())
    directory = step.directory(root)
    digest = digest or Vocabulary.open(root.parent / "any.model").digest
    writer = TokenStoreWriter(directory, vocab_size=400, bos_id=1, eos_id=2, tokenizer_digest=digest)
    with writer.shard("train", 0, 1, "k") as shard:
        for document in DOCUMENTS[name]:
            shard.add(np.array(document), source_bytes=7)
    with writer.shard("validation", 0, 1, "k") as shard:
        shard.add(np.array([1, 30, 31, 2]), source_bytes=5)
    return commit(directory, step, stats=writer.stats({"train": 1, "validation": 1}))


def made(root: Path, shares: dict[str, float], inputs: tuple[Artifact, ...], **changes: Any) -> Artifact:
    fields = {
        "packing": "concat",
        "max_epochs": {},
        "holdout_tail": {},
        "simulated_epoching": None,
        "stages": ({"step": 0, "shares": shares},),
    }
    step = Step("mixtures", "m", Mixing.model_validate({**fields, **changes}))
    directory = step.directory(root)
    directory.mkdir(parents=True, exist_ok=True)
    return commit(directory, step, stats=mix_body(step, directory, inputs))


def test_unigram_entropy() -> None:
    assert unigram_entropy(np.array([5, 5, 0, 5, 5])) == pytest.approx(math.log(4))
    assert unigram_entropy(np.array([0.75, 0.25])) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert unigram_entropy(np.array([3])) == 0
    assert unigram_entropy(np.zeros(4)) == 0


def test_entropy_is_that_of_the_mixed_targets_bos_left_out(tmp_path: Path, tokenizer: Artifact) -> None:
    root = tmp_path / "root"
    mixture = made(root, {"plays": 0.75, "sonnets": 0.25}, (tokenizer, store(root, "plays"), store(root, "sonnets")))
    opened = MixtureStore.open(mixture)
    plays, sonnets = {10: 3 / 7, 11: 1 / 7, 12: 1 / 7, 2: 2 / 7}, {20: 1 / 2, 2: 1 / 2}
    assert [c.unigram_entropy for c in opened.components] == [
        pytest.approx(-sum(p * math.log(p) for p in part.values())) for part in (plays, sonnets)
    ]
    mixed = {token: 0.75 * plays.get(token, 0) + 0.25 * sonnets.get(token, 0) for token in {*plays, *sonnets}}
    assert opened.unigram_entropy == pytest.approx(-sum(p * math.log(p) for p in mixed.values()))
    assert opened.tokenizer.vocab_size == 400
    opened.tokenizer.check()


def test_a_root_can_be_moved_as_a_whole(tmp_path: Path, tokenizer: Artifact) -> None:
    root = tmp_path / "root"
    mixture = made(root, {"plays": 1.0}, (tokenizer, store(root, "plays")))
    before = BatchLoader(mixture, seq_len=8, global_batch_size=4, seed=0).batch(3)["tokens"]
    shutil.move(root, tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere" / Path(mixture.path).relative_to(root)
    np.testing.assert_array_equal(BatchLoader(moved, seq_len=8, global_batch_size=4, seed=0).batch(3)["tokens"], before)


def test_what_does_not_belong_together_is_refused(tmp_path: Path, tokenizer: Artifact) -> None:
    root = tmp_path / "root"
    with pytest.raises(DataError, match="dataset 'wiki' has no training token"):
        made(root, {"wiki": 1.0}, (tokenizer, store(root, "wiki")))
    with pytest.raises(DataError, match="was made with another tokenizer"):
        made(root, {"plays": 1.0}, (tokenizer, store(root, "plays", digest="0" * 64)))


def test_a_dataset_without_weight_is_only_evaluated(tmp_path: Path, tokenizer: Artifact) -> None:
    root = tmp_path / "root"
    mixture = made(root, {"plays": 1.0}, (tokenizer, store(root, "plays"), store(root, "wiki")))
    assert MixtureStore.open(mixture).validation_names() == ("plays", "wiki")
    assert list(BatchLoader(mixture, seq_len=8, global_batch_size=4, seed=0).planned(1)) == ["plays"]
    value = json.loads((Path(mixture.path) / "mixture.json").read_text(encoding="utf-8"))
    assert value["components"][1]["splits"]["validation"] == {"documents": 1, "tokens": 4, "source_bytes": 5}


def test_a_changed_tokenizer_file_is_found(tmp_path: Path, tokenizer: Artifact) -> None:
    root = tmp_path / "root"
    mixture = made(root, {"plays": 1.0}, (tokenizer, store(root, "plays")))
    (Path(tokenizer.path) / "tokenizer.model").write_bytes(small_vocabulary(500))
    with pytest.raises(StoreError, match="run the tokenizer step again"):
        MixtureStore.open(mixture).tokenizer.check()


def test_stages_limits_and_tails_reach_the_loader(tmp_path: Path, tokenizer: Artifact) -> None:
    root = tmp_path / "root"
    stages = ({"step": 0, "shares": {"plays": 1.0}}, {"step": 2, "shares": {"plays": 0.5, "sonnets": 0.5}})
    changes = {"stages": stages, "max_epochs": {"sonnets": 3.0}, "holdout_tail": {"plays": 6}}
    mixture = made(root, {}, (tokenizer, store(root, "plays"), store(root, "sonnets")), **changes)
    loader = BatchLoader(mixture, seq_len=8, global_batch_size=4, seed=0)
    assert loader.planned(2)["plays"]["tokens"] == 2 * 4 * 8
    # a block of 2,048 rows later it has had its three epochs, and the plays the rest
    assert loader.planned(600)["sonnets"]["epochs"] == 3
    assert sum(part["rows"] for part in loader.planned(600).values()) == 600 * 4
    plays = MixtureStore.open(mixture).component("plays")
    train, validation = plays.split("train"), plays.split("validation")
    assert train is not None
    assert validation is not None
    # whole documents from the end that hold 6 tokens or more, and the one that was held out by hash
    assert validation.num_documents == 3
    assert train.num_tokens + validation.num_tokens == 9 * (5 + 4) + 4
