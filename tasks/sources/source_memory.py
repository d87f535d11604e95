"""What is remembered between runs: digests of large local files, listings of remote ones, lists of files. Losing it costs time only."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any

from model.durable import sha256_of, write_durably

# Smaller files are hashed again every time: that takes less than a second, and a memo cannot then be wrong about them.
MEMO_BYTES = 64 << 20
# A file changed so recently can change again without its times showing it.
_SETTLED_SECONDS = 10


def cache_directory() -> Path:
    """Where this user's caches are, by the XDG base directory specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefect-llama"


class DigestMemo:
    """Remembers digests of large files between runs, by path, size, times and inode."""

    def __init__(self) -> None:
        self._path = cache_directory() / "source-digests.json"
        self._changed = False
        value = _read_json(self._path)
        self._known: dict[str, str] = {str(key): str(digest) for key, digest in value.items()} if isinstance(value, dict) else {}

    def digest(self, path: Path) -> str:
        """The file's sha256, remembered where it is large and was not touched since."""
        status = path.stat()
        if status.st_size < MEMO_BYTES:
            return sha256_of(path)
        key = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}|{status.st_ctime_ns}|{status.st_dev}:{status.st_ino}"
        if re.fullmatch("[0-9a-f]{64}", self._known.get(key, "")):
            return self._known[key]
        digest = sha256_of(path)
        if time.time() - max(status.st_mtime, status.st_ctime) > _SETTLED_SECONDS:
            self._known[key] = digest
            self._changed = True
        return digest

    def save(self) -> None:
        """Writes what was added."""
        if self._changed:
            self._changed = not _write_json(self._path, self._known)


def remember_listing(source: str, value: Any) -> None:
    """Keeps what a remote source listed, as JSON. `source` itself is not written: it can hold a password."""
    _write_json(_listing_path(source), value)


def remembered_listing(source: str) -> Any:
    """What `remember_listing` kept for the source, or None."""
    return _read_json(_listing_path(source))


def remember_list(location: str, digest: str, data: bytes) -> None:
    """Keeps a published list of files, whose sha256 is `digest`. `location` itself is not written."""
    _write_bytes(_list_path(location, digest), data)


def remembered_list(location: str, digest: str) -> bytes | None:
    """What `remember_list` kept, undamaged, or None."""
    try:
        data = _list_path(location, digest).read_bytes()
    except OSError:
        return None
    return data if hashlib.sha256(data).hexdigest() == digest else None


def _list_path(location: str, digest: str) -> Path:
    # of two lists with one pin, one has the pin by mistake
    return cache_directory() / "lists" / hashlib.sha256(f"{location} {digest}".encode()).hexdigest()


def _listing_path(source: str) -> Path:
    return cache_directory() / "listings" / f"{hashlib.sha256(source.encode()).hexdigest()}.json"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write_json(path: Path, value: Any) -> bool:
    return _write_bytes(path, (json.dumps(value, sort_keys=True) + "\n").encode())


def _write_bytes(path: Path, data: bytes) -> bool:
    """Whether it could be written; a cache that cannot be is done without."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, data)
    except OSError:
        return False
    return True
