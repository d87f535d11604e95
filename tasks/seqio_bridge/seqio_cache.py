"""Writes a token store as a SeqIO offline cache, which `use_cached=True` reads; plain numpy, no TensorFlow, no Beam.

    python -m tasks.seqio_bridge.seqio_cache STORE CACHE_ROOT TASK_NAME

Below `CACHE_ROOT/<task name, ':' as '/'>/`, as seqio 0.0.20 lays it out:

    train.tfrecord-00003-of-00013   TFRecords of tf.train.Example, a document each, one file for each shard of the store
    info.train.json                 number of files, and the features' shapes and dtypes
    stats.train.json                examples, targets_tokens, targets_max_tokens (neither EOS nor id 0 is counted)
    token-store.json                which store this is a cache of; SeqIO does not look at it
    COMPLETED                       written last; SeqIO asks for nothing but that it is there

Documents are as they are before the steps that SeqIO takes when it reads a cache: without BOS and EOS, which the task's
`prepend_bos` and `append_eos` put around them. Those of a store with a loss mask keep theirs, since the mask covers them, and
have the feature `loss_mask` too. SeqIO packs id 0 away as padding: see `tasks.seqio_bridge.seqio_vocabularies`.
"""

from __future__ import annotations

import argparse
import json
import re
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import numpy as np

from model.durable import durable_file, remove_temporaries, sync_directory, write_durably, write_json
from model.token_store import StoreError, TokenStore

# The version whose layout this is; SeqIO compares it with those that changed the layout.
SEQIO_VERSION = "0.0.20"
MARKER = "token-store.json"
_COMPLETED = "COMPLETED"
_LAYOUT = 1
_TASK_NAME = re.compile(r"[\w.:#]+")
_BLOCK_TOKENS = 1 << 20


@dataclass(frozen=True)
class DocumentBlock:
    """Some documents in a row: ids [total] in the store's dtype, their lengths int64 [N], and bool [total] where there is a loss mask."""

    ids: np.ndarray
    lengths: np.ndarray
    loss_mask: np.ndarray | None


def document_blocks(store: TokenStore, split: str, shard: int, *, special_ids: bool = False) -> Iterator[DocumentBlock]:
    """The documents of one shard in blocks of about a million tokens.

    BOS and EOS are taken off, unless `special_ids` is set or there is a loss mask, which covers them.
    Raises StoreError where a document does not begin and end with them.
    """
    stream = store.splits[split]
    if stream.token_base[shard] == stream.token_base[shard + 1]:
        return  # an empty file cannot be mapped
    ids, offsets, mask = stream.mapped(shard)
    first = 0
    while first < len(offsets) - 1:
        last = max(first + 1, int(offsets.searchsorted(offsets[first] + _BLOCK_TOKENS, side="right")) - 1)
        here = slice(int(offsets[first]), int(offsets[last]))
        lengths = np.diff(offsets[first : last + 1])
        if special_ids or mask is not None:
            yield DocumentBlock(ids[here], lengths, None if mask is None else mask[here] != 0)
        else:
            yield _without_special_ids(store, ids[here], lengths, f"{store.path} split {split!r} shard {shard}, after document {first}")
        first = last


def _without_special_ids(store: TokenStore, ids: np.ndarray, lengths: np.ndarray, where: str) -> DocumentBlock:
    ends = np.cumsum(lengths)
    own = np.ones(len(ids), bool)
    own[ends - 1] = False
    there = bool((ids[ends - 1] == store.eos_id).all())
    if store.bos_id is not None:
        own[ends - lengths] = False
        there = there and bool((ids[ends - lengths] == store.bos_id).all() and lengths.min() >= 2)
    if not there:
        raise StoreError(f"{where}: a document is not between BOS and EOS (ids {store.bos_id} and {store.eos_id}); tokenize it again")
    return DocumentBlock(ids[own], lengths - (1 if store.bos_id is None else 2), None)


def export_cache(store_path: str | Path, cache_root: str | Path, task_name: str) -> Path:
    """Writes the SeqIO cache of a committed token store for the task `task_name`; the directory it is in.

    A killed export goes on where it stopped, and a finished one of the same store is left alone. Each file takes its name when
    it is whole and on disk. What an unfinished or older export of another store left there is removed first.
    Raises ValueError for a name that SeqIO would not allow; StoreError where the store is not committed or is damaged, or
    the directory holds a finished cache that was not written here; OSError where the disk is full or closed.
    """
    if not _TASK_NAME.fullmatch(task_name) or not all(part.strip(".") for part in task_name.split(":")):
        raise ValueError(f"task_name={task_name!r}: SeqIO takes letters, digits, '_', '.', '#' and ':', the last between directories")
    store = TokenStore.open(store_path)
    directory = Path(cache_root).joinpath(*task_name.split(":"))
    directory.mkdir(parents=True, exist_ok=True)
    marker = {"layout": _LAYOUT, "fingerprint": store.fingerprint, "task": task_name}
    found = _read_marker(directory)
    if found == marker and (directory / _COMPLETED).exists():
        return directory
    if found is None and (directory / _COMPLETED).exists():
        raise StoreError(
            f"{directory} holds a finished SeqIO cache that was not exported from a token store; remove it or choose another root"
        )
    remove_temporaries(directory)
    if found != marker:
        _clear(directory)
        write_json(directory / MARKER, marker)
    for split in store.splits:
        _write_split(store, split, directory)
    write_durably(directory / _COMPLETED, b"")
    return directory


