"""Leases as files: one numbered file for each time a lease was granted, the highest number being in force.

A lease is granted by creating the file after the highest, which the file system lets exactly one process do, content and
all (a hard link to a finished file). So there is no half-written lease, no compare-and-swap, and no number is used twice:
the number is the fencing token. Only the process a lease was granted to touches its file again, to show that it lives.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from tasks.places import Place, place_of
from tasks.storage import make_directory, storage_errors, sync_directory, write_temporary

# A key is no path: Prefect opens a result's key as a file when it is an absolute path and no storage is known
KEY_PREFIX = "artifact:"
_FILE = re.compile(r"(\d{20})\.json")
# Late comers that computed the next number long ago must still find that number taken
_KEPT = 8
_LITTER_SECONDS = 3600.0


@dataclass(frozen=True)
class Owner:
    """The process that holds a lease: enough to know, on the same machine, whether it still runs."""

    host: str
    boot: str
    namespace: str
    pid: int
    started: str
    thread: int

    @classmethod
    def current(cls, thread: int) -> Owner:
        """This process; `thread` is the caller's identifier, or 0 when no one thread holds the lease."""
        host, boot, namespace = _machine()
        return cls(host, boot, namespace, os.getpid(), _process_start(os.getpid()) or "", thread)

    @classmethod
    def parse(cls, data: Any) -> Owner:
        """From JSON values; raises KeyError, TypeError or ValueError for anything else."""
        host, boot, namespace = str(data["host"]), str(data["boot"]), str(data["namespace"])
        return cls(host, boot, namespace, int(data["pid"]), str(data["started"]), int(data["thread"]))

    def is_dead(self) -> bool:
        """True only if this is certain: same host, boot and process namespace, and the process is gone or is another one."""
        if (self.host, self.boot, self.namespace) != _machine():
            return False
        started = _process_start(self.pid)
        return started is None or bool(started and self.started and started != self.started)

    def is_this_thread(self) -> bool:
        """Whether the caller is the very thread that took the lease."""
        return self.thread != 0 and self == Owner.current(threading.get_ident())

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}"


@dataclass(frozen=True)
class Lease:
    """One grant of a lease. `heartbeat` changes while the holder lives; it is compared, never read as a time."""

    path: Place
    token: int
    holder: str
    owner: Owner | None
    since: str
    released: bool = False
    heartbeat: int = field(default=0, compare=False)

    def is_free(self) -> bool:
        """Whether it was given back, or its holder is certainly dead."""
        return self.released or (self.owner is not None and self.owner.is_dead())


def directory_of(key: str) -> Place:
    """The place that a key, `artifact:{directory}@{fingerprint}`, is about."""
    return place_of(key.removeprefix(KEY_PREFIX).rpartition("@")[0] or key)


def lease_name(key: str) -> tuple[Place, str]:
    """Where the leases of `key` lie, `.leases` beside the artifact's directory, and the name that `key` has there."""
    return directory_of(key).parent / ".leases", sha256(key.encode()).hexdigest()[:32]


def lease_directory(key: str) -> Path:
    """Where the leases of `key`, about a directory of this machine, lie as files."""
    directory, name = lease_name(key)
    return _local(directory) / name


def newest(key: str) -> Lease | None:
    """The lease in force for `key`, or None if none was ever granted (or its directory is gone)."""
    directory = lease_directory(key)
    while tokens := _tokens(directory):
        path = directory / _name(tokens[-1])
        try:
            heartbeat = path.stat().st_mtime_ns
            return parse_lease(path, tokens[-1], path.read_bytes(), heartbeat)
        except FileNotFoundError:
            continue  # superseded and swept between the listing and the reading
    return None


def grant(key: str, holder: str, after: Lease | None, *, thread: int) -> Lease | None:
    """The lease on `key` for `holder`, following `after`; None if another process was granted it first."""
    directory = lease_directory(key)
    make_directory(directory)
    token = 1 if after is None else after.token + 1
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    lease = Lease(directory / _name(token), token, holder, Owner.current(thread), since)
    if not _create(lease) or newest(key) != lease:
        return None
    _sweep(directory, token)
    return lease


def beat(lease: Lease) -> None:
    """Shows that the holder lives. Raises OSError if it cannot be written."""
    os.utime(_local(lease.path))


def restore(lease: Lease) -> None:
    """Writes the lease again after its directory was removed under the holder; does nothing if anything is there."""
    make_directory(_local(lease.path).parent)
    _create(lease)


def give_back(lease: Lease) -> None:
    """Marks the lease as free for the next one at once; its number stays used."""
    path = _local(lease.path)
    with storage_errors(path):
        os.replace(write_temporary(path.parent, _dump(lease, released=True)), path)


def _create(lease: Lease) -> bool:
    path = _local(lease.path)
    with storage_errors(path):
        temporary = write_temporary(path.parent, _dump(lease))
        try:
            os.link(temporary, path)
            sync_directory(path.parent)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
    return True


def _local(place: Place) -> Path:
    assert isinstance(place, Path), f"{place} is in a bucket: its leases are objects"
    return place


def _dump(lease: Lease, *, released: bool = False) -> bytes:
    return (json.dumps(dump_lease(lease, released=released)) + "\n").encode()


def dump_lease(lease: Lease, *, released: bool) -> dict[str, Any]:
    """The lease as JSON values."""
    owner = None if lease.owner is None else asdict(lease.owner)
    return {"token": lease.token, "holder": lease.holder, "owner": owner, "since": lease.since, "released": released}


def parse_lease(path: Place, token: int, data: bytes, heartbeat: int) -> Lease:
    """The lease that `data` is; one that nobody is known to hold where `data` is damaged."""
    try:
        record = json.loads(data)
        owner, holder, since, released = (
            Owner.parse(record["owner"]),
            str(record["holder"]),
            str(record["since"]),
            record["released"] is True,
        )
    except (ValueError, KeyError, TypeError):
        # damaged by a power cut: nobody knows whose it is, so only its silence can free it
        return Lease(path, token, "", None, "an unknown time", False, heartbeat)
    return Lease(path, token, holder, owner, since, released, heartbeat)


def _name(token: int) -> str:
    return f"{token:020d}.json"


def _tokens(directory: Path) -> list[int]:
    try:
        names = [path.name for path in directory.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(match[1]) for name in names if (match := _FILE.fullmatch(name)))


def _sweep(directory: Path, token: int) -> None:
    for old in _tokens(directory):
        if old <= token - _KEPT:
            (directory / _name(old)).unlink(missing_ok=True)
    for litter in directory.glob(".tmp-*"):
        try:
            if time.time() - litter.stat().st_mtime > _LITTER_SECONDS:
                litter.unlink()
        except FileNotFoundError:
            continue


def _machine() -> tuple[str, str, str]:
    """Host name, boot and process namespace: where all three agree, a process id means the same process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        boot = namespace = ""
    return socket.gethostname(), boot, namespace


def _process_start(pid: int) -> str | None:
    """When the process started, in the kernel's own units, "" if the system does not tell; None if it does not run."""
    try:
        with suppress(PermissionError):  # it runs, as another user
            os.kill(pid, 0)
    except ProcessLookupError:
        return None
    try:
        # the command in the second field may hold spaces and parentheses
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return None if fields[0] in "ZX" else fields[19]
