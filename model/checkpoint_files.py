"""Checkpoints as files, without JAX: which there are in a directory, and whether every byte of one is as it was written."""

from __future__ import annotations

import json
from pathlib import Path

from model.durable import sha256_of, write_json

HASHES = "hashes.json"
# Orbax rewrites these while it commits, after the hashes were taken.
COMMIT_FILES = frozenset({"_CHECKPOINT_METADATA", "commit_success.txt", HASHES})


class CheckpointError(ValueError):
    """No checkpoint can be used, and starting over was not asked for."""


def steps_in(directory: Path) -> list[int]:
    """The steps of a run's `checkpoints` directory, newest first."""
    return sorted((int(path.name) for path in directory.iterdir() if path.is_dir() and path.name.isdigit()), reverse=True)


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
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.name not in COMMIT_FILES)
    files = [{"path": path.relative_to(directory).as_posix(), "bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in paths]
    write_json(directory / HASHES, {"schema": 1, "files": files})


def checkpoint_damage(directory: Path) -> str | None:
    """What is wrong with one committed checkpoint directory, or None when every byte is as written."""
    try:
        files = json.loads((directory / HASHES).read_text(encoding="utf-8"))["files"]
        recorded = [(directory / str(file["path"]), int(file["bytes"]), str(file["sha256"])) for file in files]
    except FileNotFoundError:
        return f"{directory / HASHES} is missing"
    except (KeyError, TypeError, ValueError):
        return f"{directory / HASHES} cannot be read"
    if not recorded:
        return f"{directory / HASHES} lists no files"
    for path, size, sha256 in recorded:
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes instead of {size}"
        if sha256_of(path) != sha256:
            return f"{path} has another content than was written (sha256 differs)"
    return None
