"""What the files of a shard of tokens must be, and the ledger that says what it holds.

A shard is a directory; see `model.token_store` for the files in it. The ledger, `shard.json`, is written after all others.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from model.durable import sha256_of

LEDGER_SCHEMA = 2
TOKENS_FILE, OFFSETS_FILE, BYTES_FILE, LOSS_MASK_FILE = "tokens.bin", "docs.npy", "bytes.npy", "loss_mask.bin"


class StoreError(ValueError):
    """A token store or mixture that is not committed, is damaged, or does not fit what is asked of it."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype that holds ids below `vocab_size`: little-endian uint16, or uint32 above 65,536."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def npy_header(dtype: np.dtype[Any], count: int) -> bytes:
    """What precedes the values of an array [count] in an .npy file of format 1.0 (NEP 1), byte for byte as `numpy.save` writes it.

    numpy's own function takes ten times as long, which opening thousands of shards would show.
    """
    fields = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({count},), }}"
    return b"\x93NUMPY\x01\x00\x76\x00" + fields.ljust(117).encode() + b"\n"


OFFSETS_DTYPE, BYTES_DTYPE = np.dtype("<i8"), np.dtype("<u4")
NPY_HEADER_BYTES = 128


def shard_directory(store: Path, split: str, shard: int, num_shards: int) -> Path:
    """Where shard number `shard` (from 0) of a split lies."""
    return store / split / f"shard-{shard:05d}-of-{num_shards:05d}"


def whole_number(record: Mapping[str, Any], name: str) -> int:
    """The integer >= 0 of that name. Raises KeyError where there is none and ValueError where it is something else."""
    value = record[name]
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} is {value!r}, expected a whole number")
    return value


@dataclass(frozen=True)
class ShardFile:
    """One data file of a shard."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardLedger:
    """What a finished shard holds. `key` identifies the input: equal key, equal output."""

    key: str
    documents: int
    tokens: int
    source_bytes: int
    files: tuple[ShardFile, ...]
    skipped: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path) -> ShardLedger:
        """Reads `shard.json`. Raises StoreError where it is missing or malformed."""
        path = directory / "shard.json"
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if value["schema"] != LEDGER_SCHEMA:
                raise StoreError(f"{path} has schema {value['schema']!r}, this version reads {LEDGER_SCHEMA}; tokenize the dataset again")
            return cls(
                key=str(value["key"]),
                documents=whole_number(value, "documents"),
                tokens=whole_number(value, "tokens"),
                source_bytes=whole_number(value, "source_bytes"),
                files=tuple(ShardFile(str(file["name"]), whole_number(file, "bytes"), str(file["sha256"])) for file in value["files"]),
                skipped={str(reason): whole_number(value["skipped"], reason) for reason in value["skipped"]},
            )
        except FileNotFoundError:
            raise StoreError(f"{path} is missing: the shard was not finished; tokenize the dataset again") from None
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(f"{path} cannot be read ({error.strerror}); tokenize the dataset again") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{path} is malformed ({type(error).__name__}: {error}); tokenize the dataset again") from None

    def file_sizes(self, dtype: np.dtype[Any], has_loss_mask: bool) -> dict[str, int]:
        """The bytes of each file of the shard, by name, as its counts and the dtype of its tokens make them."""
        sizes = {
            TOKENS_FILE: self.tokens * dtype.itemsize,
            OFFSETS_FILE: NPY_HEADER_BYTES + (self.documents + 1) * OFFSETS_DTYPE.itemsize,
            BYTES_FILE: NPY_HEADER_BYTES + self.documents * BYTES_DTYPE.itemsize,
        }
        return {**sizes, LOSS_MASK_FILE: self.tokens} if has_loss_mask else sizes

    def check(self, directory: Path, dtype: np.dtype[Any], has_loss_mask: bool) -> None:
        """Raises StoreError naming what is wrong: files other than the shard must have, of other sizes, or not there."""
        sizes = self.file_sizes(dtype, has_loss_mask)
        if len(self.files) != len(sizes) or {file.name: file.bytes for file in self.files} != sizes:
            listed = ", ".join(f"{file.name} of {file.bytes} bytes" for file in self.files) or "no file"
            wanted = ", ".join(f"{name} of {size}" for name, size in sizes.items())
            raise StoreError(
                f"{directory / 'shard.json'} lists {listed}; {self.documents} documents of {self.tokens} {dtype.name} tokens are {wanted}: "
                "tokenize the dataset again"
            )
        for name, size in sizes.items():
            path = directory / name
            try:
                status = path.stat()
                found = f"has {status.st_size} bytes" if stat.S_ISREG(status.st_mode) else "is not a file"
            except OSError as error:
                found = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
            if found != f"has {size} bytes":
                raise StoreError(f"{path} {found}, its ledger says {size}; tokenize the dataset again")

    def verifies(self, directory: Path) -> bool:
        """Whether every file that the ledger lists is there with its size and hash (reads the files)."""
        return all(
            (path := directory / file.name).is_file() and path.stat().st_size == file.bytes and sha256_of(path) == file.sha256
            for file in self.files
        )
