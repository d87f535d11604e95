"""A file that is arriving: its bytes so far lie beside its target and outlive the process, the target appears whole and checked."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from model.durable import sync_directory
from tasks.sources.parallel_jobs import Control
from tasks.sources.source_file import DataError, SourceFile, public_location
from tasks.storage import storage_errors

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_CHUNK = 1 << 20
# So many bytes count as progress: a server that gives one at a time does not keep a download going for ever.
_PROGRESS_BYTES = 1 << 20


class WrongContent(DataError):
    """All bytes have arrived, and they are not the file's."""


class ContentCheck:
    """The digests of a file as it is read, and whether they are what was published."""

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        kind, _, self._expected = (file.version or "").partition(":")
        self._other = None
        if kind == "git-blob" and file.bytes is not None:
            # what git hashes of a file (Pro Git, 10.2): its size comes first
            self._other = hashlib.sha1(f"blob {file.bytes}\0".encode(), usedforsecurity=False)
        elif kind == "md5":
            self._other = hashlib.md5(usedforsecurity=False)
        self._kind = kind

    @staticmethod
    def is_possible(file: SourceFile) -> bool:
        """Whether anything is known of the file that its bytes can be checked by, besides their number."""
        return file.sha256 is not None or (file.version or "").partition(":")[0] in ("git-blob", "md5")

    def update(self, data: bytes) -> None:
        """Takes the next bytes."""
        self._sha256.update(data)
        if self._other is not None:
            self._other.update(data)

    def check(self) -> str:
        """The sha256 found. Raises WrongContent where a digest is not the published one."""
        found = self._sha256.hexdigest()
        where = public_location(self._file.location)
        if self._file.sha256 not in (None, found):
            raise WrongContent(
                f"{where} has the sha256 {found} where {self._file.sha256} was expected: the file was replaced or is damaged at its "
                "source; ask its publisher, or correct the sha256 that is given"
            )
        if self._other is not None and self._other.hexdigest() != self._expected:
            raise WrongContent(
                f"{where} has the {self._kind} digest {self._other.hexdigest()} where {self._expected} was listed: it changed since the "
                "run was planned, or is damaged at its source; run the same command again"
            )
        return found


def md5_version(value: str) -> str | None:
    """The version of a file whose storage names its MD5, in base64 (Google Cloud Storage) or hexadecimal."""
    try:
        digest = bytes.fromhex(value) if len(value) == 32 else base64.b64decode(value, validate=True)
    except ValueError:
        return None
    return f"md5:{digest.hex()}" if len(digest) == 16 else None


class PartFile:
    """`.{name}.part`, and a note beside it of what its bytes are part of.

    received: bytes that are there. validator: what the server calls this state of the file. total: its size as the server has it.
    fetched: bytes that this process has got. continued: whether bytes were added to those of an earlier answer.
    """

    def __init__(self, file: SourceFile, target: Path, control: Control, on_bytes: Callable[[int], None]) -> None:
        self.file, self.target = file, target
        self.received = self.fetched = 0
        self.validator: str | None = None
        self.total: int | None = None
        self.continued = False
        self._path = target.with_name(f".{target.name}.part")
        self._note = target.with_name(f".{target.name}.part.json")
        self._control, self._lock, self._on_bytes = control, control.new_lock(), on_bytes
        self._furthest = 0
        self._check = ContentCheck(file)
        with storage_errors(target.parent, only_full=True):
            self._handle = self._path.open("a+b", buffering=0)
        self._resume()

    def expect(self, validator: str | None, total: int | None) -> None:
        """Begins anew, with bytes of this state of the file.

        Raises DataError where its size is not the planned one.
        """
        if self.file.bytes is not None and total is not None and total != self.file.bytes:
            raise DataError(
                f"{public_location(self.file.location)} changed since the run was planned ({self.file.bytes} bytes then, {total} now); "
                "run the same command again"
            )
        with self._lock:
            self._control.check()
            self._handle.truncate(0)
            self._on_bytes(-self.received)
            self.received = 0
            self.validator, self.total = validator, total
            self._check = ContentCheck(self.file)
            with storage_errors(self.target.parent, only_full=True):
                self._note.write_text(json.dumps({**self._state(), "validator": validator, "total": total}), encoding="utf-8")

    def write(self, data: bytes) -> None:
        """Adds bytes. Raises DataError for more than there should be, StorageError for a full disk with what is needed."""
        size = self.file.bytes if self.file.bytes is not None else self.total
        if size is not None and self.received + len(data) > size:
            raise DataError(f"{public_location(self.file.location)} sends more than its {size} bytes; correct the source")
        needed = None if size is None else size - self.received
        with self._lock, storage_errors(self.target.parent, needed_bytes=needed, only_full=True):
            self._control.check()
            left = memoryview(data)
            while left:
                left = left[self._handle.write(left) :]
            self._check.update(data)
            self.received += len(data)
        self.fetched += len(data)
        self._on_bytes(len(data))

    def is_complete(self) -> bool:
        """Whether as many bytes are there as there should be; False where nobody says how many."""
        size = self.file.bytes if self.file.bytes is not None else self.total
        return size is not None and self.received == size

    def progressed(self) -> bool:
        """Whether it has got further than ever before when this was last asked, by so much that another try is no repetition."""
        grown = self.received - self._furthest >= _PROGRESS_BYTES
        self._furthest = max(self._furthest, self.received)
        return grown

    def finish(self) -> str:
        """Checks the bytes and gives them their name, durably; their sha256. Raises WrongContent where they are not the file's."""
        with self._lock, storage_errors(self.target.parent, only_full=True):
            self._control.check()
            digest = self._check.check()
            os.fsync(self._handle.fileno())
            self._path.replace(self.target)
            self._note.unlink(missing_ok=True)
            sync_directory(self.target.parent)
        return digest

    def discard(self) -> None:
        """Throws away what has arrived."""
        with self._lock:
            self._control.check()
            self._path.unlink(missing_ok=True)
            self._note.unlink(missing_ok=True)

    def close(self) -> None:
        """Lets go of the file, which stays for the next try if it is not finished."""
        self._handle.close()

    def _state(self) -> dict[str, Any]:
        place = hashlib.sha256(self.file.location.encode()).hexdigest()
        return {"file": self.file.identity(), "place": place, "boot": _boot()}

    def _read_note(self) -> dict[str, Any]:
        try:
            note = json.loads(self._note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return note if isinstance(note, dict) else {}

    def _resume(self) -> None:
        """Takes over what an earlier process left, if it is the beginning of the same file.

        Where nothing can check the content in the end, that process must have died in this boot of the machine: after a
        power cut a file can hold bytes that were never written.
        """
        note = self._read_note()
        checked = ContentCheck.is_possible(self.file)
        state = self._state()
        same = note.get("file") == state["file"] and (checked or note.get("place") == state["place"])
        if not same or not (checked or (state["boot"] and note.get("boot") == state["boot"])):
            self._handle.truncate(0)
            return
        self.validator, self.total = note.get("validator"), note.get("total")
        self._handle.seek(0)
        while data := self._handle.read(_CHUNK):
            self._control.check()
            self._check.update(data)
            self.received += len(data)
        self._furthest = self.received
        self.continued = self.received > 0
        self._on_bytes(self.received)


def _boot() -> str | None:
    """Tells one boot of this machine from another; None where the system does not."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return None
