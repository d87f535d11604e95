"""The few durable file operations that artifacts and leases rest on: the seam at which other storage can take over."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.durable import sync_directory

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM}


class StorageError(OSError):
    """The disk is full, read-only or closed to us; the message names the place and the remedy."""


def free_bytes(path: Path) -> int:
    """Bytes that this user can still write on the disk that holds `path`, or its nearest existing parent."""
    for place in (path, *path.absolute().parents):
        if place.exists():
            return shutil.disk_usage(place).free
    raise StorageError(f"{path} has no existing parent directory")


@contextmanager
def storage_errors(place: Path, *, needed_bytes: int | None = None, only_full: bool = False) -> Iterator[None]:
    """Turns "no space left" and "read-only" from the operating system into a StorageError about `place`.

    only_full: leaves "read-only" and "permission denied" as they are, where other places may be read too.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno in FULL:
            needed = "" if needed_bytes is None else f"{needed_bytes:,} bytes are needed, "
            raise StorageError(
                error.errno,
                f"no space left while writing {place} ({error.strerror}): {needed}{free_bytes(place):,} bytes are free. "
                "Free some space or choose another --root, then run the same command again: it continues where it stopped",
            ) from error
        if error.errno in REFUSED and not only_full:
            raise StorageError(
                error.errno,
                f"cannot write {place}: {error.strerror}. Make it writable for this user, or choose another directory with --root",
            ) from error
        raise


def sync_file(path: Path) -> None:
    """Makes the bytes of the file `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Creates `path` and its parents durably; an existing directory is left alone."""
    with storage_errors(path):
        missing = [place for place in (path, *path.absolute().parents) if not place.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for place in missing:
            sync_directory(place.absolute().parent)


def write_temporary(directory: Path, data: bytes) -> Path:
    """Writes and fsyncs `data` under a fresh hidden name in `directory`, for a later rename or link; returns its path."""
    temporary = directory / f".tmp-{uuid.uuid4().hex}"
    with storage_errors(directory, needed_bytes=len(data)):
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    return temporary


def check_writable(root: str | Path) -> None:
    """Proves that files can be created, fsynced and removed under `root`, creating it; raises StorageError if not."""
    directory = Path(root)
    make_directory(directory)
    write_temporary(directory, b"probe").unlink()
