"""The process that tokenizes: `python -m tasks.tokenize_worker SPEC.json`, the one place where TensorFlow runs.

It writes the shards of a token store from a SeqIO task and prints JSON lines: `{"event": "shard", "split": "train",
"shard": 3, "of": 13, "documents": ..., "tokens": ...}`, "progress" in between, and `{"event": "error", "message": ...}`; first of all
`{"event": "shards", "counts": {"train": 13}}`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from model.child import die_with_parent, emit
from model.token_store import StoreError, TokenStoreWriter
from model.token_writer import ShardWriter
from tasks.sources import DataError
from tasks.tokenization_spec import ShardJob, TokenizationSpec

if TYPE_CHECKING:
    import seqio

_PROGRESS_SECONDS = 2.0

FEATURE = "targets"


def main(arguments: list[str]) -> int:
    """Tokenizes what the spec file says. Exit status 0 when every shard is written, 1 after an "error" line."""
    die_with_parent()
    # read by TensorFlow when it is imported: no banner, the same float results everywhere, and never an accelerator
    os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", TF_ENABLE_ONEDNN_OPTS="0", CUDA_VISIBLE_DEVICES="", TPU_SKIP_MDS_QUERY="1")
    spec = TokenizationSpec.model_validate_json(Path(arguments[0]).read_bytes())
    try:
        tokenize_shards(spec)
    except (DataError, StoreError) as error:
        emit("error", message=str(error), kind="data")
        return 1
    except OSError as error:
        emit("error", message=f"{error.strerror or error}: {error.filename or spec.store}", kind="storage", errno=error.errno)
        return 1
    return 0


def tokenize_shards(spec: TokenizationSpec) -> None:
    """Writes every shard of the spec that is not there yet. Raises DataError, StoreError."""
    from tasks.seqio_registry import add_task, registered_task

    if spec.registered is None:
        task = add_task("tokenize", [Path(path) for path in spec.files], spec.reading, spec.tokenizer)
        jobs = list(spec.jobs)
    else:
        task = registered_task(spec.registered.task, spec.registered.module)
        jobs = registered_jobs(task, spec)
    _check_vocabulary(task, spec)
    emit("shards", counts={job.split: job.of for job in jobs})
    writer = TokenStoreWriter(
        Path(spec.store), vocab_size=spec.vocab_size, bos_id=spec.bos_id, eos_id=spec.eos_id, tokenizer_sha256=spec.tokenizer_sha256
    )
    for job in jobs:
        if writer.committed(job.split, job.shard, job.of, job.key) is not None:
            continue
        with writer.shard(job.split, job.shard, job.of, job.key) as shard:
            _write_shard(task, job, shard, spec)
        emit("shard", split=job.split, shard=job.shard, of=job.of, documents=shard.documents, tokens=shard.tokens)


def registered_jobs(task: seqio.Task, spec: TokenizationSpec) -> list[ShardJob]:
    """A job for each shard that the task's own source has, of its train and, where it has one, validation split."""
    jobs: list[ShardJob] = []
    for split in ("train", "validation"):
        if split in task.splits:
            count = max(len(task.source.list_shards(split)), 1)
            jobs += [ShardJob(split=split, shard=index, of=count, key=f"{spec.key}/{split}/{index}/{count}") for index in range(count)]
    return jobs


def documents(task: seqio.Task, job: ShardJob) -> Iterator[dict[str, np.ndarray]]:
    """The examples of one shard as SeqIO yields them, whole and in order.

    Raises DataError: the source's own where it has one, else one that says what TensorFlow said.
    """
    import seqio
    import tensorflow as tf

    shard_info = seqio.ShardInfo(index=job.shard, num_shards=job.of)
    try:
        dataset = task.get_dataset(None, split=job.split, shuffle=False, shard_info=shard_info, num_epochs=1)
        yield from dataset.as_numpy_iterator()
    except tf.errors.OpError as error:
        failure = getattr(task.source, "failure", None)
        if isinstance(failure, DataError):
            raise failure from None
        raise DataError(f"SeqIO task {task.name!r}, split {job.split!r}, shard {job.shard}: {error.message[:500]}") from None


def _write_shard(task: seqio.Task, job: ShardJob, shard: ShardWriter, spec: TokenizationSpec) -> None:
    vocabulary = task.output_features[FEATURE].vocabulary
    told = time.monotonic()
    for example in documents(task, job):
        ids = example[FEATURE]
        if spec.registered is not None:
            ids = _with_special_ids(ids, spec)
        _check_special_ids(ids, shard.documents, job, spec)
        text = example.get(f"{FEATURE}_pretokenized")
        size = len(text) if isinstance(text, bytes) else len(vocabulary.decode(ids[1:-1].tolist()).encode())
        shard.add(ids, size)
        if time.monotonic() - told > _PROGRESS_SECONDS:
            told = time.monotonic()
            emit("progress", split=job.split, shard=job.shard, of=job.of, documents=shard.documents, tokens=shard.tokens)
    # every split reads every document, so what is skipped is counted once
    if job.split == "train":
        shard.skipped = dict(getattr(task.source, "skipped", {}))


def _with_special_ids(ids: np.ndarray, spec: TokenizationSpec) -> np.ndarray:
    """A registered task may or may not add BOS and EOS itself."""
    before = [] if len(ids) and ids[0] == spec.bos_id else [spec.bos_id]
    after = [] if len(ids) and ids[-1] == spec.eos_id else [spec.eos_id]
    return np.concatenate([before, ids, after]).astype(np.int64)


def _check_special_ids(ids: np.ndarray, document: int, job: ShardJob, spec: TokenizationSpec) -> None:
    begins = len(ids) >= 2 and ids[0] == spec.bos_id and np.count_nonzero(ids == spec.bos_id) == 1
    ends = len(ids) >= 2 and ids[-1] == spec.eos_id and np.count_nonzero(ids == spec.eos_id) == 1
    if not (begins and ends):
        raise DataError(
            f"document {document} of {job.split} shard {job.shard} is {ids[:4].tolist()} ... {ids[-4:].tolist()}, without BOS "
            f"(id {spec.bos_id}) first and EOS (id {spec.eos_id}) last, each once; the tokenizer must not make them from text"
        )


def _check_vocabulary(task: seqio.Task, spec: TokenizationSpec) -> None:
    """Raises DataError unless the task's vocabulary is the tokenizer of the spec."""
    import hashlib

    import seqio

    vocabulary: Any = task.output_features[FEATURE].vocabulary
    if not isinstance(vocabulary, seqio.SentencePieceVocabulary):
        raise DataError(f"SeqIO task {task.name!r} has a {type(vocabulary).__name__}; only SentencePiece vocabularies are supported")
    digest = hashlib.sha256(Path(vocabulary.sentencepiece_model_file).read_bytes()).hexdigest()
    found = (digest, vocabulary.vocab_size, vocabulary.bos_id, vocabulary.eos_id)
    expected = (spec.tokenizer_sha256, spec.vocab_size, spec.bos_id, spec.eos_id)
    if found != expected:
        raise DataError(
            f"SeqIO task {task.name!r} has the vocabulary (sha256, size, BOS, EOS) {found}, the mixture's tokenizer is {expected}; "
            "set mixture.tokenizer to the task's own model file"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
