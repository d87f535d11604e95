"""Artifacts: directories whose `manifest.json`, written last, is the only truth about what they hold.

No manifest, no artifact. Sizes are verified at every use, hashes at the first use in a process.
"""

from __future__ import annotations

import glob
import os
import platform
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from tasks.fingerprints import canonical_value, plain_value
from tasks.manifests import (
    DISCARDED,
    DISCARDED_REASON,
    MANIFEST,
    Damage,
    FileEntry,
    Manifest,
    check,
    check_files,
    digest_once,
    load_manifest,
    manifest_path,
    read_manifest,
)
from tasks.steps import Step
from tasks.storage import StorageError, check_writable, storage_errors, sync_directory, sync_file, write_temporary

__all__ = [
    "Artifact",
    "ArtifactDamaged",
    "ArtifactError",
    "ArtifactMissing",
    "Damage",
    "FileEntry",
    "Manifest",
    "StorageError",
    "check",
    "check_writable",
    "commit",
    "discard_damaged",
    "discard_manifest",
    "empty_directory",
    "list_files",
    "load_manifest",
    "open_artifact",
    "read_manifest",
]


class ArtifactError(ValueError):
    """Something about an artifact that the person running the step has to know; the message has the remedy."""


class ArtifactMissing(ArtifactError):
    """There is no committed artifact with the wanted fingerprint in the directory."""


class ArtifactDamaged(ArtifactError):
    """A committed artifact whose files are not what its manifest states; the message names each bad file."""


