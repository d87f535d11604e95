"""Verifies what lies on disk against its manifests, and adopts data that was made elsewhere as an artifact."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from model.config_base import Config
from tasks.artifact_store import artifact_store
from tasks.artifacts import Artifact, ArtifactError, commit, list_files
from tasks.fingerprints import fingerprint
from tasks.manifests import Damage, Manifest, check_files, digest_once, load_manifest, manifest_path
from tasks.places import Place, place_of, working_directory
from tasks.steps import Step
from tasks.storage import make_directory, storage_errors, sync_directory

_ARTIFACT_NAME = re.compile(r".+-[0-9a-f]{16}")
# {root}/{kind}/{name}-{fingerprint}: from a root, artifacts are two levels down
_LEVELS = 2


@dataclass(frozen=True)
class Verified:
    """One artifact after hashing: its directory, what it states it is, how much was read, and what is wrong with it."""

    directory: Place
    manifest: Manifest | None
    damages: tuple[Damage, ...]

    @property
    def size(self) -> int:
        """Bytes that the manifest states, 0 without one."""
        return 0 if self.manifest is None else sum(entry.bytes for entry in self.manifest.files)

    def __str__(self) -> str:
        if self.damages:
            return f"DAMAGED {self.directory}: " + "; ".join(map(str, self.damages))
        files = 0 if self.manifest is None else len(self.manifest.files)
        return f"ok {self.directory}: {files} files, {self.size:,} bytes"


@dataclass(frozen=True)
class TreeReport:
    """Every artifact found under a path, and the directories that look like one but were never finished."""

    artifacts: tuple[Verified, ...]
    unfinished: tuple[Place, ...]

    @property
    def ok(self) -> bool:
        """Whether something was verified and nothing was damaged."""
        return bool(self.artifacts) and not any(artifact.damages for artifact in self.artifacts)

    def __str__(self) -> str:
        lines = [str(artifact) for artifact in self.artifacts]
        lines += [f"unfinished {path}: no manifest, so nothing uses it" for path in self.unfinished]
        return "\n".join(lines) or "no artifact found"


def verify_tree(path: str | Place) -> TreeReport:
    """Hashes every file of the artifact at `path`, or of all artifacts under the root or kind directory at `path`.

    Nothing is taken from memory: each file is read now. Raises ArtifactError when `path` is not a directory, nor a place in
    a bucket with anything below it.
    """
    base = place_of(path)
    if not artifact_store(base).exists():
        raise ArtifactError(f"there is no directory {base}: give the directory of an artifact, or the --root of a run")
    artifacts: list[Verified] = []
    unfinished: list[Place] = []
    for directory in _candidates(base, _LEVELS):
        if artifact_store(directory).has_manifest():
            artifacts.append(_verify(directory))
        else:
            unfinished.append(directory)
    return TreeReport(tuple(artifacts), tuple(unfinished))


def _candidates(directory: Place, levels: int) -> Iterator[Place]:
    store = artifact_store(directory)
    children = store.children()
    if store.has_manifest():
        yield directory
        yield from (child for child in children if artifact_store(child).has_manifest())
    elif _ARTIFACT_NAME.fullmatch(directory.name):
        yield directory
    elif levels:
        for child in children:
            yield from _candidates(child, levels - 1)


def _verify(directory: Place) -> Verified:
    manifest, reason = load_manifest(directory)
    if manifest is None:
        return Verified(directory, None, (Damage("manifest.json", reason),))
    return Verified(directory, manifest, tuple(check_files(directory, manifest, hashes=True, remember=False)))


class Adopted(Config):
    """The configuration of an adopted artifact: its identity is its content."""

    content: str
    """The sha256 over the paths, sizes and sha256 of its files."""


def adopt(
    path: str | Path, root: str | Place, kind: str, name: str, provenance: Mapping[str, str], *, step: Step | None = None
) -> Artifact:
    """Registers the existing data in the directory `path` as a finished artifact; nothing is copied or moved.

    The manifest is written into `path`, and the artifact's place under `root` becomes a link to it, unless it already is
    that place. provenance: where the data came from, kept in the manifest's stats. step: the step whose result this is;
    by default one identified by the content. Raises ArtifactError if `root` is in a bucket, if `path` is empty or is
    already an artifact, or if another artifact lies in its place.
    """
    base, root = Path(path).absolute(), place_of(root)
    if not isinstance(root, Path):
        raise ArtifactError(f"cannot adopt {base} below {root}: in a bucket there are no links; adopt it in a directory")
    if not base.is_dir():
        raise ArtifactError(f"cannot adopt {base}: it is not a directory")
    if os.path.lexists(manifest_path(base)):
        manifest, reason = load_manifest(base)
        known = f"{manifest.kind}/{manifest.name} {manifest.fingerprint[:16]}" if manifest else f"a manifest that {reason}"
        raise ArtifactError(f"cannot adopt {base}: it already has a manifest.json ({known}); verify it instead, or remove that file")
    files = list(list_files(base))
    if not files:
        raise ArtifactError(f"cannot adopt {base}: there is no file in it")
    content = fingerprint([[file, (base / file).stat().st_size, digest_once(base / file)] for file in files])
    step = step or Step(kind, name, Adopted(content=content))
    if (step.kind, step.name) != (kind, name):
        raise ArtifactError(f"cannot adopt {base} as {kind}/{name}: the step given is {step.kind}/{step.name}")
    place = working_directory(step.directory(root))
    _link(place, base)
    size = sum((base / file).stat().st_size for file in files)
    stats = {"provenance": dict(provenance), "content": content, "files": len(files), "bytes": size}
    adopted = commit(base, step, files=files, stats=stats)
    return adopted.model_copy(update={"path": str(place.absolute())})


def _link(place: Path, base: Path) -> None:
    """Makes `place` lead to `base`: before the manifest is written, so that a crash in between can simply be repeated."""
    if os.path.lexists(place):
        if place.resolve() != base.resolve():
            raise ArtifactError(f"cannot adopt {base}: {place} already exists and is something else; remove it first")
        return
    make_directory(place.parent)
    with storage_errors(place):
        place.symlink_to(base, target_is_directory=True)
        sync_directory(place.parent)
