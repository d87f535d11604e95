"""The tokenization step: SeqIO, in a child process, turns a dataset's files into a token store shard by shard."""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.durable import write_json
from model.token_store import TokenStoreWriter
from model.token_writer import LEDGER_SCHEMA
from tasks.artifacts import Artifact
from tasks.caching import run_logger, step_task
from tasks.children import ChildFailed, run_child
from tasks.data_steps import RawFiles, RegisteredTask, Tokenization
from tasks.download import naming_originals, raw_files
from tasks.fingerprints import canonical_json
from tasks.sources import DataError, SourceFile
from tasks.steps import Step
from tasks.tokenization_spec import ShardJob, TokenizationSpec
from tasks.vocabulary import MODEL
from tasks.vocabulary_file import VocabularyInfo, inspect_vocabulary

_WORKER = "tasks.tokenize_worker"
_SPEC = ".tokenize.json"
_LOG_SECONDS = 5.0
# One at a time: each child holds TensorFlow's 700 MB, and a laptop has little more to give.
_one_child = threading.Lock()


def tokenize_body(step: Step, directory: Path, inputs: tuple[Artifact, ...]) -> dict[str, Any]:
    """Writes the shards of `step` into `directory`; those that are there with their hashes are kept.

    A shard is a source file. The bytes written do not depend on how often the step was killed on the way.
    Raises DataError for text that cannot be used, OSError where the disk is full or closed, ChildFailed where the process
    died of something else.
    """
    config = step.config
    model = Path(inputs[-1].path) / MODEL
    info = inspect_vocabulary(model)
    writer = TokenStoreWriter(directory, vocab_size=info.vocab_size, bos_id=info.bos_id, eos_id=info.eos_id, tokenizer_sha256=info.sha256)
    common = {
        "store": str(directory.absolute()),
        "tokenizer": str(model.absolute()),
        "tokenizer_sha256": info.sha256,
        "vocab_size": info.vocab_size,
        "bos_id": info.bos_id,
        "eos_id": info.eos_id,
        "key": step.fingerprint,
    }
    if isinstance(config, RegisteredTask):
        counts = _run_worker(step.name, TokenizationSpec(**common, registered=config), directory)
    else:
        assert isinstance(config, Tokenization)
        raw = step.upstream[0].config
        assert isinstance(raw, RawFiles)
        files = raw_files(Path(inputs[0].path).absolute(), raw)
        jobs = shard_jobs(config, raw.files, info)
        counts = {job.split: job.of for job in jobs}
        missing = tuple(job for job in jobs if writer.committed(job.split, job.shard, job.of, job.key) is None)
        if missing:
            spec = TokenizationSpec(**common, files=tuple(map(str, files)), reading=config.reading, jobs=missing)
            with naming_originals(files, raw):
                _run_worker(step.name, spec, directory)
    _remove_other_shards(directory, counts)
    stats = writer.stats(counts)
    if not stats["splits"].get("train", {}).get("tokens"):
        raise DataError(f"dataset {step.name!r} has no training document: its files hold only empty or held-out ones; add text to it")
    return stats


def shard_jobs(config: Tokenization, files: tuple[SourceFile, ...], info: VocabularyInfo) -> tuple[ShardJob, ...]:
    """A job for each file and split, keyed by everything its output depends on and nothing else."""
    splits = ("train", "validation") if config.reading.holdout else ("train",)
    jobs: list[ShardJob] = []
    for split in splits:
        for index, file in enumerate(files):
            value = [LEDGER_SCHEMA, split, config.reading.identity(), info.sha256, file.sha256]
            key = hashlib.sha256(canonical_json(value).encode()).hexdigest()
            jobs.append(ShardJob(split=split, shard=index, of=len(files), key=key))
    return tuple(jobs)


def _remove_other_shards(store: Path, counts: Mapping[str, int]) -> None:
    """Removes shards of another number of shards, which a registered task with changed files can leave."""
    for split, count in counts.items():
        for directory in (store / split).glob("shard-*-of-*"):
            if not directory.name.endswith(f"-of-{count:05d}"):
                shutil.rmtree(directory)


def _run_worker(name: str, spec: TokenizationSpec, directory: Path) -> dict[str, int]:
    """Runs the process that writes the shards; returns how many each split has."""
    logger = run_logger()
    path = directory / _SPEC
    write_json(path, spec.model_dump(mode="json"))
    error: dict[str, Any] = {}
    counts: dict[str, int] = {}
    told = time.monotonic()

    def _on_event(event: dict[str, Any]) -> None:
        nonlocal told
        if event.get("event") == "error":
            error.update(event)
        elif event.get("event") == "shards":
            counts.update(event["counts"])
        elif event.get("event") == "shard" and (time.monotonic() - told > _LOG_SECONDS or event["shard"] + 1 == event["of"]):
            told = time.monotonic()
            logger.info(
                "%s %s: shard %d of %d, %d documents, %d tokens",
                name, event["split"], event["shard"] + 1, event["of"], event["documents"], event["tokens"],
            )  # fmt: skip

    try:
        with _one_child:
            run_child(_WORKER, [str(path.absolute())], _on_event)
    except ChildFailed as failed:
        if error.get("kind") == "data":
            raise DataError(str(failed)) from None
        if error.get("kind") == "storage":
            # with its number, so that whoever runs the step knows a full disk from a closed one
            raise OSError(error["errno"], str(failed)) from None
        raise
    return counts


tokenize = step_task(description="Tokenize a dataset with SeqIO")(tokenize_body)
