"""Objects of Google Cloud Storage: read, written if nobody else wrote, listed, deleted, and files brought there and back.

A write names the generation that it replaces (0: there must be none), so of two writers one wins. Google stores nothing
whose CRC32C differs from the one sent along, and a write is one request: an object is there whole or not at all.
https://cloud.google.com/storage/docs/request-preconditions
"""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c

from model.durable import durable_file
from tasks.object_requests import PreconditionFailed, Reply, bucket_missing, send
from tasks.places import ObjectPath
from tasks.storage import StorageError

# Custom metadata that states what an object holds: read with a listing, where reading the object would take hours.
SHA256 = "sha256"
_FIELDS = "name,size,generation,crc32c,md5Hash,updated,metadata"
_UPLOAD_BYTES = 1 << 20  # read from the disk at once
_DOWNLOAD_BYTES = 16 << 20  # asked for at once: what is lost when the connection is


@dataclass(frozen=True)
class StoredObject:
    """What Google states about an object: bytes, generation, base64 CRC32C, when it was written, and our sha256 if there is one.

    md5: in hexadecimal; objects composed of others have none.
    """

    path: ObjectPath
    size: int
    generation: int
    crc32c: str
    updated: str
    sha256: str | None
    md5: str | None

    @classmethod
    def parse(cls, bucket: str, value: dict[str, Any]) -> StoredObject:
        """From an object resource of the JSON interface."""
        stated = value.get("metadata") or {}
        path = ObjectPath(bucket, str(value["name"]))
        md5 = base64.b64decode(value["md5Hash"]).hex() if "md5Hash" in value else None
        return cls(path, int(value["size"]), int(value["generation"]), value["crc32c"], str(value["updated"]), stated.get(SHA256), md5)


def read(place: ObjectPath) -> tuple[bytes, int]:
    """The content of an object and its generation. Raises FileNotFoundError, StorageError."""
    reply = send(place, "GET", "b/{}/o/{}", place.bucket, place.key, alt="media")
    if (stated := _header_crc32c(reply)) is not None:
        _check_stored(place, crc32c_of([reply.body]), stated)
    return reply.body, int(reply.headers["x-goog-generation"])


def stat(place: ObjectPath) -> StoredObject:
    """What is stored at `place`. Raises FileNotFoundError, StorageError."""
    return StoredObject.parse(place.bucket, send(place, "GET", "b/{}/o/{}", place.bucket, place.key, fields=_FIELDS).json())


def write(place: ObjectPath, data: bytes, *, generation: int | None, sha256: str | None = None) -> int:
    """Writes an object whole and returns its new generation.

    generation: the one that is replaced, 0 where there must be none, None for whatever is there. sha256: stated about it.
    Raises PreconditionFailed where another generation is there that does not hold the same, StorageError.
    """
    return _write(place, lambda: iter([data]), len(data), crc32c_of([data]), generation, sha256).generation


def upload(file: Path, place: ObjectPath, *, sha256: str, generation: int | None) -> StoredObject:
    """Brings a file into a bucket, read in parts, as one request; otherwise as `write`."""
    return _write(place, lambda: _parts_of(file), file.stat().st_size, crc32c_of(_parts_of(file)), generation, sha256)


def _write(
    place: ObjectPath, parts: Callable[[], Iterator[bytes]], size: int, crc32c: str, generation: int | None, sha256: str | None
) -> StoredObject:
    resource = {"name": place.key, "crc32c": crc32c, "metadata": {SHA256: sha256} if sha256 else {}}
    boundary = uuid.uuid4().hex
    head = (
        f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{json.dumps(resource)}\r\n"
        f"--{boundary}\r\nContent-Type: application/octet-stream\r\n\r\n"
    ).encode()
    tail = f"\r\n--{boundary}--\r\n".encode()

    async def body() -> AsyncIterator[bytes]:
        yield head
        for part in parts():
            yield part
        yield tail

    headers = {"Content-Type": f"multipart/related; boundary={boundary}", "Content-Length": str(len(head) + size + len(tail))}
    asked: dict[str, Any] = {"uploadType": "multipart"} | ({} if generation is None else {"ifGenerationMatch": str(generation)})
    try:
        reply = send(place, "POST", "{base}/upload/storage/v1/b/{}/o", place.bucket, body=body, size=size, headers=headers, **asked)
    except FileNotFoundError:
        raise bucket_missing(place) from None
    except PreconditionFailed:
        # perhaps an earlier try of this very request was done and only its answer was lost
        try:
            stored = stat(place)
        except FileNotFoundError:
            stored = None
        if stored is None or (stored.crc32c, stored.size, stored.sha256) != (crc32c, size, sha256):
            raise
        return stored
    stored = StoredObject.parse(place.bucket, reply.json())
    _check_stored(place, crc32c, stored.crc32c)
    return stored


