"""Small committed token stores and mixtures for tests, built without TensorFlow or Prefect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.permutation import hash64
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


def store_writer(directory: Path, *, vocab_size: int = 512, bos_id: int | None = BOS, loss_mask: bool = False) -> TokenStoreWriter:
    """A writer of the tokenizer that all of these stores share."""
    return TokenStoreWriter(directory, vocab_size=vocab_size, bos_id=bos_id, eos_id=EOS, tokenizer_digest="t" * 64, loss_mask=loss_mask)


def write_store(
    directory: Path,
    name: str,
    splits: Mapping[str, Sequence[Sequence[Sequence[int]]]],
    *,
    vocab_size: int = 512,
    bos_id: int | None = BOS,
    loss_mask: bool = False,
    commit: bool = True,
) -> Path:
    """A store whose splits are lists of shards, shards lists of documents, documents lists of ids (BOS and EOS are added).

    With `loss_mask` the loss counts on the second half of each document.
    """
    writer = store_writer(directory, vocab_size=vocab_size, bos_id=bos_id, loss_mask=loss_mask)
    before = [] if bos_id is None else [bos_id]
    for split, shards in splits.items():
        for index, documents in enumerate(shards):
            with writer.shard(split, index, len(shards), key=f"{name}-{split}-{index}") as shard:
                for document in documents:
                    ids = np.array([*before, *document, EOS], np.int64)
                    mask = np.arange(len(ids)) * 2 >= len(ids)
                    shard.add(ids, 3 * len(document), mask if loss_mask else None)
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


def write_mixture(
    root: Path,
    weights: Mapping[str, float],
    *,
    documents: int = 40,
    vocab_size: int = 512,
    bos_id: int | None = BOS,
    later: Mapping[int, Mapping[str, float]] | None = None,
    packing: str = "concat",
    max_epochs: Mapping[str, float] | None = None,
    tails: Mapping[str, int] | None = None,
    simulated_epoching: Mapping[str, int] | None = None,
    masked: Sequence[str] = (),
) -> Placed:
    """A mixture of one synthetic store per name, with train (3 shards, the second empty) and validation (1 shard) splits.

    `later` are other weights by the step they begin at; `masked` names the components whose store has a loss mask.
    """
    components = []
    for number, name in enumerate(weights):
        shards = random_shards(number, 2, documents, vocab_size=vocab_size)
        splits = {"train": [shards[0], [], shards[1]], "validation": random_shards(100 + number, 1, 9, vocab_size=vocab_size)}
        store = write_store(root / "tokens" / name, name, splits, vocab_size=vocab_size, bos_id=bos_id, loss_mask=name in masked)
        components.append(
            {
                "name": name,
                "store": f"../../tokens/{store.name}",
                "fingerprint": name.ljust(64, "0"),
                "unigram_entropy": 5.0,
                "tail_tokens": (tails or {}).get(name, 0),
                "max_epochs": (max_epochs or {}).get(name),
            }
        )
    directory = root / "mixtures" / "mix"
    directory.mkdir(parents=True)
    mixture = {
        "name": "mix",
        "components": components,
        "stages": [{"step": step, "shares": _shares(shares)} for step, shares in {0: weights, **(later or {})}.items()],
        "packing": packing,
        "simulated_epoching": None if simulated_epoching is None else dict(simulated_epoching),
        "tokenizer": {"path": "tokenizer", "digest": "t" * 64, "vocab_size": vocab_size, "bos_id": bos_id, "eos_id": EOS},
        "unigram_entropy": 5.0,
    }
    (directory / "mixture.json").write_text(json.dumps(mixture), encoding="utf-8")
    write_manifest(directory, "mixtures", "mix", "f" * 64, {})
    return Placed(str(directory))


def _shares(weights: Mapping[str, float]) -> dict[str, float]:
    return {name: weight / sum(weights.values()) for name, weight in weights.items() if weight}
