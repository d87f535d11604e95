"""An artifact in a bucket: objects below one prefix, and its copy on this machine, where it is made and read.

A file's object states the sha256 of what it holds, so that one listing compares an artifact with its manifest. Every
write names the generation it replaces: a process that was replaced while it was suspended changes nothing any more.
"""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from model.durable import write_durably
from tasks import objects
from tasks.local_artifact import LocalArtifact
from tasks.manifests import (
    DISCARDED,
    DISCARDED_REASON,
    MANIFEST,
    Damage,
    DamagedObject,
    FileEntry,
    Manifest,
    check_size,
    manifest_path,
    other_contents,
)
from tasks.object_requests import PreconditionFailed
from tasks.objects import StoredObject
from tasks.places import CACHE_VARIABLE, ObjectPath, Place, cache_directory, working_directory
from tasks.storage import StorageError, free_bytes, make_directory

_TRANSFERS = 8  # at once; more share the same connection to the network
_CONFLICTS = 4

# Objects without a sha256 of ours, uploaded by other means, are read once: by place, generation, algorithm
_digests: dict[tuple[ObjectPath, int, str], str] = {}


class ObjectArtifact:
    """What is below `place`. See `tasks.artifact_store.ArtifactStore` for what each method does."""

    def __init__(self, place: ObjectPath) -> None:
        self.place = place
        self.copy = LocalArtifact(working_directory(place))
        self._manifest = place / MANIFEST

    def exists(self) -> bool:
        """Whether an object is there."""
        return self.has_manifest() or bool(objects.directories_in(self.place)) or bool(objects.below(self.place))

    def children(self) -> list[Place]:
        """The prefixes just below."""
        return [child for child in objects.directories_in(self.place) if not child.name.startswith(".")]

    def has_manifest(self) -> bool:
        """Whether there is such an object."""
        try:
            return bool(objects.stat(self._manifest))
        except FileNotFoundError:
            return False

    def manifest_data(self) -> bytes:
        """The content of the object."""
        data, _ = objects.read(self._manifest)
        check_size(len(data))
        return data

    def manifest_written(self) -> int:
        """Its generation, which Google raises with time."""
        return objects.stat(self._manifest).generation

    def discarded_reason(self) -> str | None:
        """The reason as `discard` left it."""
        try:
            return objects.read(self.place / DISCARDED_REASON)[0].decode("utf-8", "replace")
        except FileNotFoundError:
            return None

    def check_writable(self) -> None:
        """An object is written and deleted, and a file on this machine."""
        self.copy.check_writable()
        probe = self.place / f".probe-{uuid4().hex}"
        objects.delete(probe, generation=objects.write(probe, b"probe", generation=0))

    def check_files(self, manifest: Manifest, *, hashes: bool, remember: bool = True) -> list[Damage]:
        """By one listing; objects are read where they do not state what they hold, and all of them where not `remember`."""
        stored = objects.below(self.place)

        def problem(entry: FileEntry) -> str | None:
            found = stored.get(entry.path)
            if found is None:
                return "is missing"
            if found.size != entry.bytes:
                return f"has {found.size:,} bytes instead of {entry.bytes:,}"
            return other_contents(entry) if hashes and _digest(found, entry.algorithm, remember) != entry.digest else None

        found = zip(manifest.files, _in_parallel([partial(problem, entry) for entry in manifest.files]), strict=True)
        return [Damage(entry.path, wrong) for entry, wrong in found if wrong is not None]

    def is_started(self) -> bool:
        """Whether there is anything in the copy."""
        return self.copy.is_started()

    def prepare(self) -> None:
        """The copy is no artifact: a manifest that is left in it is of another time."""
        self.copy.prepare()
        manifest_path(self.copy.base).unlink(missing_ok=True)

    def publish(self, manifest: Manifest, still_owner: Callable[[], None] | None) -> None:
        """Files that are there already are not sent again, so an upload that was interrupted goes on."""
        stored = objects.below(self.place)
        _in_parallel([partial(self._upload, entry, stored.get(entry.path), still_owner) for entry in manifest.copied().files])
        if still_owner is not None:
            still_owner()
        if damages := self.check_files(manifest, hashes=True):
            raise StorageError(errno.EIO, f"{self.place} was changed while it was written: {damages[0]}. Run the same command again")
        try:
            objects.write(self._manifest, manifest.to_json(), generation=0)
        except PreconditionFailed:
            raise StorageError(
                errno.EEXIST, f"{self.place} was committed by another process meanwhile; run the same command again: it is reused"
            ) from None
        for leftover in (DISCARDED, DISCARDED_REASON):
            if leftover in stored:
                objects.delete(self.place / leftover)
        self.copy.publish(manifest, None)

    def _upload(self, entry: FileEntry, known: StoredObject | None, still_owner: Callable[[], None] | None) -> None:
        for _ in range(_CONFLICTS):
            if known is not None and (known.size, known.sha256) == (entry.bytes, entry.digest):
                return
            generation = 0 if known is None else known.generation
            try:
                objects.upload(self.copy.base / entry.path, self.place / entry.path, sha256=entry.digest, generation=generation)
            except PreconditionFailed:
                if still_owner is not None:
                    still_owner()
                known = objects.below(self.place).get(entry.path)
            else:
                return
        raise StorageError(errno.EBUSY, f"{self.place / entry.path} is being written by another process; stop it, then run this again")

    def bring(self, manifest: Manifest) -> Path:
        """By hash where the copy is not known to be this artifact, by size where it is; only what is missing travels."""
        with _alone(self.copy.base):
            return self._bring(manifest)

    def _bring(self, manifest: Manifest) -> Path:
        base, data, copied = self.copy.base, manifest.to_json(), manifest.copied()
        if self._is_copied(data) and not self.copy.check_files(copied, hashes=False):
            return base
        self.prepare()
        missing = {damage.file for damage in self.copy.check_files(copied, hashes=True)}
        entries = [entry for entry in manifest.files if entry.path in missing]
        with self._discarding_what_is_damaged():
            stored = objects.below(self.place)
            if absent := [entry.path for entry in entries if entry.path not in stored]:
                raise DamagedObject(f"{absent[0]} is missing")
            _check_space(self.place, sum(entry.bytes for entry in entries), base)
            self.copy.remove(Damage(entry.path, "") for entry in entries)
            _in_parallel([partial(self._download, entry, stored[entry.path]) for entry in entries])
        write_durably(manifest_path(base), data)
        return base

    def _is_copied(self, data: bytes) -> bool:
        try:
            return self.copy.manifest_data() == data
        except OSError:
            return False

    def _download(self, entry: FileEntry, stored: StoredObject) -> None:
        target = self.copy.base / entry.path
        make_directory(target.parent)
        if stored.size != entry.bytes or objects.download(stored, target) != entry.digest:
            target.unlink(missing_ok=True)
            raise DamagedObject(f"{entry.path} {other_contents(entry)}")

    @contextmanager
    def _discarding_what_is_damaged(self) -> Iterator[None]:
        """What is found wrong only when it is read must be a miss for the next run."""
        try:
            yield
        except DamagedObject as error:
            self.discard(f"its files are damaged: {error}")
            raise

    def discard(self, reason: str) -> None:
        """The manifest is copied, then deleted in the generation that was copied."""
        try:
            data, generation = objects.read(self._manifest)
        except FileNotFoundError:
            return
        objects.write(self.place / DISCARDED, data, generation=None)
        objects.write(self.place / DISCARDED_REASON, reason.encode(), generation=None)
        try:
            objects.delete(self._manifest, generation=generation)
        except PreconditionFailed:
            return  # committed anew meanwhile: that is another artifact than the damaged one

    def remove(self, damages: Iterable[Damage]) -> bool:
        """Here and there. What the copy has is compared too, for the step continues with it."""
        for damage in damages:
            if damage.file != MANIFEST:
                objects.delete(self.place / damage.file)
        here = LocalArtifact(self.copy.base)
        if (manifest := _read(here)) is not None:
            here.remove(here.check_files(manifest.copied(), hashes=True))
        return True

    def empty(self) -> None:
        """The manifest first, so that a crash leaves no artifact with holes."""
        objects.delete(self._manifest)
        _in_parallel([partial(objects.delete, stored.path) for stored in objects.below(self.place).values()])
        self.copy.empty()


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """One at a time brings files into `directory`: steps that run side by side share their inputs."""
    make_directory(directory.parent)
    with (directory.parent / f".{directory.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(copy: LocalArtifact) -> Manifest | None:
    try:
        return Manifest.model_validate_json(copy.manifest_data())
    except (OSError, ValueError):
        return None


def _digest(stored: StoredObject, algorithm: str, remember: bool) -> str:
    if not remember:
        return objects.digest(stored, algorithm)
    stated = stored.sha256 if algorithm == objects.SHA256 else stored.md5
    if stated is not None:
        return stated
    key = (stored.path, stored.generation, algorithm)
    if key not in _digests:
        _digests[key] = objects.digest(stored, algorithm)
    return _digests[key]


def _check_space(place: ObjectPath, needed: int, base: Path) -> None:
    free = free_bytes(base)
    if needed > free:
        raise StorageError(
            errno.ENOSPC,
            f"the files of {place} need {needed:,} more bytes below {cache_directory()}, and {free:,} are free: free some space, or set "
            f"{CACHE_VARIABLE} to a directory on a larger disk",
        )


def _in_parallel(jobs: list[Callable[[], Any]]) -> list[Any]:
    """Does all jobs on threads; raises what the first one that failed raised, when those that had begun are done."""
    with ThreadPoolExecutor(_TRANSFERS, thread_name_prefix="objects") as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
