"""Artifacts: directories whose `manifest.json`, written last, is the only truth about what they hold.

No manifest, no artifact. Sizes are verified at every use, hashes at the first use in a process.
"""

from __future__ import annotations

import os
import platform
import stat
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from tasks.artifact_store import artifact_store
from tasks.fingerprints import canonical_value, plain_value
from tasks.manifests import (
    MANIFEST,
    Damage,
    DamagedObject,
    FileEntry,
    Manifest,
    check,
    check_files,
    digest_once,
    load_manifest,
    manifest_path,
    read_manifest,
)
from tasks.places import Place, absolute, place_of, working_directory
from tasks.steps import Step
from tasks.storage import StorageError, storage_errors, sync_directory, sync_file

__all__ = [
    "Artifact",
    "ArtifactDamaged",
    "ArtifactError",
    "ArtifactMissing",
    "Damage",
    "FileEntry",
    "Manifest",
    "StorageError",
    "brought_here",
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


def check_writable(place: str | Place) -> None:
    """Proves that artifacts can be written at `place`, creating a directory; raises StorageError with the remedy if not."""
    artifact_store(place).check_writable()


def open_artifact(directory: str | Place, fingerprint: str) -> Artifact:
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
    return Artifact(kind=manifest.kind, name=manifest.name, path=str(absolute(place_of(directory))), fingerprint=fingerprint)


def brought_here(artifact: Artifact) -> Artifact:
    """The artifact with its files in a directory of this machine, which `path` then is.

    What lies in a bucket is copied below the cache, compared with the manifest by hash when it comes and by size when it
    is there. Raises ArtifactMissing, ArtifactDamaged, StorageError.
    """
    manifest, reason = load_manifest(artifact.path)
    if manifest is None or manifest.fingerprint != artifact.fingerprint:
        raise ArtifactMissing(f"the artifact in {artifact.path} is gone: {reason or 'another was put there'}. Run the same command again")
    try:
        directory = artifact_store(artifact.path).bring(manifest)
    except DamagedObject as error:
        raise ArtifactDamaged(
            f"the artifact in {artifact.path} is damaged: {error}. Run the same command again: it rebuilds this step"
        ) from None
    return artifact.model_copy(update={"path": str(directory.absolute())})


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
    directory: str | Place,
    step: Step,
    *,
    files: Iterable[str | Path] | None = None,
    stored: Iterable[FileEntry] = (),
    stats: dict[str, Any],
    still_owner: Callable[[], None] | None = None,
) -> Artifact:
    """Hashes and fsyncs the files, then makes them an artifact by writing the manifest, last and at once.

    directory: where the artifact is to lie. In a bucket, the files are in its working directory and are brought there.
    files: paths inside the directory, relative or absolute; by default `list_files(directory)`.
    stored: files that are in the bucket already and only there.
    still_owner: raises if this process has meanwhile lost the right to write here; called just before the manifest appears.
    Raises ArtifactError for a file outside `directory`, StorageError for a full or read-only disk.
    """
    place = place_of(directory)
    base = working_directory(place)
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
        files=[*entries, *stored],
        stats=plain_stats,
        created_by=_created_by(),
    )
    artifact_store(place).publish(manifest, still_owner)
    return Artifact(kind=step.kind, name=step.name, path=str(absolute(place)), fingerprint=step.fingerprint)


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


def discard_manifest(directory: str | Place, reason: str) -> None:
    """Moves a manifest aside, durably, so that nothing uses the artifact any more; `explain_miss` repeats the reason."""
    artifact_store(directory).discard(reason)


def discard_damaged(directory: str | Place, damages: Iterable[Damage], reason: str) -> None:
    """Removes the damaged files, then discards the manifest: a step that continues must not take them for its own work.

    In this order, so that a crash in between leaves a manifest that still states what is missing. Of an adopted artifact
    only the link is removed, never the data it leads to.
    """
    if artifact_store(directory).remove(damages):
        discard_manifest(directory, reason)


def empty_directory(directory: str | Place) -> None:
    """Makes `directory` empty, and what of it is on this machine; of an adopted artifact only the link is removed."""
    artifact_store(directory).empty()
