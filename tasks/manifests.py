"""The manifest of an artifact: its shape, how it is read, and how a directory is checked against it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_serializer, model_validator

from tasks import fingerprints
from tasks.artifact_store import artifact_store
from tasks.places import Place

SCHEMA = 1
MANIFEST = "manifest.json"
DISCARDED = ".manifest.discarded.json"
DISCARDED_REASON = ".manifest.discarded.txt"
MAX_MANIFEST_BYTES = 64 << 20
# A file changed again within the clock tick of its timestamp keeps that timestamp: too young a digest is not kept.
SETTLED_NANOSECONDS = 2_000_000_000

_SHA256 = r"^[0-9a-f]{64}$"
_digests: dict[tuple[str, str, int, int, int, int], str] = {}


def identity_fingerprint(kind: str, name: str, config: Any, upstream: list[str], code_version: str) -> str:
    """The sha256 (64 hexadecimal digits) of everything that decides a result; no path, run id or secret among it.

    config: a Config (its identity fields count) or the JSON values of one. upstream: the inputs' fingerprints in order.
    """
    return fingerprints.fingerprint(
        {"schema": SCHEMA, "kind": kind, "name": name, "config": config, "upstream": upstream, "code_version": code_version}
    )


class FileEntry(BaseModel):
    """One file of an artifact: its path relative to the directory, size in bytes, and sha256 in hexadecimal.

    A file that was written straight into a bucket, as checkpoints are, has the MD5 that Google keeps of it instead, and stays there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    path: str
    bytes: int = Field(ge=0)
    sha256: str | None = Field(default=None, pattern=_SHA256)
    md5: str | None = Field(default=None, pattern=r"^[0-9a-f]{32}$")

    @model_validator(mode="after")
    def _one_digest(self) -> FileEntry:
        if (self.sha256 is None) == (self.md5 is None):
            raise ValueError(f"{self.path[:80]!r} needs a sha256 or an md5")
        return self

    @property
    def algorithm(self) -> str:
        """By what it is compared."""
        return "sha256" if self.md5 is None else "md5"

    @property
    def digest(self) -> str:
        """The digest, in hexadecimal, by `algorithm`."""
        return self.sha256 or self.md5 or ""

    @model_serializer
    def _without_the_other(self) -> dict[str, Any]:
        return {"path": self.path, "bytes": self.bytes, self.algorithm: self.digest}

    @field_validator("path")
    @classmethod
    def _stay_inside(cls, path: str) -> str:
        parts = PurePosixPath(path).parts
        if not parts or path.startswith("/") or ".." in parts or "\0" in path or str(PurePosixPath(path)) != path:
            raise ValueError(f"the path {path[:80]!r} leaves the artifact's directory")
        return path


class Manifest(BaseModel):
    """What `manifest.json` states about the directory it lies in; the fingerprint must be that of the other fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)

    schema_version: int = Field(default=SCHEMA, alias="schema", ge=SCHEMA, le=SCHEMA)
    kind: str
    name: str
    fingerprint: str = Field(pattern=_SHA256)
    config: Any
    upstream: list[str]
    code_version: str
    files: list[FileEntry]
    stats: dict[str, Any]
    created_by: dict[str, str]

    @model_validator(mode="after")
    def _fingerprint_is_its_own(self) -> Manifest:
        if self.fingerprint != identity_fingerprint(self.kind, self.name, self.config, self.upstream, self.code_version):
            raise ValueError("the fingerprint is not that of its kind, name, config, upstream and code_version")
        return self

    def copied(self) -> Manifest:
        """The manifest without the files that stay in the bucket."""
        return self.model_copy(update={"files": [entry for entry in self.files if entry.md5 is None]})

    def to_json(self) -> bytes:
        """The bytes of `manifest.json`: indented ASCII JSON with the fields in declared order."""
        return (json.dumps(self.model_dump(by_alias=True), indent=1, allow_nan=False) + "\n").encode("ascii")


@dataclass(frozen=True)
class Damage:
    """One way in which a directory differs from its manifest: `file` relative to the directory, and what is wrong."""

    file: str
    problem: str

    def __str__(self) -> str:
        return f"{self.file} {self.problem}"


class DamagedObject(ValueError):
    """An object that is not what the manifest states, found when it was brought here; the artifact is discarded by then."""


def manifest_path(directory: str | Path) -> Path:
    """The place of the manifest of the artifact in `directory`."""
    return Path(directory) / MANIFEST


def load_manifest(directory: str | Place) -> tuple[Manifest | None, str]:
    """The manifest and "", or None and why there is none: absent, torn, empty, too large, edited, of another schema.

    Read as JSON and nothing else. Anything but a regular file in its place is not a manifest.
    """
    try:
        data = artifact_store(directory).manifest_data()
    except (FileNotFoundError, NotADirectoryError):
        return None, "is missing"
    except OSError as error:
        return None, f"cannot be read: {error.strerror}"
    if not data.strip():
        return None, "is empty"
    try:
        return Manifest.model_validate(json.loads(data)), ""
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return None, f"is not a manifest of schema {SCHEMA}: {where + ': ' if where else ''}{first['msg']}"
    except (ValueError, TypeError, RecursionError):
        return None, "is not JSON (torn or overwritten)"


def check_size(size: int) -> None:
    """Raises OSError where a manifest cannot have so many bytes."""
    if size > MAX_MANIFEST_BYTES:
        raise OSError(0, f"it has {size:,} bytes, more than the {MAX_MANIFEST_BYTES:,} that a manifest can have")


def read_manifest(directory: str | Place) -> Manifest | None:
    """The manifest of the artifact in `directory`, or None when there is no usable one (`load_manifest` tells why)."""
    return load_manifest(directory)[0]


def check(directory: str | Place, fingerprint: str | None = None, *, hashes: bool) -> list[Damage]:
    """Everything in which `directory` differs from its manifest; empty when the artifact can be used.

    fingerprint: what the manifest has to carry, if given. hashes: also compare contents, where a file that was already
    hashed in this process and has not been touched since is not read again.
    """
    manifest, reason = load_manifest(directory)
    if manifest is None:
        return [Damage(MANIFEST, reason)]
    if fingerprint is not None and manifest.fingerprint != fingerprint:
        return [Damage(MANIFEST, f"holds the fingerprint {manifest.fingerprint[:16]}, not {fingerprint[:16]}")]
    return check_files(directory, manifest, hashes=hashes)


def check_files(directory: str | Place, manifest: Manifest, *, hashes: bool, remember: bool = True) -> list[Damage]:
    """The files of `directory` that are not as `manifest` states; `remember=False` reads every one of them again."""
    return artifact_store(directory).check_files(manifest, hashes=hashes, remember=remember)


def other_contents(entry: FileEntry) -> str:
    """What is said of a file that is not as `entry` states."""
    return f"has other contents than when it was committed (its {entry.algorithm} differs)"


def digest_once(path: Path, algorithm: str = "sha256") -> str:
    """The digest of the file at `path`, in hexadecimal, read once in a process for as long as the file is not touched."""
    status = path.lstat()
    # inode and ctime too: a file put in another's place with its mtime restored must be read again
    key = (algorithm, str(path.absolute()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    if key in _digests:
        return _digests[key]
    now = time.time_ns()
    digest = fingerprints.file_digest(path, algorithm)
    if now - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED_NANOSECONDS:
        _digests[key] = digest
    return digest
