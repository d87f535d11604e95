"""The download step: a copy of each source file, checked byte by byte, with a record of where it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from model.durable import durable_file, remove_temporaries, sha256_of, write_json
from tasks.artifacts import Artifact
from tasks.caching import step_task
from tasks.data_steps import RawFiles
from tasks.sources import DataError, SourceFile, check_file_name
from tasks.steps import Step

FILES = "files"
PROVENANCE = "provenance.json"
_CHUNK = 1 << 22


def download_body(step: Step, directory: Path, inputs: tuple[Artifact, ...]) -> dict[str, Any]:
    """Copies the files of `step.config` into `directory/files`, keeping those that are there and have the right content.

    Each file appears whole or not at all, so the step can be killed at any moment and goes on from there.
    Raises DataError where a file has a name that leaves the directory, cannot be read, or is not what was planned.
    """
    config = step.config
    assert isinstance(config, RawFiles)
    if len(config.paths) != len(config.files):
        raise DataError(f"raw/{step.name}: {len(config.files)} files are planned and {len(config.paths)} paths given; plan the run again")
    kept = 0
    for file, path in zip(config.files, config.paths, strict=True):
        target = directory / FILES / check_file_name(file.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_temporaries(target.parent)
        if target.is_file() and target.stat().st_size == file.bytes and sha256_of(target) == file.sha256:
            kept += 1
        else:
            _copy(step.name, file, Path(path), target)
    _remove_others(directory / FILES, {file.name for file in config.files})
    _write_provenance(step.name, config, directory / PROVENANCE)
    return {"files": len(config.files), "bytes": sum(file.bytes for file in config.files), "files_kept": kept}


def raw_files(raw: Path, config: RawFiles) -> list[Path]:
    """Where the files of a committed raw artifact are, in their order."""
    return [raw / FILES / check_file_name(file.name) for file in config.files]


@contextmanager
def naming_originals(copies: Iterable[Path], config: RawFiles) -> Iterator[None]:
    """Errors about `copies` name the files they were copied from: those are the ones a person can mend."""
    try:
        yield
    except DataError as error:
        message = str(error)
        for copy, original in zip(copies, config.paths, strict=False):  # an adopted artifact has no originals
            message = message.replace(str(copy), original)
        raise DataError(message) from None


def _copy(dataset: str, file: SourceFile, source: Path, target: Path) -> None:
    digest, size = hashlib.sha256(), 0
    try:
        reader = source.open("rb")
    except OSError as error:
        raise DataError(f"dataset {dataset!r}: {source} cannot be read ({error.strerror}); put it back or correct the source") from None
    with reader, durable_file(target) as writer:
        while chunk := reader.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
            writer.write(chunk)
        if (size, digest.hexdigest()) != (file.bytes, file.sha256):
            raise DataError(
                f"dataset {dataset!r}: {source} changed since the run was planned ({file.bytes} bytes then, {size} now); "
                "let it rest, then run again"
            )


def _remove_others(directory: Path, names: set[str]) -> None:
    for path in directory.rglob("*"):
        if path.is_file() and path.relative_to(directory).as_posix() not in names:
            path.unlink()


def _write_provenance(dataset: str, config: RawFiles, path: Path) -> None:
    """Records where each file came from, and when. A record that says the same but for the time is left as it is."""
    record = {
        "dataset": dataset,
        "revision": config.revision,
        "files": [{**file.identity(), "source": source} for file, source in zip(config.files, config.paths, strict=True)],
    }
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        earlier = None
    if isinstance(earlier, dict) and {key: value for key, value in earlier.items() if key != "retrieved"} == record:
        return
    write_json(path, {**record, "retrieved": datetime.now(UTC).isoformat(timespec="seconds")})


download = step_task(description="Copy and check a dataset's files")(download_body)
