"""Where SeqIO tasks get text: files and TFDS datasets, read by the rules of a `Reading`. Imports TensorFlow.

Examples are `{"targets": document}`, scalar string tensors. With `reading.answers` a document is the JSON text of a record.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from tasks.mixture_config import PromptCompletion, Reading
from tasks.readers.line_blocks import BadDocument, too_long
from tasks.readers.record_reader import BadRecord, document_extractor
from tasks.readers.text_reader import Skipped, read_documents, split_of
from tasks.seqio_bridge.seqio_names import check_tfds_name
from tasks.shard_tokenizer import splits_of
from tasks.sources import DataError

FEATURE = "targets"


class TextFilesSource(seqio.DataSource):
    """The documents of text files, a shard for every `files_per_shard` of them in a row.

    `failure` holds the DataError that ended the last reading: TensorFlow would only pass its traceback on as text.
    `skipped` counts what the last reading left out.
    """

    def __init__(self, files: Sequence[Path], reading: Reading, files_per_shard: int = 1) -> None:
        self.files = tuple(files)
        self.reading = reading
        self.files_per_shard = files_per_shard
        self.failure: DataError | None = None
        self.skipped = Skipped()
        super().__init__(splits=splits_of(reading))

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """A file is not divided."""
        return False

    def list_shards(self, split: str) -> Sequence[str]:
        """The first file of each shard, in order; each has documents of every split."""
        return [str(path) for path in self.files[:: self.files_per_shard]]

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
        """The documents of a split; with `shuffle` the shards' order is changed, the documents' within one is not.

        Raises ValueError for an unknown split or more shards than there are.
        """
        shards = chosen_shards(self, split, shuffle, seed, shard_info)
        each = self.files_per_shard
        files = [path for shard in shards for path in self.files[shard * each : (shard + 1) * each]]
        return _dataset(functools.partial(self._examples, files, split))

    def _examples(self, files: Sequence[Path], split: str) -> Iterator[dict[str, bytes]]:
        self.failure = None
        self.skipped = Skipped()
        try:
            for path in files:
                for text in read_documents(path, self.reading, self.skipped):
                    if split_of(text, self.reading.holdout) == split:
                        yield {FEATURE: text.encode()}
        except DataError as error:
            self.failure = error
            raise


class TfdsTextSource(seqio.TfdsDataSource):
    """The texts of a TFDS dataset: SeqIO's own TFDS source, with the documents taken out of its examples.

    "train" is the dataset's own split, and "validation" too where it has one. With a holdout both are made of "train", by the
    hash of the text as for files, and a validation split of the dataset is not read. A dataset that is not prepared on this
    machine is downloaded and prepared by TFDS when it is first used. `failure` and `skipped` are as for `TextFilesSource`.
    """

    def __init__(self, tfds_name: str, reading: Reading, data_dir: str | None = None) -> None:
        check_tfds_name(tfds_name, data_dir)
        self.reading = reading
        self.failure: DataError | None = None
        self.skipped = Skipped()
        super().__init__(tfds_name, tfds_data_dir=data_dir, read_only=True)

    @functools.cached_property
    def builder(self) -> tfds.core.DatasetBuilder:
        """The prepared dataset. Raises DataError where there is none, it cannot be prepared, or it lacks the text."""
        name = self.tfds_dataset.name
        try:
            builder = self.tfds_dataset.builder
            if not builder.is_prepared():
                builder.download_and_prepare()
        except Exception as error:  # TFDS, a dataset's own code and the network raise what they like
            message = str(error).strip().splitlines() or [type(error).__name__]
            raise DataError(
                f"tfds://{name} cannot be used ({message[0][:300]}); prepare it with `tfds build`, set TFDS_DATA_DIR to where it is, "
                "or correct the name"
            ) from None
        configs = [str(config.name) for config in builder.BUILDER_CONFIGS]
        if configs and "/" not in str(name):
            raise DataError(
                f"tfds://{name}: the dataset has configurations, {', '.join(configs[:10])}; write tfds://dataset/config:version"
            )
        if "train" not in builder.info.splits:
            raise DataError(f"tfds://{name} has no split 'train', but {', '.join(builder.info.splits)}; name another dataset")
        return builder

    @property
    def splits(self) -> Sequence[str]:
        """The splits there are, by the rules of the class."""
        if self.reading.holdout:
            return splits_of(self.reading)
        return [split for split in ("train", "validation") if split in self.builder.info.splits]

    def num_input_examples(self, split: str) -> int | None:
        """The dataset's own count; None with a holdout, since only the texts tell."""
        return None if self.reading.holdout else self.builder.info.splits[split].num_examples or None

    def list_shards(self, split: str) -> Sequence[str]:  # pyright: ignore[reportIncompatibleVariableOverride]  # SeqIO caches its own
        """The dataset's files of the split."""
        return [instruction.filename for instruction in self.builder.info.splits[self._own(split)].file_instructions]

    def get_dataset(
        self,
        split: str | None = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        *,
        sequence_length: Mapping[str, int] | None = None,
        use_cached: bool = False,
        num_epochs: int | None = 1,
    ) -> tf.data.Dataset:
        """The documents of a split, in the dataset's order. Raises ValueError for an unknown split, DataError as `builder` does."""
        own = "train" if split is None else split
        if own not in self.splits:
            raise ValueError(f"split {own!r} of a text source that has {', '.join(self.splits)}")
        assert self.builder is not None, "prepared before SeqIO reads it"
        raw = super().get_dataset(self._own(own), shuffle, seed, shard_info)
        return _dataset(functools.partial(self._examples, raw, own))

    def _own(self, split: str) -> str:
        return "train" if self.reading.holdout else split

    def _examples(self, raw: tf.data.Dataset, split: str) -> Iterator[dict[str, bytes]]:
        self.failure = None
        self.skipped = Skipped()
        to_document = _document_maker(self.reading)
        for number, example in enumerate(tfds.as_numpy(raw)):
            found = to_document(example, f"tfds://{self.tfds_dataset.name}, example {number} of {split!r}")
            if isinstance(found, BadDocument):
                if self.reading.on_bad_document == "fail":
                    self.failure = DataError(str(found))
                    raise self.failure
                self.skipped[found.reason] += 1
            elif not found or found.isspace():
                self.skipped["empty"] += 1
            elif not self.reading.holdout or split_of(found, self.reading.holdout) == split:
                yield {FEATURE: found.encode()}


