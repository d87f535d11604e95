"""Brings files here: resumed by byte range, retried with jitter, checked, in parallel under one rate limit; none is ever half there."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

import httpx

from model.durable import durable_file
from tasks.sources.dataset_files import find_one
from tasks.sources.filesystems import filesystem_errors, is_changed, open_filesystem, size_in, versions_in
from tasks.sources.http_requests import answered, length_of, open_client, version_of
from tasks.sources.local_files import is_local, local_path
from tasks.sources.parallel_jobs import Control, in_parallel
from tasks.sources.part_file import PartFile, WrongContent
from tasks.sources.request_limits import Requests, Unavailable
from tasks.sources.source_file import DataError, SourceFile, public_location
from tasks.storage import storage_errors

WORKERS = 8
_CHUNK = 1 << 22


class Transfer:
    """Brings files to this machine, from several threads at once.

    told: gets a line about each try that failed. on_bytes: gets the bytes that arrive, fewer than 0 for those that arrived in vain.
    """

    def __init__(self, control: Control, *, told: Callable[[str], None], on_bytes: Callable[[int], None]) -> None:
        self._control, self._on_bytes = control, on_bytes
        self._requests = Requests(wait=control.wait, told=told)
        self._client: httpx.Client | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Transfer:
        return self

    def __exit__(self, *error: object) -> None:
        if self._client is not None:
            self._client.close()

    def bring(self, file: SourceFile, target: Path) -> tuple[str, int]:
        """Makes `target` the file, whole and durable: its sha256, and how many bytes had to be fetched.

        What an earlier process got of it is not fetched again.

        Raises:
            DataError: it is not there, not ours to read, not what was planned, or its server failed on every try.
            StorageError: the disk is full; says how much is needed.
            ChildStopped: the run is stopped; what has arrived stays.
        """
        if is_local(file.location):
            return self._copy(file, target)
        part = PartFile(file, target, self._control, self._on_bytes)
        try:
            self._fill(part)
            try:
                return part.finish(), part.fetched
            except WrongContent:
                if not part.continued:
                    raise
            # the bytes of an earlier answer may be at fault
            part.expect(None, None)
            self._fill(part)
            return part.finish(), part.fetched
        except WrongContent:
            part.discard()
            raise
        finally:
            part.close()

    def _fill(self, part: PartFile) -> None:
        if part.is_complete():
            return
        location = part.file.location
        over_http = location.lower().startswith(("http://", "https://"))
        attempt = (lambda: _read_http(part, self._shared_client())) if over_http else (lambda: _read_filesystem(part, self._requests))
        try:
            self._requests.call(attempt, progressed=part.progressed)
        except Unavailable as error:
            raise DataError(f"{error}; what has arrived is kept: run the same command again to go on") from None

    def _shared_client(self) -> httpx.Client:
        with self._lock:
            if self._client is None:
                self._client = open_client(WORKERS)
            return self._client

    def _copy(self, file: SourceFile, target: Path) -> tuple[str, int]:
        source = local_path(file.location)
        digest, size = hashlib.sha256(), 0
        try:
            reader = source.open("rb")
        except OSError as error:
            raise DataError(f"{source} cannot be read ({error.strerror}); put it back or correct the source") from None
        with reader, storage_errors(target.parent, needed_bytes=file.bytes, only_full=True), durable_file(target) as writer:
            while chunk := reader.read(_CHUNK):
                self._control.check()
                digest.update(chunk)
                size += len(chunk)
                writer.write(chunk)
                self._on_bytes(len(chunk))
            if file.sha256 not in (None, digest.hexdigest()) or file.bytes not in (None, size):
                raise DataError(
                    f"{source} changed since the run was planned ({file.bytes} bytes then, {size} now); let it rest, then run again"
                )
            self._control.check()
        return digest.hexdigest(), size


def _read_http(part: PartFile, client: httpx.Client) -> None:
    """Asks for the rest of a file and takes what comes. A server that has no ranges, or another file by now, begins from the start."""
    headers = {}
    if part.received:
        headers["Range"] = f"bytes={part.received}-"
        kind, _, validator = (part.validator or "").partition(":")
        # RFC 9110, 13.1.5: only a strong validator says that a range belongs to the same bytes
        if validator and not (kind == "etag" and validator.startswith("W/")):
            headers["If-Range"] = validator
    with answered(client, "GET", part.file.location, headers) as response:
        version, total = version_of(response.headers), length_of(response.headers)
        planned = part.file.version or ""
        if version and planned.startswith(("etag:", "modified:")) and version != planned:
            raise _changed(part.file, planned, version)
        if response.status_code == 200:
            part.expect(version, total)
        elif (
            response.status_code == 416
            or not response.headers.get("Content-Range", "").startswith(f"bytes {part.received}-")
            or version != part.validator
            or (total is not None and part.total is not None and total != part.total)
        ):
            part.expect(None, None)
            raise Unavailable(f"{public_location(part.file.location)} is not the file any more that the download began with")
        else:
            part.continued = True
        # as it is stored: a .gz that is served with a content encoding is not to be unpacked
        for data in response.iter_raw():
            part.write(data)
    size = part.file.bytes if part.file.bytes is not None else part.total
    if size is not None and part.received < size:
        raise Unavailable(f"{public_location(part.file.location)} ended after {part.received} of {size} bytes")


def _read_filesystem(part: PartFile, requests: Requests) -> None:
    """Reads the rest of a file in pieces, each of them a request of its own to most file systems."""
    location, planned = part.file.location, part.file.version
    with filesystem_errors(location):
        filesystem, path = open_filesystem(location)
        filesystem.invalidate_cache(path)
        info = filesystem.info(path)
        versions, size = versions_in(info), size_in(info)
    if is_changed(planned, versions):
        raise _changed(part.file, planned, " ".join(versions))
    version = next(iter(versions), None)
    if not part.received or (version, size) != (part.validator, part.total):
        part.expect(version, size)
    else:
        part.continued = True
    while not part.is_complete():
        end = part.received + _CHUNK if size is None else min(size, part.received + _CHUNK)
        requests.heed_pause()
        with filesystem_errors(location):
            data = filesystem.cat_file(path, start=part.received, end=end)
        if not isinstance(data, bytes):
            raise DataError(f"{public_location(location)}: its file system gives no bytes; copy the file elsewhere")
        part.write(data)
        if size is None and len(data) < _CHUNK:
            return
        if not data:
            raise Unavailable(f"{public_location(location)} ended after {part.received} of {size} bytes")


def _changed(file: SourceFile, planned: str | None, found: str) -> DataError:
    return DataError(
        f"{public_location(file.location)} changed since the run was planned ({planned} then, {found} now); run the same command again"
    )


def fetch_file(location: str, target: Path, *, sha256: str | None) -> None:
    """Makes `target` the one file that a path or URL names (every kind of source that a dataset has), by the same rules.

    A target that is there with this sha256 is kept. Raises as Transfer.bring, and DataError where `location` names no file.
    """
    control = Control(f"the download of {public_location(location)}")
    file = find_one(location, sha256=sha256)
    target.parent.mkdir(parents=True, exist_ok=True)
    if sha256 is not None and target.is_file() and hash_file(target, control) == sha256:
        return
    with Transfer(control, told=lambda line: None, on_bytes=lambda size: None) as transfer:
        for _ in in_parallel([lambda: transfer.bring(file, target)], control, workers=1):
            pass


def hash_file(path: Path, control: Control) -> str:
    """The sha256 of a file, hexadecimal. Raises ChildStopped when it is time to end."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            control.check()
            digest.update(chunk)
    return digest.hexdigest()
