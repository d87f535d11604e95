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

from model.shard_ledger import ShardLedger, StoreError, shard_directory, token_dtype, whole_number
from model.token_split import ShardPart, TokenSplit, with_tail
from model.token_writer import TokenStoreWriter

__all__ = ["ShardLedger", "StoreError", "TokenSplit", "TokenStore", "TokenStoreWriter", "artifact_path", "read_committed", "with_tail"]

TOTALS = ("documents", "tokens", "source_bytes")


def artifact_path(artifact: Any) -> Path:
    """The directory of an artifact given as itself (anything with `.path`) or as its path."""
    return Path(getattr(artifact, "path", artifact))


def read_committed(directory: Path) -> dict[str, Any]:
    """The manifest of a committed artifact. Raises StoreError when there is none or it cannot be read."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{directory} is not a committed artifact: it has no manifest.json; run the step that makes it again") from None
    except OSError as error:
        raise StoreError(f"{directory / 'manifest.json'} cannot be read ({error.strerror}); run the step that makes it again") from None
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
        """Opens the store at `path` (an artifact or its directory), checking ledgers, and every file's size, against each other.

        Raises StoreError naming the file where the store is not committed, lacks a file, or differs in size or count. What the
        files of a shard hold is checked when it is first used.
        """
        directory = artifact_path(path)
        manifest = read_committed(directory)
        place, stats = directory / "manifest.json", manifest["stats"]
        try:
            vocab_size, loss_mask = whole_number(stats, "vocab_size"), stats["loss_mask"]
            bos_id = None if stats["bos_id"] is None else whole_number(stats, "bos_id")
            eos_id, splits = whole_number(stats, "eos_id"), stats["splits"]
            dtype = token_dtype(vocab_size)
            if max(eos_id, bos_id or 0) >= vocab_size:
                raise ValueError(f"bos_id {bos_id} or eos_id {eos_id} is outside the vocabulary of {vocab_size}")
            if stats["dtype"] != dtype.str:
                raise ValueError(f"dtype is {stats['dtype']!r}, ids of a vocabulary of {vocab_size} are {dtype.str!r}")
            if type(loss_mask) is not bool or not isinstance(stats["tokenizer_digest"], str):
                raise ValueError(f"loss_mask is {loss_mask!r} and tokenizer_digest {stats['tokenizer_digest']!r}")
            if not isinstance(splits, dict) or not all(isinstance(totals, dict) for totals in splits.values()):
                raise ValueError(f"splits is {splits!r}, expected the totals of each by name")
            counts = {name: {total: whole_number(splits[name], total) for total in ("shards", *TOTALS)} for name in splits}
        except KeyError as error:
            raise StoreError(f"{place} has no field {error} in its stats; tokenize the dataset again") from None
        except ValueError as error:
            raise StoreError(f"{place} is malformed ({error}); tokenize the dataset again") from None
        return cls(
            path=directory,
            name=str(manifest.get("name", directory.name)),
            fingerprint=manifest["fingerprint"],
            vocab_size=vocab_size,
            bos_id=bos_id,
            eos_id=eos_id,
            tokenizer_digest=stats["tokenizer_digest"],
            loss_mask=loss_mask,
            splits={
                name: TokenSplit(name, _parts(directory, name, totals, dtype, loss_mask), dtype, has_loss_mask=loss_mask)
                for name, totals in counts.items()
            },
        )


def _parts(directory: Path, split: str, totals: dict[str, int], dtype: np.dtype[Any], loss_mask: bool) -> list[ShardPart]:
    """The shards of a split, checked against the files beside them and the manifest's totals."""
    places = [shard_directory(directory, split, index, totals["shards"]) for index in range(totals["shards"])]
    ledgers = [ShardLedger.read(place) for place in places]
    for place, ledger in zip(places, ledgers, strict=True):
        ledger.check(place, dtype, loss_mask)
    for name in TOTALS:
        total = sum(getattr(ledger, name) for ledger in ledgers)
        if total != totals[name]:
            raise StoreError(
                f"{directory} split {split!r}: ledgers hold {total} {name}, the manifest says {totals[name]}; tokenize the dataset again"
            )
    return [ShardPart.whole(place, ledger) for place, ledger in zip(places, ledgers, strict=True)]
