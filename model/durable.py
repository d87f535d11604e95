"""Files that exist whole or not at all: temporary name, fsync, rename, fsync of the directory."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY_SUFFIX = ".tmp"


@contextmanager
def durable_file(path: Path, *, sync_name: bool = True) -> Iterator[BinaryIO]:
    """A binary file that takes the name `path` only when the block ends well, and is on disk by then.

    sync_name False: its name may still be lost with the power, for a file that another one in the directory follows.
    Raises whatever the block or the file system raises; nothing is left behind in that case.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync_name:
        sync_directory(path.parent)


def write_durably(path: Path, data: bytes, *, sync_name: bool = True) -> None:
    """Writes `data` as the whole content of `path`; see `durable_file`."""
    with durable_file(path, sync_name=sync_name) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as `json_text`."""
    write_durably(path, json_text(value).encode())


def json_text(value: Any) -> str:
    """`value` as JSON with sorted keys, so that equal values are equal bytes."""
    return json.dumps(value, sort_keys=True, indent=1) + "\n"


def sync_directory(directory: Path) -> None:
    """Makes the names in `directory` durable (a rename is not, until its directory is synced)."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(directory: Path) -> None:
    """Removes what a killed writer left in `directory`. A writer that still runs then fails at its rename."""
    for stray in directory.glob(f".*{TEMPORARY_SUFFIX}"):
        stray.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, hexadecimal, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