class Artifact(BaseModel):
    """A finished step as it is handed to the next one: small, JSON only, `path` being the directory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    name: str
    path: str
    fingerprint: str = Field(pattern=r"^[0-9a-f]{64}$")


def open_artifact(directory: str | Path, fingerprint: str) -> Artifact:
    """The committed artifact in `directory`, verified.

    Raises ArtifactMissing when it is not committed with this fingerprint, ArtifactDamaged naming each bad file.
    """
    manifest, reason = load_manifest(directory)
    if manifest is None or manifest.fingerprint != fingerprint:
        why = Damage(MANIFEST, reason if manifest is None else f"holds the fingerprint {manifest.fingerprint[:16]}")
        raise ArtifactMissing(f"no artifact {fingerprint[:16]} in {directory}: {why}. Run the step that makes it again")
    if damages := check_files(directory, manifest, hashes=True):
        names = "; ".join(map(str, damages[:8])) + (f"; and {len(damages) - 8} more" if len(damages) > 8 else "")
        raise ArtifactDamaged(f"the artifact in {directory} is damaged: {names}. Run the same command again: it rebuilds this step")
    return Artifact(kind=manifest.kind, name=manifest.name, path=str(Path(directory).absolute()), fingerprint=fingerprint)


def list_files(directory: str | Path) -> Iterator[str]:
    """The paths, relative and sorted, of what belongs to the artifact in `directory`.

    Left out: the manifest, names that begin with a dot, and subdirectories that have a manifest of their own. A symbolic
    link or special file raises ArtifactError, since what it points at can change behind the manifest's back.
    """
    with os.scandir(directory) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        if entry.name.startswith(".") or entry.name == MANIFEST:
            continue
        if entry.is_dir(follow_symlinks=False):
            if not manifest_path(entry.path).exists():
                yield from (f"{entry.name}/{path}" for path in list_files(entry.path))
        elif entry.is_file(follow_symlinks=False):
            yield entry.name
        else:
            raise ArtifactError(f"{entry.path} is a link or a special file: an artifact holds regular files only, so copy it there")


def commit(
    directory: str | Path,
    step: Step,
    *,
    files: Iterable[str | Path] | None = None,
    stats: dict[str, Any],
    still_owner: Callable[[], None] | None = None,
) -> Artifact:
    """Hashes and fsyncs the files, then makes them an artifact by writing the manifest, last and in one rename.

    files: paths inside `directory`, relative or absolute; by default `list_files(directory)`.
    still_owner: raises if this process has meanwhile lost the right to write here; called just before the rename.
    Raises ArtifactError for a file outside `directory`, StorageError for a full or read-only disk.
    """
    base = Path(directory)
    # before the hashing, which can take hours: a statistic that is no JSON is a mistake in the step's body
    plain_stats = plain_value(stats, "stats")
    listed = list_files(base) if files is None else sorted({_relative(base, Path(file)) for file in files})
    with storage_errors(base):
        entries = [_seal(base, path) for path in listed]
        parents = {parent for entry in entries for parent in PurePosixPath(entry.path).parents}
        for parent in sorted(parents, key=lambda path: len(path.parts), reverse=True):
            sync_directory(base / parent)
    manifest = Manifest(
        kind=step.kind,
        name=step.name,
        fingerprint=step.fingerprint,
        config=canonical_value(step.config),
        upstream=[upstream.fingerprint for upstream in step.upstream],
        code_version=step.code_version,
        files=entries,
        stats=plain_stats,
        created_by=_created_by(),
    )
    _write_manifest(base, manifest, still_owner)
    return Artifact(kind=step.kind, name=step.name, path=str(base.absolute()), fingerprint=step.fingerprint)


def _write_manifest(base: Path, manifest: Manifest, still_owner: Callable[[], None] | None) -> None:
    temporary = write_temporary(base, manifest.to_json())
    try:
        if still_owner is not None:
            still_owner()
        with storage_errors(base):
            os.replace(temporary, manifest_path(base))
            sync_directory(base)
            sync_directory(base.absolute().parent)
    finally:
        temporary.unlink(missing_ok=True)
    for leftover in (base / DISCARDED, base / DISCARDED_REASON, *base.glob(".tmp-*")):
        leftover.unlink(missing_ok=True)


def _relative(base: Path, file: Path) -> str:
    inside = Path(os.path.relpath(file, base)) if file.is_absolute() else file
    if ".." in inside.parts or (base / inside).resolve() != base.resolve() / inside:
        raise ArtifactError(f"{file} is not inside {base}, or only through a link: an artifact holds its own files")
    return inside.as_posix()


def _seal(base: Path, relative: str) -> FileEntry:
    path = base / relative
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise ArtifactError(f"{path} is not a regular file, so it cannot be part of an artifact")
    sync_file(path)
    return FileEntry(path=relative, bytes=status.st_size, sha256=digest_once(path))


def _created_by() -> dict[str, str]:
    # nothing here changes between two runs on one machine, so that equal work leaves equal bytes
    return {"program": f"prefect-llama {metadata.version('prefect-llama')}", "python": platform.python_version()}


def discard_manifest(directory: str | Path, reason: str) -> None:
    """Moves a manifest aside, durably, so that nothing uses the artifact any more; `explain_miss` repeats the reason."""
    base = Path(directory)
    with storage_errors(base):
        try:
            os.replace(manifest_path(base), base / DISCARDED)
        except (FileNotFoundError, NotADirectoryError):
            return
        sync_directory(base)
        os.replace(write_temporary(base, reason.encode()), base / DISCARDED_REASON)


def discard_damaged(directory: str | Path, damages: Iterable[Damage], reason: str) -> None:
    """Removes the damaged files, then discards the manifest: a step that continues must not take them for its own work.

    In this order, so that a crash in between leaves a manifest that still states what is missing. Of an adopted artifact
    only the link is removed, never the data it leads to.
    """
    base = Path(directory)
    with storage_errors(base):
        if base.is_symlink():
            base.unlink()
            return
        for damage in damages:
            if damage.file != MANIFEST:
                _remove_below(base, damage.file)
    discard_manifest(base, reason)


def _remove_below(base: Path, relative: str) -> None:
    path = base
    for part in PurePosixPath(relative).parts:
        path = path / part
        if path.is_symlink() or path.is_file():
            break  # a link itself, for what it leads to is not ours; or a file where a directory should be
    if path.is_dir() and not path.is_symlink():
        os.replace(path, base / f".damaged-{uuid.uuid4().hex}")
    else:
        path.unlink(missing_ok=True)
    if path.parent.is_dir():
        sync_directory(path.parent)


def empty_directory(directory: str | Path) -> None:
    """Makes `directory` empty in one rename, then deletes what was in it; of an adopted artifact only the link is removed."""
    base = Path(directory)
    with storage_errors(base):
        if base.is_symlink():
            base.unlink()
        elif base.exists():
            os.replace(base, base.parent / f".discarded-{base.name}-{uuid.uuid4().hex}")
        sync_directory(base.parent)
        for old in base.parent.glob(f".discarded-{glob.escape(base.name)}-*"):
            shutil.rmtree(old)
        base.mkdir()
