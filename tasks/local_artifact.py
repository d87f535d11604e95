"""An artifact in a directory of this machine: durable by fsync and rename, safe from links that lead elsewhere."""

from __future__ import annotations

import glob
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from tasks import fingerprints, manifests
from tasks.manifests import DISCARDED, DISCARDED_REASON, MANIFEST, Damage, FileEntry, Manifest, manifest_path
from tasks.places import Place
from tasks.storage import check_writable, make_directory, storage_errors, sync_directory, write_temporary


class LocalArtifact:
    """The directory `base`. See `tasks.artifact_store.ArtifactStore` for what each method does."""

    def __init__(self, base: Path) -> None:
        self.base = base

    def exists(self) -> bool:
        """Whether it is a directory."""
        return self.base.is_dir()

    def children(self) -> list[Place]:
        """Its subdirectories by name; none where it is not there."""
        if not self.base.is_dir():
            return []
        return sorted(child for child in self.base.iterdir() if child.is_dir() and not child.name.startswith("."))

    def has_manifest(self) -> bool:
        """Whether anything, a dangling link too, has the manifest's name."""
        return os.path.lexists(manifest_path(self.base))

    def manifest_data(self) -> bytes:
        """The manifest; only a regular file is one."""
        # NONBLOCK: a named pipe in the manifest's place must not hang the run
        descriptor = os.open(manifest_path(self.base), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError(0, "it is not a regular file")
            manifests.check_size(status.st_size)
            return file.read()

    def manifest_written(self) -> int:
        """The time of the manifest in nanoseconds."""
        return manifest_path(self.base).stat().st_mtime_ns

    def discarded_reason(self) -> str | None:
        """The reason as `discard` left it."""
        try:
            return (self.base / DISCARDED_REASON).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None

    def check_writable(self) -> None:
        """A file is written, fsynced and removed."""
        check_writable(self.base)

    def check_files(self, manifest: Manifest, *, hashes: bool, remember: bool = True) -> list[Damage]:
        """By size, and by sha256 where `hashes`."""
        linked: dict[PurePosixPath, bool] = {PurePosixPath("."): False}
        found = (self._check_file(entry, linked, hashes, remember) for entry in manifest.files)
        return [damage for damage in found if damage is not None]

    def _check_file(self, entry: FileEntry, linked: dict[PurePosixPath, bool], hashes: bool, remember: bool) -> Damage | None:
        path = self.base / entry.path
        try:
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode) or self._under_link(PurePosixPath(entry.path).parent, linked):
                return Damage(entry.path, "is not a regular file inside the artifact")
            if status.st_size != entry.bytes:
                return Damage(entry.path, f"has {status.st_size:,} bytes instead of {entry.bytes:,}")
            digest = manifests.digest_once if remember else fingerprints.file_digest
            if hashes and digest(path, entry.algorithm) != entry.digest:
                return Damage(entry.path, manifests.other_contents(entry))
        except (FileNotFoundError, NotADirectoryError):
            return Damage(entry.path, "is missing")
        except OSError as error:
            return Damage(entry.path, f"cannot be read: {error.strerror}")
        return None

    def _under_link(self, parent: PurePosixPath, known: dict[PurePosixPath, bool]) -> bool:
        """Whether `parent` or a directory above it, below the base, is a symbolic link; each is looked at once."""
        if parent not in known:
            known[parent] = self._under_link(parent.parent, known) or (self.base / parent).is_symlink()
        return known[parent]

    def is_started(self) -> bool:
        """Whether there is anything in it."""
        return self.base.is_dir() and any(self.base.iterdir())

    def prepare(self) -> None:
        """Creates it."""
        make_directory(self.base)

    def publish(self, manifest: Manifest, still_owner: Callable[[], None] | None) -> None:
        """One rename after the last look at the lease."""
        temporary = write_temporary(self.base, manifest.to_json())
        try:
            if still_owner is not None:
                still_owner()
            with storage_errors(self.base):
                os.replace(temporary, manifest_path(self.base))
                sync_directory(self.base)
                sync_directory(self.base.absolute().parent)
        finally:
            temporary.unlink(missing_ok=True)
        for leftover in (self.base / DISCARDED, self.base / DISCARDED_REASON, *self.base.glob(".tmp-*")):
            leftover.unlink(missing_ok=True)

    def bring(self, manifest: Manifest) -> Path:
        """It is here."""
        return self.base

    def discard(self, reason: str) -> None:
        """Two renames: the manifest away, then the reason into its place."""
        with storage_errors(self.base):
            try:
                os.replace(manifest_path(self.base), self.base / DISCARDED)
            except (FileNotFoundError, NotADirectoryError):
                return
            sync_directory(self.base)
            os.replace(write_temporary(self.base, reason.encode()), self.base / DISCARDED_REASON)

    def remove(self, damages: Iterable[Damage]) -> bool:
        """Of an adopted artifact only the link is removed, never the data it leads to."""
        with storage_errors(self.base):
            if self.base.is_symlink():
                self.base.unlink()
                return False
            for damage in damages:
                if damage.file != MANIFEST:
                    self._remove_below(damage.file)
        return True

    def _remove_below(self, relative: str) -> None:
        path = self.base
        for part in PurePosixPath(relative).parts:
            path = path / part
            if path.is_symlink() or path.is_file():
                break  # a link itself, for what it leads to is not ours; or a file where a directory should be
        if path.is_dir() and not path.is_symlink():
            os.replace(path, self.base / f".damaged-{uuid.uuid4().hex}")
        else:
            path.unlink(missing_ok=True)
        if path.parent.is_dir():
            sync_directory(path.parent)

    def empty(self) -> None:
        """One rename, then what was in it is deleted; of an adopted artifact only the link is removed."""
        base = self.base
        with storage_errors(base):
            if base.is_symlink():
                base.unlink()
            elif base.exists():
                os.replace(base, base.parent / f".discarded-{base.name}-{uuid.uuid4().hex}")
            if not base.parent.is_dir():
                make_directory(base.parent)
            sync_directory(base.parent)
            for old in base.parent.glob(f".discarded-{glob.escape(base.name)}-*"):
                shutil.rmtree(old)
            base.mkdir()
