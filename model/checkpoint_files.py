"""Checkpoints as files, without JAX: which there are in a directory, and whether every byte of one is as it was written.

The directory is one of this machine or in a bucket. On a disk a checkpoint states the sha256 of each file. In a bucket it states
the MD5 that Google keeps of each object, so that one listing verifies a checkpoint that would take hours to read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from model.buckets import StoredFile, in_bucket, stored_files, write_everywhere
from model.durable import sha256_of

HASHES = "hashes.json"
# Orbax rewrites these while it commits, after the hashes were taken.
COMMIT_FILE = "commit_success.txt"
COMMIT_FILES = frozenset({"_CHECKPOINT_METADATA", COMMIT_FILE, HASHES})


class CheckpointError(ValueError):
    """No checkpoint can be used, and starting over was not asked for."""


def steps_in(directory: Path) -> list[int]:
    """The committed steps of a run's `checkpoints` directory, newest first; none where it is not there.

    On a disk a checkpoint gets its name when it is complete. In a bucket it has it from its first file on, and a last one completes it.
    """
    if not directory.is_dir():
        return []
    named = (path for path in directory.iterdir() if path.name.isdigit() and path.is_dir())
    return sorted((int(path.name) for path in named if not in_bucket(path) or (path / COMMIT_FILE).exists()), reverse=True)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path names: itself, or the newest of the run (or of its `checkpoints` directory) that verifies.

    Raises:
        CheckpointError: there is none, or none verifies; says what is wrong with each.
    """
    if (path / HASHES).is_file():
        candidates = [path]
    else:
        directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        candidates = [directory / str(step) for step in steps_in(directory)] if directory.is_dir() else []
    damages: list[str] = []
    for candidate in candidates:
        if (damage := checkpoint_damage(candidate)) is None:
            return candidate
        damages.append(damage)
    if damages:
        raise CheckpointError(f"no checkpoint in {path} can be used: {'; '.join(damages)}")
    raise CheckpointError(f"{path} is no checkpoint and holds none: give a run's directory (.../checkpoints/NAME-...), or one step's in it")


def write_hashes(directory: Path) -> None:
    """Writes down every file of a checkpoint that is about to be committed."""
    if in_bucket(directory):
        stored = sorted(stored_files(directory).items())
        files = [{"path": name, "bytes": file.size, "md5": file.md5} for name, file in stored if name not in COMMIT_FILES]
    else:
        paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.name not in COMMIT_FILES)
        files = [{"path": str(path.relative_to(directory)), "bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in paths]
    write_everywhere(directory / HASHES, {"schema": 1, "files": files})


def checkpoint_damage(directory: Path) -> str | None:
    """What is wrong with one committed checkpoint directory, or None when every byte is as written."""
    try:
        files = json.loads((directory / HASHES).read_text())["files"]
        recorded = [(str(file["path"]), int(file["bytes"]), _stated_digest(file)) for file in files]
    except FileNotFoundError:
        return f"{directory / HASHES} is missing"
    except (KeyError, TypeError, ValueError):
        return f"{directory / HASHES} cannot be read"
    if not recorded:
        return f"{directory / HASHES} lists no files"
    stored = stored_files(directory) if in_bucket(directory) else None
    for name, size, (algorithm, digest) in recorded:
        found = _found(directory / name) if stored is None else stored.get(name)
        if found is None:
            return f"{directory / name} is missing"
        if found.size != size:
            return f"{directory / name} has {found.size} bytes instead of {size}"
        if (found.md5 if algorithm == "md5" and found.md5 else _digest(directory / name, algorithm)) != digest:
            return f"{directory / name} has another content than was written ({algorithm} differs)"
    return None


def _stated_digest(file: Mapping[str, object]) -> tuple[str, str]:
    algorithm = "sha256" if "sha256" in file else "md5"
    return algorithm, str(file[algorithm])


def _found(path: Path) -> StoredFile | None:
    return StoredFile(path.stat().st_size, None) if path.is_file() else None


def _digest(path: Path, algorithm: str) -> str:
    """Of a checkpoint that was copied between a disk and a bucket: its files are read, whatever they state."""
    running = hashlib.new(algorithm)
    with path.open("rb") as file:
        while part := file.read(16 << 20):
            running.update(part)
    return running.hexdigest()
