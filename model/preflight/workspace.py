"""A directory for one compilation, removed with it. What killed processes left is removed by the next compilation of this machine."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = "preflight-compile-"
_LOCK = "lock"
_BEING_MADE = 60.0  # seconds in which a directory's owner has its lock


@contextmanager
def workspace() -> Iterator[Path]:
    """An empty directory below the system's temporary one, but for a lock that this process holds as long as it lives.

    Raises:
        OSError: it cannot be made.
    """
    _remove_abandoned(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as name:
        directory = Path(name)
        with (directory / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield directory


def _remove_abandoned(parent: Path) -> None:
    """Removes the directories whose owner died: their locks can be had."""
    for lock in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        try:
            if time.time() - lock.stat().st_mtime < _BEING_MADE:
                continue
            with lock.open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
        except OSError:  # in use, another user's, or gone meanwhile
            continue
