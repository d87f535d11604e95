"""The token store: a corpus as flat little-endian ids in shards, with document offsets, read by index.

Layout below one artifact directory (`manifest.json` is written last, by whoever commits the artifact):

    manifest.json                                  stats: tokenizer, special ids, totals per split
    train/shard-00003-of-00013/tokens.bin          ids, uint16, or uint32 where the vocabulary needs it
    train/shard-00003-of-00013/docs.npy            int64 [documents + 1]: where each document starts, and the end
    train/shard-00003-of-00013/bytes.npy           uint32 [documents]: UTF-8 bytes of the text of each document
    train/shard-00003-of-00013/loss_mask.bin       uint8: 1 where the loss counts with that token as target; only in stores with a mask
    train/shard-00003-of-00013/shard.json          ledger: counts, sizes, hashes, the key of its input; written last
    validation/shard-00003-of-00013/...
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.token_split import ShardPart, TokenSplit, with_tail
from model.token_writer import ShardLedger, StoreError, TokenStoreWriter, shard_directory

__all__ = ["ShardLedger", "StoreError", "TokenSplit", "TokenStore", "TokenStoreWriter", "artifact_path", "read_committed", "with_tail"]


def artifact_path(artifact: Any) -> Path:
    """The directory of an artifact given as itself (anything with `.path`) or as its path."""
    return Path(getattr(artifact, "path", artifact))


def read_committed(directory: Path) -> dict[str, Any]:
    """The manifest of a committed artifact. Raises StoreError when there is none or it cannot be read."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{directory} is not a committed artifact: it has no manifest.json; run the step that makes it again") from None
    except ValueError as error:
        raise StoreError(f"{directory / 'manifest.json'} is not JSON ({error}); run the step that makes it again") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("stats"), dict) or not isinstance(manifest.get("fingerprint"), str):
        raise StoreError(f"{directory / 'manifest.json'} lacks 'stats' or 'fingerprint'; run the step that makes it again")
    return manifest


@dataclass(frozen=True)
class TokenStore:
    """A committed token store; `splits` maps "train" and "validation" to their streams."""

    path: Path
    name: str
    fingerprint: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    tokenizer_digest: str
    loss_mask: bool
    splits: dict[str, TokenSplit]

    @classmethod
    def open(cls, path: Any) -> TokenStore:
        """Opens the store at `path` (an artifact or its directory), checking every file's size against the ledgers.

        Raises StoreError naming the file where the store is not committed, lacks a file, or differs in size or count.
        """
        directory = artifact_path(path)
        manifest = read_committed(directory)
        stats = manifest["stats"]
        try:
            dtype = np.dtype(stats["dtype"])
            loss_mask = bool(stats["loss_mask"])
            splits = {
                name: TokenSplit(name, _parts(directory, name, totals), dtype, has_loss_mask=loss_mask)
                for name, totals in stats["splits"].items()
            }
            return cls(
                path=directory,
                name=str(manifest.get("name", directory.name)),
                fingerprint=manifest["fingerprint"],
                vocab_size=int(stats["vocab_size"]),
                bos_id=None if stats["bos_id"] is None else int(stats["bos_id"]),
                eos_id=int(stats["eos_id"]),
                tokenizer_digest=str(stats["tokenizer_digest"]),
                loss_mask=loss_mask,
                splits=splits,
            )
        except KeyError as error:
            raise StoreError(f"{directory / 'manifest.json'} has no field {error} in its stats; tokenize the dataset again") from None


def _parts(directory: Path, split: str, totals: dict[str, Any]) -> list[ShardPart]:
    """The shards of a split, checked against the files beside them and the manifest's totals."""
    count = int(totals["shards"])
    ledgers = [ShardLedger.read(shard_directory(directory, split, index, count)) for index in range(count)]
    for index, ledger in enumerate(ledgers):
        place = shard_directory(directory, split, index, count)
        for file in ledger.files:
            path = place / file.name
            size = path.stat().st_size if path.is_file() else None
            if size != file.bytes:
                found = "is missing" if size is None else f"has {size} bytes"
                raise StoreError(f"{path} {found}, its ledger says {file.bytes}; tokenize the dataset again")
    found = {name: sum(getattr(ledger, name) for ledger in ledgers) for name in ("documents", "tokens", "source_bytes")}
    for name, total in found.items():
        if total != totals[name]:
            raise StoreError(f"{directory} split {split!r}: ledgers hold {total} {name}, the manifest says {totals[name]}; tokenize again")
    return [ShardPart.whole(shard_directory(directory, split, index, count), ledger) for index, ledger in enumerate(ledgers)]