def _document_maker(reading: Reading) -> Callable[[Mapping[str, Any], str], str | BadDocument]:
    """A function from an example of TFDS, and its place in words, to its document; "" where there is nothing to learn."""
    extract = document_extractor(reading)
    if reading.answers is None:
        keys = {reading.text_key}
    elif isinstance(reading.answers, PromptCompletion):
        keys = {reading.answers.prompt_key, reading.answers.completion_key}
    else:
        keys = {reading.answers.messages_key}
    roots = {key.split(".")[0] for key in keys}

    def _document(example: Mapping[str, Any], where: str) -> str | BadDocument:
        try:
            text = extract({name: _plain(value) if name in roots else value for name, value in example.items()})
        except BadRecord as bad:
            return bad.at(where)
        size = len(text.encode())
        return too_long(where, size, reading.max_document_bytes) if size > reading.max_document_bytes else text

    return _document


def _plain(value: Any) -> Any:
    """A value of TFDS as JSON would have it. A sequence of objects, which TFDS has by column, becomes a list of objects."""
    if isinstance(value, Mapping):
        columns = {name: _plain(part) for name, part in value.items()}
        lengths = {len(part) if isinstance(part, list) else -1 for part in columns.values()}
        if len(lengths) == 1 and -1 not in lengths:
            return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return columns
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value.to_list() if isinstance(value, tf.compat.v1.ragged.RaggedTensorValue) else value


def chosen_shards(source: seqio.DataSource, split: str, shuffle: bool, seed: int | None, shard_info: seqio.ShardInfo | None) -> list[int]:
    """The numbers of the shards that are asked for, in order or shuffled. Raises ValueError for what the source does not have."""
    if split not in source.splits:
        raise ValueError(f"split {split!r} of a source that has {', '.join(source.splits)}")
    shards = list(range(len(source.list_shards(split))))
    if shard_info is not None:
        if len(shards) < shard_info.num_shards:
            raise ValueError(f"{shard_info.num_shards} shards of a source that has {len(shards)}; none is divided")
        shards = shards[shard_info.index :: shard_info.num_shards]
    if shuffle:
        np.random.default_rng(seed).shuffle(shards)
    return shards


def _dataset(examples: Callable[[], Iterator[dict[str, bytes]]]) -> tf.data.Dataset:
    return tf.data.Dataset.from_generator(examples, output_signature={FEATURE: tf.TensorSpec(shape=(), dtype=tf.string)})
