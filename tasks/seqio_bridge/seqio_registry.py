"""Datasets as real SeqIO tasks and mixtures. Imports TensorFlow: only a process that tokenizes or evaluates may import it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from model.config_base import nearest
from model.vocabularies.text_borders import LONG_TEXT
from model.vocabularies.vocabulary import TextTooLong, Vocabulary
from tasks.mixture_config import Chat, Mixture, PromptCompletion, Reading
from tasks.readers.conversation import encode_answers
from tasks.seqio_bridge.seqio_modules import import_module
from tasks.seqio_bridge.seqio_sources import FEATURE, TextFilesSource, TfdsTextSource
from tasks.seqio_bridge.seqio_vocabularies import SentencePieceByContent, TokenizerVocabulary, make_vocabulary
from tasks.sources import DataError

__all__ = [
    "FEATURE",
    "LOSS_MASK",
    "RegisteredNames",
    "TextFilesSource",
    "TfdsTextSource",
    "add_mixture",
    "add_task",
    "add_tfds_task",
    "import_module",
    "prepend_bos",
    "register",
    "registered_task",
    "seqio_name",
]

LOSS_MASK = "loss_mask"


def add_task(
    name: str, files: Sequence[Path], reading: Reading, tokenizer: str | Path | seqio.Vocabulary, files_per_shard: int = 1
) -> seqio.Task:
    """Registers a task over text files: tokenized, with EOS after each document and BOS before it where the tokenizer has one.

    tokenizer: a tokenizer directory, a bare tokenizer file, or a vocabulary. files_per_shard: how many files are one shard.
    With `reading.answers` examples have a feature `loss_mask` beside `targets`, int32 [N]: 1 where the loss counts.
    A task of that name that is there already is replaced.
    """
    return _add(name, TextFilesSource(files, reading, files_per_shard), reading, tokenizer)


def add_tfds_task(
    name: str, tfds_name: str, reading: Reading, tokenizer: str | Path | seqio.Vocabulary, data_dir: str | None = None
) -> seqio.Task:
    """Registers a task over a TFDS dataset, `dataset/config:version`, as `add_task` does over files.

    data_dir: where TFDS keeps its data; unset: TFDS_DATA_DIR, or TFDS's own default. See `TfdsTextSource` for its splits.
    Raises DataError where the version is not pinned.
    """
    return _add(name, TfdsTextSource(tfds_name, reading, data_dir), reading, tokenizer)


def _add(name: str, source: Any, reading: Reading, tokenizer: str | Path | seqio.Vocabulary) -> seqio.Task:
    # SeqIO's protocol promises a number of examples, its own sources may have none: `source` has no type for that
    vocabulary = tokenizer if isinstance(tokenizer, seqio.Vocabulary) else make_vocabulary(tokenizer)
    if reading.answers is None:
        fits = functools.partial(leave_out_too_long, vocabulary=vocabulary, source=source)
        preprocessors = [fits, seqio.preprocessors.tokenize, seqio.CacheDatasetPlaceholder(), *special_id_steps(vocabulary)]
    elif isinstance(tokenizer, seqio.Vocabulary):
        raise ValueError(f"task {name!r}: answers are encoded by a tokenizer, not by a {type(tokenizer).__name__}; give its directory")
    else:
        encode = functools.partial(tokenize_answers, answers=reading.answers, tokenizer=tokenizer, source=source)
        preprocessors = [encode, seqio.CacheDatasetPlaceholder(), trim_loss_mask]
    return replace_task(name, source, preprocessors, vocabulary, add_eos=reading.answers is None)


def opened_vocabulary(vocabulary: seqio.Vocabulary) -> Vocabulary | None:
    """The tokenizer behind a vocabulary that `make_vocabulary` made; None of any other."""
    if isinstance(vocabulary, TokenizerVocabulary):
        return vocabulary.tokenizer
    return Vocabulary.open(vocabulary.sentencepiece_model_file) if isinstance(vocabulary, SentencePieceByContent) else None


def replace_task(name: str, source: Any, preprocessors: Sequence[Any], vocabulary: seqio.Vocabulary, *, add_eos: bool) -> seqio.Task:
    """Registers a task with the one feature `targets`, in the place of one of that name if there is one."""
    if name in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove(name)
    feature = seqio.Feature(vocabulary, add_eos=add_eos, dtype=tf.int32)
    return seqio.TaskRegistry.add(name, source=source, preprocessors=preprocessors, output_features={FEATURE: feature})


def special_id_steps(vocabulary: seqio.Vocabulary) -> list[Any]:
    """The preprocessors that put BOS, where the vocabulary has one, and EOS around documents."""
    return [*([] if vocabulary.bos_id is None else [prepend_bos]), seqio.preprocessors.append_eos]


def leave_out_too_long(
    dataset: tf.data.Dataset, *, vocabulary: seqio.Vocabulary, source: TextFilesSource | TfdsTextSource
) -> tf.data.Dataset:
    """A preprocessor that leaves out, and counts, the texts that the tokenizer cannot encode in bounded memory.

    Where the reading does not skip bad documents the first of them ends it, as a DataError in `source.failure`. A vocabulary that
    is not made here takes every text.
    """
    opened = opened_vocabulary(vocabulary)
    if opened is None or opened.longest_part is None:
        return dataset

    def _fits(document: bytes) -> bool:
        try:
            opened.check_length(document.decode())
        except TextTooLong as error:
            if source.reading.on_bad_document == "fail":
                source.failure = DataError(f"{error}, or set on_bad_document='skip' to leave such documents out and count them")
                raise source.failure from None
            source.skipped.note("too_long", f"a document that begins with {document[:40]!r}")
            return False
        return True

    def _kept(example: dict[str, Any]) -> tf.Tensor:
        text = example[FEATURE]
        return tf.strings.length(text) <= LONG_TEXT or tf.ensure_shape(tf.numpy_function(_fits, [text], tf.bool), [])

    return dataset.filter(_kept)


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


def tokenize_answers(
    dataset: tf.data.Dataset, *, answers: PromptCompletion | Chat, tokenizer: str | Path, source: TextFilesSource | TfdsTextSource
) -> tf.data.Dataset:
    """A preprocessor: records as JSON text become `targets`, with BOS and EOS, and `loss_mask`, both int32 [N].

    The DataError of a record that cannot be rendered is left in `source.failure`.
    """
    opened: list[Vocabulary] = []

    def _encode(document: bytes) -> tuple[np.ndarray, np.ndarray]:
        if not opened:
            opened.append(Vocabulary.open(Path(tokenizer)))
        try:
            ids, mask = encode_answers(document.decode(), answers, opened[0])
        except TextTooLong as error:
            source.failure = DataError(f"a conversation cannot be encoded: {error}")
            raise source.failure from None
        except DataError as error:
            source.failure = error
            raise
        return ids.astype(np.int32), mask.astype(np.int32)

    def _tokenized(example: dict[str, Any]) -> dict[str, Any]:
        ids, mask = tf.numpy_function(_encode, [example[FEATURE]], [tf.int32, tf.int32], stateful=False)
        ids.set_shape([None])
        mask.set_shape([None])
        return {**example, f"{FEATURE}_pretokenized": example[FEATURE], FEATURE: ids, LOSS_MASK: mask}

    return dataset.map(_tokenized, num_parallel_calls=tf.data.AUTOTUNE)


def trim_loss_mask(dataset: tf.data.Dataset, sequence_length: Mapping[str, int] | None) -> tf.data.Dataset:
    """A preprocessor: `loss_mask` is cut as SeqIO cuts `targets`. SeqIO itself cuts only what goes into the model."""
    length = (sequence_length or {}).get(FEATURE)
    return dataset if length is None else dataset.map(lambda example: {**example, LOSS_MASK: example[LOSS_MASK][:length]})


@dataclass(frozen=True)
class RegisteredNames:
    """What a mixture is called in SeqIO's registries: itself, and its tasks (or the mixtures in it) by dataset name."""

    mixture: str
    tasks: Mapping[str, str]


