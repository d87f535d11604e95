"""Datasets as real SeqIO tasks and mixtures. Imports TensorFlow: only a process that tokenizes or evaluates may import it."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from tasks.datasets import Mixture, Reading
from tasks.sources import DataError, find_files
from tasks.text_reader import read_documents, split_of

FEATURE = "targets"


class TextFilesSource(seqio.DataSource):
    """The documents of text files, a shard for each file, as examples `{"targets": text}` (scalar string tensors).

    `failure` holds the DataError that ended the last reading: TensorFlow would only pass its traceback on as text.
    `skipped` counts what the last reading left out.
    """

    def __init__(self, files: Sequence[Path], reading: Reading) -> None:
        self.files = tuple(files)
        self.reading = reading
        self.failure: DataError | None = None
        self.skipped: Counter[str] = Counter()
        super().__init__(splits=("train", "validation") if reading.holdout else ("train",))

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """A file is not divided."""
        return False

    def list_shards(self, split: str) -> Sequence[str]:
        """The files, in order; each has documents of every split."""
        return [str(path) for path in self.files]

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        *,
        sequence_length: Mapping[str, int] | None = None,
        use_cached: bool = False,
        num_epochs: int | None = 1,
    ) -> tf.data.Dataset:
        """The documents of a split; with `shuffle` the files' order is changed, the documents' within a file is not.

        Raises ValueError for an unknown split or more shards than files.
        """
        if split not in self.splits:
            raise ValueError(f"split {split!r} of a text source that has {', '.join(self.splits)}")
        files = list(self.files)
        if shard_info is not None:
            if len(files) < shard_info.num_shards:
                raise ValueError(f"{shard_info.num_shards} shards of {len(files)} files; a file is not divided")
            files = files[shard_info.index :: shard_info.num_shards]
        if shuffle:
            np.random.default_rng(seed).shuffle(files)
        return tf.data.Dataset.from_generator(
            functools.partial(self._examples, files, split), output_signature={FEATURE: tf.TensorSpec(shape=(), dtype=tf.string)}
        )

    def _examples(self, files: Sequence[Path], split: str) -> Iterator[dict[str, bytes]]:
        self.failure = None
        self.skipped = Counter()
        try:
            for path in files:
                for text in read_documents(path, self.reading, self.skipped):
                    if split_of(text, self.reading.holdout) == split:
                        yield {FEATURE: text.encode()}
        except DataError as error:
            self.failure = error
            raise


def prepend_bos(dataset: tf.data.Dataset, output_features: Mapping[str, Any]) -> tf.data.Dataset:
    """A preprocessor that puts the vocabulary's BOS id before each tokenized feature."""

    def _with_bos(example: dict[str, Any]) -> dict[str, Any]:
        begun = {
            key: tf.concat([tf.constant([feature.vocabulary.bos_id], example[key].dtype), example[key]], axis=0)
            for key, feature in output_features.items()
            if key in example
        }
        return {**example, **begun}

    return dataset.map(_with_bos, num_parallel_calls=tf.data.AUTOTUNE)


def add_task(name: str, files: Sequence[Path], reading: Reading, tokenizer: str | Path) -> seqio.Task:
    """Registers a task over text files: tokenized by SentencePiece, BOS before and EOS after each document.

    A task of that name that is there already is replaced.
    """
    feature = seqio.Feature(seqio.SentencePieceVocabulary(str(tokenizer)), add_eos=True, dtype=tf.int32)
    if name in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove(name)
    # SeqIO's protocol promises a number of examples, its own sources may have none
    source: Any = TextFilesSource(files, reading)
    return seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[seqio.preprocessors.tokenize, seqio.CacheDatasetPlaceholder(), prepend_bos, seqio.preprocessors.append_eos],
        output_features={FEATURE: feature},
    )


@dataclass(frozen=True)
class RegisteredNames:
    """What a mixture is called in SeqIO's registries: itself, and its tasks by dataset name."""

    mixture: str
    tasks: Mapping[str, str]


def register(mixture: Mixture, raw_dirs: Mapping[str, Path], tokenizer_path: str | Path) -> RegisteredNames:
    """Registers a mixture's datasets as `seqio.Task`s and the mixture, with its rates, as a `seqio.Mixture`.

    raw_dirs: for each dataset of files the directory that holds them, all the files below it.
    The names are `{mixture}.{dataset}` and `{mixture}`, with `-` as `_`, since SeqIO allows no dash.
    Raises DataError where two names become the same, or a directory holds no file.
    """
    tasks: dict[str, str] = {}
    for dataset in mixture.datasets:
        if dataset.seqio_task is not None:
            tasks[dataset.name] = registered_task(dataset.seqio_task, dataset.seqio_module).name
            continue
        name = seqio_name(f"{mixture.name}.{dataset.name}")
        if name in tasks.values():
            raise DataError(f"dataset {dataset.name!r}: SeqIO allows no '-', and {name!r} is another dataset's name already; rename one")
        files = find_files(dataset.name, [str(Path(raw_dirs[dataset.name]) / "**" / "*")])
        add_task(name, list(files.values()), dataset.reading, tokenizer_path)
        tasks[dataset.name] = name
    own = add_mixture(mixture.name, {tasks[name]: weight for name, weight in mixture.weights.items() if weight})
    return RegisteredNames(own.name, tasks)


def add_mixture(name: str, rates: Mapping[str, float]) -> seqio.Mixture:
    """Registers a mixture of registered tasks with their rates. One of that name that is there already is replaced."""
    own = seqio_name(name)
    if own in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.remove(own)
    return seqio.MixtureRegistry.add(own, list(rates.items()))


def registered_task(name: str, module: str | None) -> seqio.Task:
    """A task of SeqIO's registry, after importing `module`. Raises DataError where it is not there or has no training text."""
    if module is not None:
        try:
            __import__(module)
        except ImportError as error:
            raise DataError(f"seqio_module={module!r} cannot be imported ({error}); install it or correct the name") from None
    if name in seqio.MixtureRegistry.names():
        raise DataError(f"seqio_task={name!r} is a mixture; name its tasks as datasets and give their rates in mixture.weights")
    if name not in seqio.TaskRegistry.names():
        some = ", ".join(sorted(seqio.TaskRegistry.names())[:10]) or "none"
        raise DataError(f"seqio_task={name!r} is not in SeqIO's registry, which has {some}; set seqio_module to the module that adds it")
    task = seqio.TaskRegistry.get(name)
    if FEATURE not in task.output_features:
        raise DataError(
            f"seqio_task={name!r} has no feature {FEATURE!r}, but {', '.join(task.output_features)}; only {FEATURE!r} is trained on"
        )
    if "train" not in task.splits:
        raise DataError(f"seqio_task={name!r} has no split 'train', but {', '.join(task.splits)}")
    return task


def seqio_name(name: str) -> str:
    """`name` as SeqIO allows it: without dashes."""
    return name.replace("-", "_")
