"""The SeqIO cache of a token store: byte for byte what TensorFlow would write, read by SeqIO, whole after every interruption."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seqio
import tensorflow as tf

from model.token_store import StoreError, TokenStore
from model.vocabularies.vocabulary import Vocabulary
from tasks.mixture_config import Reading
from tasks.seqio_bridge import seqio_cache
from tasks.seqio_bridge.seqio_cache import DocumentBlock, document_blocks, examples, export_cache, main, varints
from tasks.seqio_bridge.seqio_registry import add_mixture, add_task
from tasks.seqio_bridge.seqio_store import register_store
from tests.test_seqio_registry import lines
from tests.test_seqio_store import TEXTS, expected, made_store, targets


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize("high", [1, 127, 128, 129, 16_383, 16_384, 2_097_151, 2_097_152, 2**31 - 1])
def test_examples_are_the_bytes_that_tensorflow_writes(high: int) -> None:
    generator = np.random.default_rng(high)
    lengths = np.array([0, 1, 2, 200, 0, 20_000])
    ids = generator.integers(0, high + 1, lengths.sum())
    ids[-1] = high
    block = DocumentBlock(ids, lengths, None)
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    for found, part in zip(examples(block), parts, strict=True):
        assert found == seqio.dict_to_tfexample({"targets": part}).SerializeToString()
    mask = generator.integers(0, 2, len(ids)).astype(bool)
    for found, part, flags in zip(examples(DocumentBlock(ids, lengths, mask)), parts, np.split(mask, np.cumsum(lengths)[:-1]), strict=True):
        theirs = seqio.dict_to_tfexample({"targets": part, "loss_mask": flags.astype(np.int32)})
        assert found == theirs.SerializeToString(deterministic=True)
    assert varints(np.empty(0, np.int64)) == (b"", pytest.approx(np.empty(0)))


def test_record_files_are_those_of_seqios_own_writer(tmp_path: Path) -> None:
    artifact = made_store(tmp_path)
    place = export_cache(artifact.path, tmp_path / "cache", "of:this_store")
    assert place == tmp_path / "cache" / "of" / "this_store"
    task: Any = register_store("of:this_store", artifact)
    for split, shards in TEXTS.items():
        for index in range(len(shards)):
            source = task.source.get_dataset(split, shuffle=False, shard_info=seqio.ShardInfo(index, len(shards)))
            path = tmp_path / "theirs"
            with tf.io.TFRecordWriter(str(path)) as writer:
                for example in task.preprocess_precache(source):
                    writer.write(seqio.dict_to_tfexample(example).SerializeToString())
            assert (place / f"{split}.tfrecord-{index:05d}-of-{len(shards):05d}").read_bytes() == path.read_bytes()
    info = json.loads((place / "info.train.json").read_text(encoding="utf-8"))
    assert info == {"num_shards": 3, "features": {"targets": {"shape": [None], "dtype": "int32"}}, "seqio_version": seqio.__version__}
    stats = json.loads((place / "stats.train.json").read_text(encoding="utf-8"))
    sizes = [len(text) for shard in TEXTS["train"] for text in shard]
    assert stats == {"examples": 5, "targets_tokens": sum(sizes), "targets_max_tokens": max(sizes)}


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_seqio_reads_it_as_a_task_and_in_a_mixture(kind: str, tmp_path: Path) -> None:
    artifact = made_store(tmp_path, kind)
    vocabulary = Vocabulary.open(tmp_path / "made" / kind)
    export_cache(artifact.path, tmp_path / "cache", f"cached_{kind}")
    task: Any = register_store(f"cached_{kind}", artifact)
    seqio.set_global_cache_dirs([str(tmp_path / "cache")])
    shutil.rmtree(artifact.path)  # from here on there is nothing but the cache
    for split in TEXTS:
        # SeqIO interleaves the files of a cache
        assert sorted(targets(task.get_dataset(None, split, use_cached=True, shuffle=False))) == sorted(expected(vocabulary, split))
    assert task.get_cached_stats("validation")["examples"] == 3
    add_mixture(f"mixed_{kind}", {f"cached_{kind}": 1.0})
    converter = seqio.LMFeatureConverter(pack=True)
    rows = list(seqio.get_dataset(f"mixed_{kind}", {"targets": 64}, converter, "train", use_cached=True, shuffle=False).as_numpy_iterator())
    together = np.concatenate([row["decoder_target_tokens"][row["decoder_segment_ids"] > 0] for row in rows])
    assert sorted(together.tolist()) == sorted(np.concatenate(expected(vocabulary, "train")).tolist())


def test_the_cache_is_one_of_the_task_over_the_files_too(tmp_path: Path) -> None:
    artifact = made_store(tmp_path)
    paths = [lines(tmp_path / f"{index}.txt", *texts) for index, texts in enumerate(TEXTS["train"])]
    task: Any = add_task("over_files", paths, Reading(document="line"), tmp_path / "made" / "bytes")
    export_cache(artifact.path, tmp_path / "cache", "over_files")
    seqio.set_global_cache_dirs([str(tmp_path / "cache")])
    plain, cached = (sorted(targets(task.get_dataset(None, "train", use_cached=use, shuffle=False))) for use in (False, True))
    assert cached == plain
    assert len(plain) == 5


def test_a_loss_mask_is_in_the_cache(tmp_path: Path) -> None:
    artifact = made_store(tmp_path, loss_mask=True)
    export_cache(artifact.path, tmp_path / "cache", "cached_mask")
    task: Any = register_store("cached_mask", artifact)
    seqio.set_global_cache_dirs([str(tmp_path / "cache")])
    plain, cached = (
        sorted((example["targets"].tolist(), example["loss_mask"].tolist()) for example in dataset.as_numpy_iterator())
        for dataset in (task.get_dataset(None, "train", use_cached=use_cached, shuffle=False) for use_cached in (False, True))
    )
    assert cached == plain
    assert cached[0][0][0] == 1


def test_killed_at_any_write_it_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = made_store(tmp_path)
    whole = files(export_cache(artifact.path, tmp_path / "whole", "task"))
    assert sorted(whole) == sorted(
        ["COMPLETED", "token-store.json"]
        + [f"{split}.tfrecord-{index:05d}-of-00003" for split in TEXTS for index in range(3)]
        + [f"{what}.{split}.json" for split in TEXTS for what in ("info", "stats")]
    )
    real = os.fsync
    calls = 0
    while not (tmp_path / "killed" / "task" / "COMPLETED").exists():
        left = calls // 2

        def _fail(descriptor: int) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            real(descriptor)

        monkeypatch.setattr(os, "fsync", _fail)
        try:
            export_cache(artifact.path, tmp_path / "killed", "task")
        except KeyboardInterrupt:
            calls += 1
        monkeypatch.setattr(os, "fsync", real)
    assert calls > 3
    assert files(tmp_path / "killed" / "task") == whole


def test_a_finished_one_is_kept_and_one_of_another_store_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = made_store(tmp_path)
    place = export_cache(artifact.path, tmp_path / "cache", "task")
    before = {path: path.stat().st_mtime_ns for path in place.iterdir()}
    assert main([artifact.path, str(tmp_path / "cache"), "task"]) == 0
    assert {path: path.stat().st_mtime_ns for path in place.iterdir()} == before
    other = made_store(tmp_path, "sentencepiece", name="other")
    # a set of another number of files: SeqIO's pattern for 3 shards would match it too
    (place / "train.tfrecord-00000-of-00013").write_bytes(b"stale")
    export_cache(other.path, tmp_path / "cache", "task")
    assert files(place) == files(export_cache(other.path, tmp_path / "fresh", "task"))


def test_what_others_wrote_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = made_store(tmp_path)
    (tmp_path / "cache" / "task").mkdir(parents=True)
    (tmp_path / "cache" / "task" / "COMPLETED").touch()
    with pytest.raises(StoreError, match="holds a finished SeqIO cache that was not exported from a token store"):
        export_cache(artifact.path, tmp_path / "cache", "task")
    for name in ("..", "a:..", "", "a/b", "a-b"):
        with pytest.raises(ValueError, match="SeqIO takes letters"):
            export_cache(artifact.path, tmp_path / "cache", name)
    assert main([str(tmp_path / "nothing"), str(tmp_path / "cache"), "other"]) == 1
    assert "is not a committed artifact" in capsys.readouterr().err


def test_blocks_end_between_documents_wherever_they_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = TokenStore.open(made_store(tmp_path))
    vocabulary = Vocabulary.open(tmp_path / "made" / "bytes")
    inside = np.concatenate([ids[1:-1] for ids in expected(vocabulary, "train")]).tolist()
    for block_tokens in (1, 6, 7, 20, 1000):
        monkeypatch.setattr(seqio_cache, "_BLOCK_TOKENS", block_tokens)
        blocks = [block for index in range(3) for block in document_blocks(store, "train", index)]
        assert np.concatenate([block.ids for block in blocks]).tolist() == inside
        assert np.concatenate([block.lengths for block in blocks]).tolist() == [len(ids) - 2 for ids in expected(vocabulary, "train")]
    assert len(blocks) == 2