def register(mixture: Mixture, raw_dirs: Mapping[str, Path], tokenizer_path: str | Path) -> RegisteredNames:
    """Registers a mixture's datasets as `seqio.Task`s and the mixture, with the rates of its start, as a `seqio.Mixture`.

    raw_dirs: for each dataset of files the directory that holds them, all the files below it.
    tokenizer_path: a tokenizer directory, or a bare tokenizer file.
    The names are `{mixture}.{dataset}` and `{mixture}`, with `-` as `_`, since SeqIO allows no dash; tasks and mixtures that are in
    the registry already keep theirs. Raises DataError where two names become the same, or a directory holds no file.
    """
    vocabulary = make_vocabulary(tokenizer_path)
    tasks: dict[str, str] = {}
    for dataset in mixture.datasets:
        if dataset.seqio_task is not None:
            tasks[dataset.name] = registered_task(dataset.seqio_task, dataset.seqio_module).name
            continue
        if dataset.seqio_mixture is not None:
            tasks[dataset.name] = registered_mixture(dataset.seqio_mixture, dataset.seqio_module).name
            continue
        name = seqio_name(f"{mixture.name}.{dataset.name}")
        if name in tasks.values():
            raise DataError(f"dataset {dataset.name!r}: SeqIO allows no '-', and {name!r} is another dataset's name already; rename one")
        tokenizer = vocabulary if dataset.answers is None else tokenizer_path
        if dataset.tfds is not None:
            add_tfds_task(name, dataset.tfds, dataset.reading, tokenizer)
        else:
            add_task(name, _files_below(dataset.name, Path(raw_dirs[dataset.name])), dataset.reading, tokenizer)
        tasks[dataset.name] = name
    own = add_mixture(mixture.name, {tasks[name]: weight for name, weight in mixture.weights.items() if weight})
    return RegisteredNames(own.name, tasks)


