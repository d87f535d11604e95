"""The process that defines a mixture in SeqIO: `python -m tasks.seqio_bridge.mixture_worker SPEC.json`.

Registers a `seqio.Task` for each dataset and the `seqio.Mixture` with the rates of its start, and compares the first documents that
SeqIO yields of each split with the token store's. Prints `{"event": "rates", "rates": {dataset: share}}`, `{"event": "warning",
"message": ...}` for a task that is random, or `{"event": "error", "message": ...}`.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from model.child import die_with_parent, emit
from model.config_base import Config
from model.token_store import StoreError, TokenStore
from model.vocabularies.vocabulary import Vocabulary
from tasks.data_steps import RegisteredTask, TfdsTask
from tasks.mixture_config import Reading
from tasks.seqio_bridge.seqio_names import TENSORFLOW_ENVIRONMENT
from tasks.sources import DataError

if TYPE_CHECKING:
    import seqio

    from tasks.seqio_bridge.seqio_documents import StoredDocument, TaskDocuments

# Of the first and of the last shard; the first alone could not tell that files have changed their places.
COMPARED_DOCUMENTS = 8


class MixtureComponentSpec(Config):
    """One dataset: where its token store is, and what it was made of.

    That is files and how they are read, or a registered task, or a TFDS dataset; of none of them nothing is compared, and the
    task reads the store itself.
    """

    name: str
    store: str
    files: tuple[str, ...] = ()
    reading: Reading = Reading()
    registered: RegisteredTask | None = None
    tfds: TfdsTask | None = None


class MixtureSpec(Config):
    """A mixture to define; `weights` are shares by dataset name, none for a dataset that is not trained on from the start."""

    name: str
    tokenizer: str
    weights: dict[str, float]
    components: tuple[MixtureComponentSpec, ...]


def main(arguments: list[str]) -> int:
    """Defines the mixture of the spec file. Exit status 0, or 1 after an "error" line."""
    die_with_parent()
    os.environ.update(TENSORFLOW_ENVIRONMENT)
    spec = MixtureSpec.model_validate_json(Path(arguments[0]).read_bytes())
    try:
        emit("rates", rates=define(spec))
    except (DataError, StoreError) as error:
        emit("error", message=str(error))
        return 1
    return 0


def define(spec: MixtureSpec) -> dict[str, float]:
    """Registers the tasks and the mixture; the rates that SeqIO has for it, as shares that add up to 1.

    Raises DataError where a token store does not hold what SeqIO yields.
    """
    from tasks.seqio_bridge.seqio_documents import TaskDocuments
    from tasks.seqio_bridge.seqio_registry import add_mixture

    tokenizer = Vocabulary.open(Path(spec.tokenizer))
    tasks: dict[str, seqio.Task] = {}
    for component in spec.components:
        store = TokenStore.open(component.store)
        task = tasks[component.name] = _task(spec, component, store)
        if component.files or component.registered or component.tfds:
            documents = TaskDocuments(task, tokenizer)
            for split in store.splits:
                _compare(documents, component, store, split)
    # two datasets may be one task, by way of two SeqIO mixtures: SeqIO then has their rates in one
    rates: Counter[str] = Counter()
    for name, weight in spec.weights.items():
        rates[tasks[name].name] += weight  # pyright: ignore[reportArgumentType]  # a counter of shares
    mixture = add_mixture(spec.name, rates)
    shares = {name: float(mixture.get_rate(tasks[name])) * weight / rates[tasks[name].name] for name, weight in spec.weights.items()}
    return {name: share / sum(shares.values()) for name, share in shares.items()}


def _task(spec: MixtureSpec, component: MixtureComponentSpec, store: TokenStore) -> seqio.Task:
    from tasks.seqio_bridge.seqio_registry import add_task, add_tfds_task, registered_task, seqio_name
    from tasks.seqio_bridge.seqio_store import register_store

    name = seqio_name(f"{spec.name}.{component.name}")
    if component.registered is not None:
        return registered_task(component.registered.task, component.registered.module)
    if component.tfds is not None:
        return add_tfds_task(name, component.tfds.name, component.tfds.reading, spec.tokenizer)
    if not component.files:
        return register_store(name, component.store, spec.tokenizer)
    # a shard of the store is a file, or a run of files where there are very many
    each = -(-len(component.files) // max((split.num_shards for split in store.splits.values()), default=1))
    return add_task(name, [Path(path) for path in component.files], component.reading, spec.tokenizer, each)


def _compare(documents: TaskDocuments, component: MixtureComponentSpec, store: TokenStore, split: str) -> None:
    """Raises DataError where the first documents of the first or the last shard are not those of the store."""
    num_shards = store.splits[split].num_shards
    if split in documents.splits and documents.num_shards(split) == num_shards:
        different = [shard for shard in sorted({0, num_shards - 1}) if not _same(documents, store, split, shard)]
    else:
        different = [0]
    if not different:
        return
    if component.registered is not None and not _repeatable(documents, split, different[0], num_shards):
        emit("warning", message=f"SeqIO task {documents.task.name!r} yields other documents each time: its token store cannot be checked")
        return
    remedy = "change its revision" if component.registered is not None else f"run its step again with --force 'tokens/{component.name}'"
    raise DataError(
        f"the token store {component.store}, split {split!r}, shard {different[0]}, does not begin with the documents that SeqIO yields "
        f"for {component.name!r}: {remedy}"
    )


def _same(documents: TaskDocuments, store: TokenStore, split: str, shard: int) -> bool:
    stream = store.splits[split]
    if stream.token_base[shard] == stream.token_base[shard + 1]:
        return True
    ids, offsets, _ = stream.mapped(shard)
    count = min(len(offsets) - 1, COMPARED_DOCUMENTS)
    found = _first(documents, split, shard, stream.num_shards, count)
    stored = [ids[start:end] for start, end in itertools.pairwise(offsets[: count + 1])]
    return len(found) == count and all(np.array_equal(one.ids, other) for one, other in zip(found, stored, strict=True))


def _repeatable(documents: TaskDocuments, split: str, shard: int, num_shards: int) -> bool:
    once, again = (_first(documents, split, shard, num_shards, COMPARED_DOCUMENTS) for _ in range(2))
    return len(once) == len(again) and all(np.array_equal(one.ids, other.ids) for one, other in zip(once, again, strict=True))


def _first(documents: TaskDocuments, split: str, shard: int, num_shards: int, count: int) -> list[StoredDocument]:
    return list(itertools.islice(documents.read(split, shard, num_shards), count))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
