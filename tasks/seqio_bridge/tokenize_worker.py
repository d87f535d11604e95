"""The process that tokenizes through SeqIO: `python -m tasks.seqio_bridge.tokenize_worker SPEC.json`. TensorFlow runs here only.

It writes the shards of a token store from a task of SeqIO's registry, or from a TFDS dataset, and prints JSON lines: first of all
`{"event": "shards", "counts": {"train": 13}, "loss_mask": false}`, then `{"event": "shard", "split": "train", "shard": 3, "of": 13,
"documents": ..., "tokens": ...}`, "progress" in between, and `{"event": "error", "message": ...}`.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from model.child import die_with_parent, emit, emit_error
from model.token_store import StoreError, TokenStoreWriter
from model.vocabularies.vocabulary import Vocabulary
from tasks.seqio_bridge.seqio_names import TENSORFLOW_ENVIRONMENT
from tasks.seqio_bridge.tokenization_spec import TokenizationSpec
from tasks.sources import DataError

if TYPE_CHECKING:
    import seqio

    from tasks.seqio_bridge.seqio_documents import TaskDocuments

_PROGRESS_SECONDS = 2.0


def main(arguments: list[str]) -> int:
    """Tokenizes what the spec file says. Exit status 0 when every shard is written, 1 after an "error" line."""
    die_with_parent()
    os.environ.update(TENSORFLOW_ENVIRONMENT)
    spec = TokenizationSpec.model_validate_json(Path(arguments[0]).read_bytes())
    try:
        tokenize_shards(spec)
    except (DataError, StoreError) as error:
        emit("error", message=str(error), kind="data")
        return 1
    except OSError as error:
        emit_error(error if error.filename else OSError(error.errno, error.strerror or str(error), str(spec.store)))
        return 1
    return 0


def tokenize_shards(spec: TokenizationSpec) -> None:
    """Writes every shard of the spec that is not there yet. Raises DataError, StoreError."""
    from tasks.seqio_bridge.seqio_documents import TaskDocuments

    vocabulary = Vocabulary.open(Path(spec.tokenizer))
    documents = TaskDocuments(_task(spec), vocabulary)
    counts = {split: documents.num_shards(split) for split in documents.splits}
    loss_mask = documents.has_loss_mask
    emit("shards", counts=counts, loss_mask=loss_mask)
    writer = TokenStoreWriter(
        Path(spec.store),
        vocab_size=vocabulary.vocab_size,
        bos_id=vocabulary.bos_id,
        eos_id=vocabulary.eos_id,
        tokenizer_digest=vocabulary.digest,
        loss_mask=loss_mask,
    )
    for split, count in counts.items():
        for shard in range(count):
            _write_shard(writer, documents, split, shard, count, spec)


def _task(spec: TokenizationSpec) -> seqio.Task:
    from tasks.seqio_bridge.seqio_registry import add_tfds_task, registered_task

    if spec.registered is not None:
        return registered_task(spec.registered.task, spec.registered.module)
    assert spec.tfds is not None, "a spec has one of the two"
    return add_tfds_task("tokenize", spec.tfds.name, spec.tfds.reading, spec.tokenizer)


def _write_shard(writer: TokenStoreWriter, documents: TaskDocuments, split: str, shard: int, of: int, spec: TokenizationSpec) -> None:
    key = f"{spec.key}/{split}/{shard}/{of}"
    if writer.committed(split, shard, of, key) is not None:
        return
    told = time.monotonic()
    with writer.shard(split, shard, of, key) as written:
        for document in documents.read(split, shard, of):
            written.add(document.ids, document.source_bytes, document.loss_mask)
            if time.monotonic() - told > _PROGRESS_SECONDS:
                told = time.monotonic()
                emit("progress", split=split, shard=shard, of=of, documents=written.documents, tokens=written.tokens)
        # with a holdout every split reads every document, so what is skipped is counted once
        if split == documents.splits[0] or not (spec.tfds and spec.tfds.reading.holdout):
            written.skipped = dict(getattr(documents.task.source, "skipped", {}))
    emit("shard", split=split, shard=shard, of=of, documents=written.documents, tokens=written.tokens)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