def delete(place: ObjectPath, *, generation: int | None = None) -> None:
    """Deletes an object, in this generation if given; one that is not there is left so. Raises PreconditionFailed, StorageError."""
    asked: dict[str, Any] = {} if generation is None else {"ifGenerationMatch": str(generation)}
    try:
        send(place, "DELETE", "b/{}/o/{}", place.bucket, place.key, **asked)
    except FileNotFoundError:
        return


def below(place: ObjectPath) -> dict[str, StoredObject]:
    """Every object below `place` by its name relative to it. Raises StorageError."""
    prefix = f"{place.key}/" if place.key else ""
    found: dict[str, StoredObject] = {}
    for page in _pages(place, prefix=prefix, fields=f"nextPageToken,items({_FIELDS})"):
        for item in page.get("items", ()):
            stored = StoredObject.parse(place.bucket, item)
            if not stored.path.key.endswith("/"):  # what consoles make to show an empty directory
                found[stored.path.key[len(prefix) :]] = stored
    return found


def directories_in(place: ObjectPath) -> list[ObjectPath]:
    """The names just below `place` that have objects below them, sorted. Raises StorageError."""
    prefix = f"{place.key}/" if place.key else ""
    pages = _pages(place, prefix=prefix, delimiter="/", fields="nextPageToken,prefixes")
    return sorted(ObjectPath(place.bucket, name.rstrip("/")) for page in pages for name in page.get("prefixes", ()))


def _pages(place: ObjectPath, **asked: Any) -> Iterator[dict[str, Any]]:
    token: dict[str, Any] = {}
    while True:
        try:
            page = send(place, "GET", "b/{}/o", place.bucket, **asked, **token).json()
        except FileNotFoundError:
            raise bucket_missing(place) from None
        yield page
        if "nextPageToken" not in page:
            return
        token = {"pageToken": page["nextPageToken"]}


def parts_stored(stored: StoredObject) -> Iterator[bytes]:
    """The content of an object in parts, all of one generation. Raises FileNotFoundError, StorageError."""
    place = stored.path
    for start in range(0, stored.size, _DOWNLOAD_BYTES):
        end = min(start + _DOWNLOAD_BYTES, stored.size) - 1
        headers = {"Range": f"bytes={start}-{end}"}
        asked: dict[str, Any] = {"alt": "media", "generation": str(stored.generation)}
        part = send(place, "GET", "b/{}/o/{}", place.bucket, place.key, size=_DOWNLOAD_BYTES, headers=headers, **asked).body
        if len(part) != end - start + 1:
            raise StorageError(errno.EIO, f"{place}: {len(part):,} bytes came instead of {end - start + 1:,}; run the same command again")
        yield part


def digest(stored: StoredObject, algorithm: str = SHA256) -> str:
    """The sha256, or the md5, of the content in hexadecimal, by reading all of it."""
    running = hashlib.new(algorithm)
    for part in parts_stored(stored):
        running.update(part)
    return running.hexdigest()


def download(stored: StoredObject, target: Path) -> str:
    """Brings an object to the file `target`, which appears when it is whole; returns its sha256 in hexadecimal.

    Raises FileNotFoundError, StorageError, OSError of the disk.
    """
    running, checksum = hashlib.sha256(), google_crc32c.Checksum()
    with durable_file(target) as file:
        for part in parts_stored(stored):
            running.update(part)
            checksum.update(part)
            file.write(part)
        _check_stored(stored.path, base64.b64encode(checksum.digest()).decode(), stored.crc32c)
    return running.hexdigest()


def crc32c_of(parts: Iterator[bytes] | list[bytes]) -> str:
    """The CRC32C as Google writes it: base64 of four big-endian bytes."""
    checksum = google_crc32c.Checksum()
    for part in parts:
        checksum.update(part)
    return base64.b64encode(checksum.digest()).decode()


def _parts_of(file: Path) -> Iterator[bytes]:
    with file.open("rb") as opened:
        while part := opened.read(_UPLOAD_BYTES):
            yield part


def _header_crc32c(reply: Reply) -> str | None:
    hashes = dict(entry.strip().split("=", 1) for entry in reply.headers.get("x-goog-hash", "").split(",") if entry)
    return hashes.get("crc32c")


def _check_stored(place: ObjectPath, ours: str, theirs: str) -> None:
    if ours != theirs:
        raise StorageError(errno.EIO, f"{place} changed on the way (CRC32C {theirs} instead of {ours}); run the same command again")
