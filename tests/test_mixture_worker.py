"""A mixture is defined in SeqIO with its rates, and each token store is held against what SeqIO yields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seqio
import tensorflow as tf

from model.config_base import Config
from model.token_store import TokenStoreWriter
from model.vocabularies.vocabulary import Vocabulary
from tasks.artifacts import commit
from tasks.data_steps import RegisteredTask
from tasks.mixture_config import Reading
from tasks.seqio_bridge import mixture_worker
from tasks.seqio_bridge.mixture_worker import MixtureComponentSpec, MixtureSpec, define
from tasks.sources import DataError
from tasks.steps import Step
from tests.seqio_tokenizers import tokenizer_directory
from tests.test_seqio_registry import add_text_line_task, lines

FILES = [[f"file {number} line {line}" for line in range(20)] for number in range(5)]


class Nothing(Config):
    """A configuration without fields."""


class Setting:
    """Five files, a tokenizer, and stores made of the files as the fast path makes them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tokenizer = tokenizer_directory(root, "bytes")
        self.vocabulary = Vocabulary.open(self.tokenizer)
        self.files = tuple(str(lines(root / f"{number}.txt", *texts)) for number, texts in enumerate(FILES))

    def store(self, name: str, shards: list[list[str]]) -> str:
        step = Step("tokens", name, Nothing())
        writer = TokenStoreWriter(step.directory(self.root), vocab_size=259, bos_id=1, eos_id=2, tokenizer_digest=self.vocabulary.digest)
        for index, texts in enumerate(shards):
            with writer.shard("train", index, len(shards), "key") as shard:
                for text in texts:
                    shard.add(np.array([1, *self.vocabulary.encode(text).tolist(), 2]), len(text))
        return commit(step.directory(self.root), step, stats=writer.stats({"train": len(shards)})).path

    def component(self, name: str, shards: list[list[str]], **fields: Any) -> MixtureComponentSpec:
        return MixtureComponentSpec(name=name, store=self.store(name, shards), **fields)

    def spec(self, weights: dict[str, float], *components: MixtureComponentSpec) -> MixtureSpec:
        return MixtureSpec(name="my-mix", tokenizer=str(self.tokenizer), weights=weights, components=components)


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(tmp_path)


LINES = Reading(document="line")


def test_the_rates_are_seqios_and_stores_in_no_stage_are_tasks_only(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    add_text_line_task("their_lines", Path(setting.files[1]), seqio.ByteVocabulary())
    web = setting.component("web", FILES, files=setting.files, reading=LINES)
    many = setting.component("many", [FILES[0] + FILES[1], FILES[2] + FILES[3], FILES[4]], files=setting.files, reading=LINES)
    theirs = setting.component("theirs", [FILES[1]], registered=RegisteredTask(task="their_lines"))
    stored = setting.component("stored-only", [["nothing to compare"]])
    spec = setting.spec({"web": 0.5, "theirs": 0.125, "many": 0.375}, web, many, theirs, stored)
    (setting.root / "spec.json").write_text(spec.model_dump_json(), encoding="utf-8")
    assert mixture_worker.main([str(setting.root / "spec.json")]) == 0
    assert json.loads(capsys.readouterr().out) == {"event": "rates", "rates": {"web": 0.5, "theirs": 0.125, "many": 0.375}}
    mixture = seqio.MixtureRegistry.get("my_mix")
    assert [task.name for task in mixture.tasks] == ["my_mix.many", "my_mix.web", "their_lines"]
    assert "my_mix.stored_only" in seqio.TaskRegistry.names()


def test_two_datasets_of_one_task_keep_their_own_shares(setting: Setting) -> None:
    add_text_line_task("shared_lines", Path(setting.files[0]), seqio.ByteVocabulary())
    config = RegisteredTask(task="shared_lines")
    parts = [setting.component(name, [FILES[0]], registered=config) for name in ("a", "b")]
    web = setting.component("web", FILES, files=setting.files, reading=LINES)
    shares = {"a": 0.125, "b": 0.25, "web": 0.625}
    assert define(setting.spec(shares, *parts, web)) == pytest.approx(shares)


@pytest.mark.parametrize("shard", [0, 4])
def test_a_store_of_other_documents_is_found_in_the_first_and_in_the_last_shard(shard: int, setting: Setting) -> None:
    changed = [list(texts) for texts in FILES]
    changed[shard][7] = "something else"
    web = setting.component("web", changed, files=setting.files, reading=LINES)
    message = rf"split 'train', shard {shard}, does not begin with the documents that SeqIO yields for 'web': .*--force 'tokens/web'"
    with pytest.raises(DataError, match=message):
        define(setting.spec({"web": 1.0}, web))


def test_a_store_with_another_number_of_shards_is_found(setting: Setting) -> None:
    web = setting.component("web", [*FILES, FILES[0]], files=setting.files, reading=LINES)
    with pytest.raises(DataError, match="does not begin with the documents"):
        define(setting.spec({"web": 1.0}, web))


def test_changed_data_of_a_registered_task_needs_a_revision_and_a_random_one_a_warning(
    setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    add_text_line_task("changing", Path(setting.files[0]), seqio.ByteVocabulary())
    theirs = setting.component("theirs", [FILES[2]], registered=RegisteredTask(task="changing"))
    with pytest.raises(DataError, match="for 'theirs': change its revision"):
        define(setting.spec({"theirs": 1.0}, theirs))
    random = lambda dataset: dataset.map(lambda line: {"targets": tf.random.uniform([9], 3, 259, tf.int32)})  # noqa: E731
    source: Any = seqio.TextLineDataSource({"train": setting.files[0]})
    feature = seqio.Feature(seqio.ByteVocabulary())
    seqio.TaskRegistry.remove("changing")
    seqio.TaskRegistry.add("changing", source=source, preprocessors=[random], output_features={"targets": feature})
    assert define(setting.spec({"theirs": 1.0}, theirs)) == {"theirs": 1.0}
    assert "yields other documents each time" in json.loads(capsys.readouterr().out)["message"]