def _read_marker(directory: Path) -> object:
    try:
        return json.loads((directory / MARKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _clear(directory: Path) -> None:
    """Removes another cache's files, the one that makes it valid first: SeqIO also reads files of another number of shards."""
    (directory / _COMPLETED).unlink(missing_ok=True)
    sync_directory(directory)
    (directory / MARKER).unlink(missing_ok=True)
    for pattern in ("*.tfrecord-*-of-*", "info.*.json", "stats.*.json"):
        for path in directory.glob(pattern):
            path.unlink()
    sync_directory(directory)


@dataclass
class _Counts:
    """What SeqIO's own statistics of a cache say."""

    examples: int = 0
    tokens: int = 0
    max_tokens: int = 0

    def add(self, block: DocumentBlock, eos_id: int) -> None:
        """Counts the tokens of a block as SeqIO does: neither EOS nor id 0."""
        counted = np.concatenate([[0], np.cumsum((block.ids != eos_id) & (block.ids != 0))])
        ends = np.cumsum(block.lengths)
        each = counted[ends] - counted[ends - block.lengths]
        self.examples += len(each)
        self.tokens += int(each.sum())
        self.max_tokens = max(self.max_tokens, int(each.max(initial=0)))


def _write_split(store: TokenStore, split: str, directory: Path) -> None:
    """The record files of a split that are not there yet, then its info and statistics."""
    num_shards = store.splits[split].num_shards
    counts = _Counts()
    for shard in range(num_shards):
        path = directory / f"{split}.tfrecord-{shard:05d}-of-{num_shards:05d}"
        blocks = document_blocks(store, split, shard)
        if path.exists():
            for block in blocks:
                counts.add(block, store.eos_id)
            continue
        with durable_file(path) as file:
            for block in blocks:
                counts.add(block, store.eos_id)
                for example in examples(block):
                    write_record(file, example)
    feature = {"shape": [None], "dtype": "int32"}
    features = {"targets": feature, "loss_mask": feature} if store.loss_mask else {"targets": feature}
    write_json(directory / f"info.{split}.json", {"num_shards": num_shards, "features": features, "seqio_version": SEQIO_VERSION})
    stats = {"examples": counts.examples, "targets_tokens": counts.tokens, "targets_max_tokens": counts.max_tokens}
    write_json(directory / f"stats.{split}.json", stats)


def examples(block: DocumentBlock) -> Iterator[bytes]:
    """Each document as the bytes of a `tf.train.Example` with int64 lists, features in the order of their names.

    The wire format of protocol buffers (https://protobuf.dev/programming-guides/encoding/): a list of integers is packed
    varints, and one without elements has no bytes.
    """
    packed, widths = varints(block.ids)
    ends = np.cumsum(block.lengths)
    byte_ends = np.concatenate([[0], np.cumsum(widths)])
    flags = None if block.loss_mask is None else block.loss_mask.astype(np.uint8).tobytes()  # 0 and 1 are varints of one byte
    for start, end in zip((ends - block.lengths).tolist(), ends.tolist(), strict=True):
        features = b"" if flags is None else _feature(b"loss_mask", flags[start:end])
        features += _feature(b"targets", packed[byte_ends[start] : byte_ends[end]])
        yield _field(1, features)


def _feature(name: bytes, packed: bytes) -> bytes:
    """An entry of the map `Features.feature`: its key, and its value with `int64_list` (field 3)."""
    int64_list = _field(1, packed) if packed else b""
    return _field(1, _field(1, name) + _field(2, _field(3, int64_list)))


def _field(number: int, data: bytes) -> bytes:
    """A length-delimited field: its number, the length as a varint, the data."""
    head = bytearray([number << 3 | 2])
    length = len(data)
    while length > 127:
        head.append(length & 127 | 128)
        length >>= 7
    head.append(length)
    return bytes(head) + data


def varints(values: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Values [N] in [0, 2**35) as base-128 varints: all their bytes, low groups of 7 bits first, and the width of each, int64 [N]."""
    remaining = values.astype(np.uint64)
    widths = np.ones(len(values), np.int64)
    for bits in (7, 14, 21, 28):
        widths += remaining >= 1 << bits
    starts = np.cumsum(widths) - widths
    result = np.empty(int(widths.sum()), np.uint8)
    for group in range(int(widths.max(initial=0))):
        here = widths > group
        more = np.where(widths[here] > group + 1, 128, 0)
        result[starts[here] + group] = (remaining[here] >> np.uint64(7 * group) & np.uint64(127)).astype(np.uint8) | more.astype(np.uint8)
    return result.tobytes(), widths


def write_record(file: BinaryIO, data: bytes) -> None:
    """One TFRecord: length (uint64), its checksum, the data, its checksum; all little-endian."""
    length = struct.pack("<Q", len(data))
    file.write(length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data)))


def masked_crc32c(data: bytes) -> int:
    """CRC-32C rotated right by 15 bits, plus a constant, as TFRecord files have it (tensorflow/core/lib/hash/crc32c.h)."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def main(arguments: list[str]) -> int:
    """Exports the store that the arguments name, and prints where to. Exit status 0, or 1 with the reason."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.seqio_bridge.seqio_cache", description="Write a token store as a SeqIO offline cache"
    )
    parser.add_argument("store", help="the directory of a committed token store")
    parser.add_argument("cache_root", help="what seqio.add_global_cache_dirs is given")
    parser.add_argument("task_name", help="the SeqIO task that the cache is for")
    chosen = parser.parse_args(arguments)
    try:
        print(export_cache(chosen.store, chosen.cache_root, chosen.task_name))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
