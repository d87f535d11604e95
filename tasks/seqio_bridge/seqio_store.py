"""Token stores as SeqIO reads them. Imports TensorFlow: only a process that evaluates, or uses SeqIO otherwise, may import it.

    register_store("web", "artifacts/tokens/web-0123456789abcdef")
    seqio.get_dataset("web", {"targets": 2048}, seqio.LMFeatureConverter(pack=True), shuffle=True)

Mind what `tasks.seqio_bridge.seqio_vocabularies` says of id 0 and packing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from model.token_store import StoreError, TokenStore, artifact_path, read_committed
from model.token_writer import shard_directory
from model.vocabularies.vocabulary import Vocabulary
from tasks.seqio_bridge.seqio_cache import document_blocks
from tasks.seqio_bridge.seqio_registry import FEATURE, LOSS_MASK, replace_task, special_id_steps, trim_loss_mask
from tasks.seqio_bridge.seqio_sources import chosen_shards
from tasks.seqio_bridge.seqio_vocabularies import make_vocabulary


class TokenStoreSource(seqio.DataSource):
    """The documents of a committed token store as examples `{"targets": int32 [N]}`, in the store's shards.

    BOS and EOS are taken off, as SeqIO's tasks put them on themselves, unless `special_ids` is set. Documents of a store with a loss
    mask always keep theirs, and have the feature `loss_mask`, int32 [N] of 0 and 1.
    """

    def __init__(self, store: TokenStore, *, special_ids: bool = False) -> None:
        self.store = store
        self.special_ids = special_ids
        counts = {name: split.num_documents for name, split in store.splits.items()}
        super().__init__(splits=tuple(counts), num_input_examples=counts)

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """A shard is not divided."""
        return False

    def list_shards(self, split: str) -> Sequence[str]:
        """The directories of the shards."""
        count = self.store.splits[split].num_shards
        return [str(shard_directory(self.store.path, split, shard, count)) for shard in range(count)]

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
        flat = tf.TensorSpec([None], tf.int32)
        signature = {"lengths": tf.TensorSpec([None], tf.int64), FEATURE: flat} | ({LOSS_MASK: flat} if self.store.loss_mask else {})
        blocks: Any = tf.data.Dataset.from_generator(functools.partial(self._blocks, split, shards), output_signature=signature)
        return blocks.flat_map(_documents).map(_ensure_rank)

    def _blocks(self, split: str, shards: Sequence[int]) -> Iterator[dict[str, np.ndarray]]:
        for shard in shards:
            for block in document_blocks(self.store, split, shard, special_ids=self.special_ids):
                value = {"lengths": block.lengths, FEATURE: block.ids.astype(np.int32)}
                yield value if block.loss_mask is None else {**value, LOSS_MASK: block.loss_mask.astype(np.int32)}


def _documents(block: dict[str, Any]) -> tf.data.Dataset:
    ragged: Any = tf.RaggedTensor
    rows: Any = {key: ragged.from_row_lengths(flat, block["lengths"]) for key, flat in block.items() if key != "lengths"}
    return tf.data.Dataset.from_tensor_slices(rows)


def _ensure_rank(example: dict[str, Any]) -> dict[str, Any]:
    return {key: tf.ensure_shape(value, [None]) for key, value in example.items()}


def register_store(name: str, path: Any, tokenizer: str | Path | None = None) -> seqio.Task:
    """Registers a token store as a task, which SeqIO can mix, pack, and read from the cache that `export_cache` writes for it.

    path: a token store's artifact or its directory. tokenizer: its tokenizer directory; unset: the artifact it was made with,
    which lies beside it in the same root. A task of that name that is there already is replaced.
    Raises StoreError where the store is not committed or damaged, or the tokenizer is not there or another one.
    """
    store = TokenStore.open(path)
    place = _tokenizer_of(store) if tokenizer is None else Path(tokenizer)
    if Vocabulary.open(place).digest != store.tokenizer_digest:
        raise StoreError(
            f"{store.path} was made with another tokenizer than {place}; give the one with the digest {store.tokenizer_digest}"
        )
    vocabulary = make_vocabulary(place)
    steps = [trim_loss_mask] if store.loss_mask else special_id_steps(vocabulary)
    preprocessors = [seqio.CacheDatasetPlaceholder(), *steps]
    return replace_task(name, TokenStoreSource(store), preprocessors, vocabulary, add_eos=not store.loss_mask)


def _tokenizer_of(store: TokenStore) -> Path:
    """The tokenizer artifact among the inputs of the store, in `{root}/tokenizers`."""
    fingerprints = read_committed(artifact_path(store.path)).get("upstream", [])
    root = store.path.resolve().parent.parent
    for fingerprint in fingerprints:
        for directory in sorted((root / "tokenizers").glob(f"*-{fingerprint[:16]}")):
            if read_committed(directory)["fingerprint"] == fingerprint:
                return directory
    raise StoreError(f"{store.path}: the tokenizer it was made with is not in {root / 'tokenizers'}; give its directory as tokenizer=")