def _files_below(dataset: str, directory: Path) -> list[Path]:
    files = sorted((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.relative_to(directory).as_posix())
    if not files:
        raise DataError(f"dataset {dataset!r}: {directory} holds no file; give the directory of its downloaded files")
    return files


def add_mixture(name: str, rates: Mapping[str, float]) -> seqio.Mixture:
    """Registers a mixture of registered tasks with their rates. One of that name that is there already is replaced.

    Raises DataError where SeqIO cannot mix the tasks, because they have different features.
    """
    own = seqio_name(name)
    if own in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.remove(own)
    features = {task: sorted(seqio.get_mixture_or_task(task).output_features) for task in rates}
    if len({tuple(names) for names in features.values()}) > 1:
        raise DataError(f"mixture {name!r}: SeqIO only mixes tasks with the same features, these have {features}; join them to {FEATURE!r}")
    return seqio.MixtureRegistry.add(own, list(rates.items()))


def registered_task(name: str, module: str | None) -> seqio.Task:
    """A task of SeqIO's registry, after importing `module`. Raises DataError where it is not there or has no training text."""
    import_module(module)
    if name in seqio.MixtureRegistry.names():
        raise DataError(f"seqio_task={name!r} is a mixture; set seqio_mixture={name!r} instead")
    known = sorted(seqio.TaskRegistry.names())
    if name not in known:
        raise DataError(_unknown("seqio_task", name, known))
    task = seqio.TaskRegistry.get(name)
    if FEATURE not in task.output_features:
        raise DataError(
            f"seqio_task={name!r} has no feature {FEATURE!r}, but {', '.join(task.output_features)}; only {FEATURE!r} is trained on"
        )
    if "train" not in task.splits:
        raise DataError(f"seqio_task={name!r} has no split 'train', but {', '.join(task.splits)}")
    return task


def registered_mixture(name: str, module: str | None) -> seqio.Mixture:
    """A mixture of SeqIO's registry, after importing `module`. Raises DataError where it is not there."""
    import_module(module)
    known = sorted(seqio.MixtureRegistry.names())
    if name not in known:
        if name in seqio.TaskRegistry.names():
            raise DataError(f"seqio_mixture={name!r} is a task, no mixture; set seqio_task={name!r} instead")
        raise DataError(_unknown("seqio_mixture", name, known))
    return seqio.MixtureRegistry.get(name)


def _unknown(field: str, name: str, known: list[str]) -> str:
    some = ", ".join(known[:10]) or "none"
    return (
        f"{field}={name!r} is not in SeqIO's registry{nearest(name, known)}, which has {some}; set seqio_module to the module that adds it"
    )


def seqio_name(name: str) -> str:
    """`name` as SeqIO allows it: without dashes."""
    return name.replace("-", "_")
