"""Small committed token stores and mixtures for tests, built without TensorFlow or Prefect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.order import hash64
from model.token_store import TokenStoreWriter

BOS, EOS = 1, 2


@dataclass(frozen=True)
class Placed:
    """Stands for an artifact: anything with a path."""

    path: str


def write_manifest(directory: Path, kind: str, name: str, fingerprint: str, stats: dict[str, Any]) -> None:
    """The least a manifest must hold to be read."""
    manifest = {"schema": 1, "kind": kind, "name": name, "fingerprint": fingerprint, "files": [], "stats": stats}
    (directory / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def write_store(
    directory: Path, name: str, splits: Mapping[str, Sequence[Sequence[Sequence[int]]]], *, vocab_size: int = 512, commit: bool = True
) -> Path:
    """A store whose splits are lists of shards, shards lists of documents, documents lists of ids (BOS and EOS are added)."""
    writer = TokenStoreWriter(directory, vocab_size=vocab_size, bos_id=BOS, eos_id=EOS, tokenizer_sha256="t" * 64)
    for split, shards in splits.items():
        for index, documents in enumerate(shards):
            with writer.shard(split, index, len(shards), key=f"{name}-{split}-{index}") as shard:
                for document in documents:
                    shard.add(np.array([BOS, *document, EOS], np.int64), source_bytes=3 * len(document))
    stats = writer.stats({split: len(shards) for split, shards in splits.items()})
    if commit:
        write_manifest(directory, "tokens", name, name.ljust(64, "0"), stats)
    return directory


def random_shards(seed: int, shards: int, documents: int, *, longest: int = 60, vocab_size: int = 512) -> list[list[list[int]]]:
    """Documents of random ids (3 and up) and random lengths, a pure function of the arguments."""
    # hashes instead of numpy's generators, whose streams may change between numpy versions
    lengths = 1 + hash64(seed, np.arange(shards)[:, None], np.arange(documents)) % np.uint64(longest - 1)
    ids = hash64(seed, 7, np.arange(shards)[:, None, None], np.arange(documents)[:, None], np.arange(longest)) % np.uint64(vocab_size - 3)
    return [[(ids[s, d, : lengths[s, d]] + np.uint64(3)).tolist() for d in range(documents)] for s in range(shards)]


def write_mixture(root: Path, weights: Mapping[str, float], *, documents: int = 40, vocab_size: int = 512) -> Placed:
    """A mixture of one synthetic store per name, with train (3 shards, the second empty) and validation (1 shard) splits."""
    components = []
    for number, (name, weight) in enumerate(weights.items()):
        shards = random_shards(number, 2, documents, vocab_size=vocab_size)
        splits = {"train": [shards[0], [], shards[1]], "validation": random_shards(100 + number, 1, 9, vocab_size=vocab_size)}
        store = write_store(root / "tokens" / name, name, splits, vocab_size=vocab_size)
        components.append(
            {
                "name": name,
                "weight": weight,
                "store": f"../../tokens/{store.name}",
                "fingerprint": name.ljust(64, "0"),
                "unigram_entropy": 5.0,
            }
        )
    directory = root / "mixtures" / "mix"
    directory.mkdir(parents=True)
    tokenizer = {"path": "tokenizer.model", "sha256": "t" * 64, "vocab_size": vocab_size, "bos_id": BOS, "eos_id": EOS}
    mixture = {"name": "mix", "components": components, "tokenizer": tokenizer, "unigram_entropy": 5.0}
    (directory / "mixture.json").write_text(json.dumps(mixture), encoding="utf-8")
    write_manifest(directory, "mixtures", "mix", "f" * 64, {})
    return Placed(str(directory))
