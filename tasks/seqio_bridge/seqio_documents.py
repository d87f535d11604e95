"""The documents of a SeqIO task as a token store holds them. Imports TensorFlow: only a process that tokenizes may import it.

A task may put BOS and EOS around its documents or not; in the store they stand there exactly once, as ids. A task with the
feature `inputs` beside `targets` becomes documents of both, in that order, with the loss on the targets only. One whose
examples have `loss_mask`, int [N] as long as `targets`, has said itself where BOS, EOS and the loss are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from model.vocabularies.vocabulary import Vocabulary
from tasks.seqio_bridge.seqio_registry import FEATURE, LOSS_MASK
from tasks.seqio_bridge.seqio_vocabularies import TokenizerVocabulary
from tasks.sources import DataError

_INPUTS = "inputs"


@dataclass(frozen=True)
class StoredDocument:
    """ids int64 [N] with BOS and EOS, bool [N] where the loss counts or None, and the UTF-8 bytes of the text."""

    ids: np.ndarray
    loss_mask: np.ndarray | None
    source_bytes: int


class TaskDocuments:
    """Reads a task whose vocabulary is the given tokenizer.

    Raises DataError where it is another one, or one of which that cannot be known.
    """

    def __init__(self, task: seqio.Task, tokenizer: Vocabulary) -> None:
        self.task = task
        self.tokenizer = tokenizer
        self._features = [name for name in (_INPUTS, FEATURE) if name in task.output_features]
        for name in self._features:
            check_vocabulary(task, name, tokenizer)

    @property
    def splits(self) -> list[str]:
        """Which of "train" and "validation" there are."""
        return [split for split in ("train", "validation") if split in self.task.splits]

    @property
    def has_loss_mask(self) -> bool:
        """Whether the documents have a loss mask."""
        if _INPUTS in self._features:
            return True
        specification = self.task.get_dataset(None, split=self.splits[0], shuffle=False, try_in_mem_cache=False).element_spec
        return LOSS_MASK in specification

    def num_shards(self, split: str) -> int:
        """The shards of the task's own source; a source that has none is one."""
        return max(len(self.task.source.list_shards(split)), 1)

    def read(self, split: str, shard: int, num_shards: int) -> Iterator[StoredDocument]:
        """The documents of one shard, whole and in order; random steps of the task have the shard's number as their seed.

        Raises DataError: the source's own where it has one, else one that says what TensorFlow said.
        """
        shard_info = seqio.ShardInfo(index=shard, num_shards=num_shards)
        try:
            dataset = self.task.get_dataset(
                None, split=split, shuffle=False, seed=shard, shard_info=shard_info, num_epochs=1, try_in_mem_cache=False
            )
            for number, example in enumerate(dataset.as_numpy_iterator()):
                yield self._document(example, f"document {number} of {split} shard {shard}")
        except tf.errors.OpError as error:
            failure = getattr(self.task.source, "failure", None)
            if isinstance(failure, DataError):
                raise failure from None
            raise DataError(f"SeqIO task {self.task.name!r}, split {split!r}, shard {shard}: {error.message[:500]}") from None

    def _document(self, example: dict[str, Any], where: str) -> StoredDocument:
        if LOSS_MASK in example:
            ids, mask = example[FEATURE].astype(np.int64), example[LOSS_MASK] != 0
            if ids.shape != mask.shape or not len(ids):
                raise DataError(
                    f"{where}: {LOSS_MASK!r} has shape {mask.shape}, {FEATURE!r} {ids.shape}; it needs one value an id, and some"
                )
            return StoredDocument(ids, mask, self._source_bytes(example))
        parts = [self._text_ids(example[name], name) for name in self._features if name in example]
        before = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        ids = np.concatenate([before, *parts, [self.tokenizer.eos_id]]).astype(np.int64)
        self._check_special_ids(ids, where)
        mask = None
        if _INPUTS in self._features:
            mask = np.zeros(len(ids), bool)
            mask[len(ids) - len(parts[-1]) - 1 :] = True
        return StoredDocument(ids, mask, self._source_bytes(example))

    def _text_ids(self, ids: np.ndarray, feature: str) -> np.ndarray:
        """The ids without the BOS and EOS that the task put around them, by its own vocabulary's ids."""
        vocabulary: Any = self.task.output_features[feature].vocabulary
        start, stop = 0, len(ids)
        if stop and vocabulary.bos_id is not None and ids[0] == vocabulary.bos_id:
            start = 1
        if stop > start and ids[-1] == vocabulary.eos_id:
            stop -= 1
        return ids[start:stop]

    def _check_special_ids(self, ids: np.ndarray, where: str) -> None:
        inside = ids[(0 if self.tokenizer.bos_id is None else 1) : -1]
        for name, value in (("BOS", self.tokenizer.bos_id), ("EOS", self.tokenizer.eos_id)):
            if value is not None and (inside == value).any():
                raise DataError(
                    f"{where} is {ids[:4].tolist()} ... {ids[-4:].tolist()}, with {name} (id {value}) inside it; BOS belongs first and "
                    "EOS last, each once, and the tokenizer must not make them from text"
                )

    def _source_bytes(self, example: dict[str, Any]) -> int:
        size = 0
        for name in self._features:
            text = example.get(f"{name}_pretokenized")
            if isinstance(text, bytes):
                size += len(text)
            elif name in example:
                size += len(self.tokenizer.decode(self._text_ids(example[name], name).astype(np.uint32)).encode())
        return size


def check_vocabulary(task: seqio.Task, feature: str, tokenizer: Vocabulary) -> None:
    """Raises DataError unless the vocabulary of a task's feature gives text the same ids as the tokenizer.

    SentencePiece models are known by their file's content, our own vocabularies by their digest. SeqIO's ByteVocabulary has the
    ids of our bytes, and other ids for what stands around them: EOS is its 1 and our 2, and it has no BOS; those are put there as ours.
    """
    vocabulary: Any = task.output_features[feature].vocabulary
    said = f"SeqIO task {task.name!r}, feature {feature!r}"
    if isinstance(vocabulary, TokenizerVocabulary):
        same = vocabulary.digest == tokenizer.digest
    elif isinstance(vocabulary, seqio.SentencePieceVocabulary):
        if vocabulary.extra_ids or _option(vocabulary, "normalizer_spec_overrides") or _option(vocabulary, "use_fast_tokenizer"):
            raise DataError(
                f"{said} has a SentencePieceVocabulary with extra_ids, normalizer_spec_overrides or use_fast_tokenizer, which changes "
                "the ids of its model; define it without them"
            )
        with tf.io.gfile.GFile(vocabulary.sentencepiece_model_file, "rb") as file:
            same = hashlib.sha256(file.read()).hexdigest() == tokenizer.record.file_sha256
    elif isinstance(vocabulary, seqio.ByteVocabulary):
        same = tokenizer.kind == "bytes" and not vocabulary.extra_ids
    else:
        raise DataError(
            f"{said} has a {type(vocabulary).__name__}, of which nobody can tell whose ids it gives; use a SentencePieceVocabulary, a "
            "ByteVocabulary, or tasks.seqio_bridge.seqio_vocabularies.make_vocabulary(tokenizer)"
        )
    if not same:
        raise DataError(
            f"{said} has the vocabulary {vocabulary}, the mixture's tokenizer is {tokenizer.kind} {tokenizer.digest[:16]} with "
            f"{tokenizer.vocab_size} ids; set mixture.tokenizer to the task's own model file"
        )


def _option(vocabulary: Any, name: str) -> Any:
    """What SeqIO keeps to itself of how a vocabulary was made."""
    return getattr(vocabulary, f"_{name}", None)
