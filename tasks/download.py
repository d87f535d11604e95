"""The download step: a copy of each source file, checked, with a record of where it came from."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from model.durable import remove_temporaries, write_json
from tasks.artifacts import Artifact
from tasks.caching import run_logger, step_task
from tasks.data_steps import RawFiles
from tasks.formatting import size
from tasks.progress import StepProgress
from tasks.sources import DataError, SourceFile, check_file_name, public_location
from tasks.sources.local_files import is_local
from tasks.sources.parallel_jobs import Control, in_parallel
from tasks.sources.transfer import WORKERS, Transfer, hash_file
from tasks.steps import Step
from tasks.storage import StorageError, free_bytes

FILES = "files"
PROVENANCE = "provenance.json"
# What an unfinished download has, a line a file; its content goes into the provenance in the end.
_LEDGER = ".fetched.jsonl"
# Copying less than this from a disk is over before a bar is seen.
_SHOWN_BYTES = 64 << 20


def download_body(step: Step, directory: Path, inputs: tuple[Artifact, ...]) -> dict[str, Any]:
    """Brings the files of `step.config` into `directory/files`, keeping those that are there and have the right content.

    Each file appears whole or not at all, and what has arrived of it is not fetched again, so the step can be killed at
    any moment and goes on from there.

    Raises:
        DataError: a file has a name that leaves the directory, cannot be had, or is not what was planned.
        StorageError: there is too little space, said before it starts.
        ChildStopped: the run is stopped.
    """
    config = step.config
    assert isinstance(config, RawFiles)
    targets = [directory / FILES / check_file_name(file.name) for file in config.files]
    for parent in {target.parent for target in targets}:
        parent.mkdir(parents=True, exist_ok=True)
        remove_temporaries(parent)
    _check_space(step.name, config.files, targets, directory)
    known = _records(directory)
    control = Control(f"the download of {step.name}")
    with _Report(f"download {step.name}", config.files) as report, Transfer(control, told=report.tell, on_bytes=report.add) as transfer:
        jobs = [
            partial(_obtain, transfer, control, report.add, known.get(file.name), file, target)
            for file, target in zip(config.files, targets, strict=True)
        ]
        made: dict[int, _Record] = {}
        try:
            with (
                (directory / _LEDGER).open("a", encoding="utf-8") as ledger,
                closing(in_parallel(jobs, control, workers=WORKERS, tick=report.show)) as done,
            ):
                for index, record in done:
                    made[index] = record
                    _append(ledger, record)
        except DataError as error:
            raise DataError(f"dataset {step.name!r}: {error}") from None
    records = [made[index] for index in range(len(config.files))]
    _remove_others(directory / FILES, {file.name for file in config.files})
    _write_provenance(step.name, config, records, directory / PROVENANCE)
    (directory / _LEDGER).unlink()
    fetched = sum(record.fetched for record in records)
    kept = sum(record.kept for record in records)
    if not all(is_local(file.location) for file in config.files):
        run_logger().info("%s: %d files, %s fetched, %d files kept", step.name, len(records), size(fetched), kept)
    return {"files": len(records), "bytes": sum(record.bytes for record in records), "files_kept": kept, "bytes_fetched": fetched}


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
        for copy, file in zip(copies, config.files, strict=False):
            if file.location:  # an adopted artifact has no originals
                message = message.replace(str(copy), public_location(file.location))
        raise DataError(message) from None


@dataclass(frozen=True)
class _Record:
    """A file that is here: `retrieved` is when it came (UTC); `kept` and `fetched` are about this run."""

    name: str
    bytes: int
    sha256: str
    retrieved: str
    kept: bool = False
    fetched: int = 0

    def facts(self) -> dict[str, Any]:
        return {"name": self.name, "bytes": self.bytes, "sha256": self.sha256, "retrieved": self.retrieved}


def _obtain(
    transfer: Transfer, control: Control, on_bytes: Callable[[int], None], known: _Record | None, file: SourceFile, target: Path
) -> _Record:
    """The file at `target`: kept where it is the right one by its published digest, or by the one found when it came."""
    expected, size = (file.sha256, file.bytes) if file.sha256 or known is None else (known.sha256, known.bytes)
    if expected is not None and target.is_file():
        count = target.stat().st_size
        if size in (None, count) and hash_file(target, control) == expected:
            on_bytes(count)
            return _Record(file.name, count, expected, known.retrieved if known else _now(), kept=True)
    digest, fetched = transfer.bring(file, target)
    return _Record(file.name, target.stat().st_size, digest, _now(), fetched=fetched)


class _Report:
    """Progress over all files, and lines about tries that failed. Threads hand in, the step's own thread shows."""

    def __init__(self, label: str, files: tuple[SourceFile, ...]) -> None:
        sizes = [file.bytes for file in files if file.bytes is not None]
        shown = sum(sizes) >= _SHOWN_BYTES or not all(is_local(file.location) for file in files)
        total = sum(sizes) if len(sizes) == len(files) else None
        self._progress = StepProgress(label, total) if shown else None
        self._context = self._progress or nullcontext()
        self._lock = threading.Lock()
        self._bytes = 0
        self._lines: list[str] = []

    def __enter__(self) -> _Report:
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.show()
        self._context.__exit__(*error)

    def add(self, count: int) -> None:
        """Takes bytes; fewer than 0 for bytes that arrived in vain."""
        with self._lock:
            self._bytes += count

    def tell(self, line: str) -> None:
        """Takes a line."""
        with self._lock:
            self._lines.append(line)

    def show(self) -> None:
        """Shows what was taken since the last time."""
        with self._lock:
            count, self._bytes = self._bytes, 0
            lines, self._lines = self._lines, []
        for line in lines:
            run_logger().warning(line)
        if self._progress is not None and count:
            self._progress.advance(count)


def _check_space(dataset: str, files: tuple[SourceFile, ...], targets: list[Path], directory: Path) -> None:
    """Raises StorageError where the files that are not here yet need more than is free."""
    needed = 0
    for file, target in zip(files, targets, strict=True):
        part = target.with_name(f".{target.name}.part")
        there = target.stat().st_size if target.is_file() else part.stat().st_size if part.is_file() else 0
        needed += max((file.bytes or 0) - there, 0)
    free = free_bytes(directory)
    if needed > free:
        raise StorageError(
            errno.ENOSPC,
            f"dataset {dataset!r}: its files need {needed:,} more bytes in {directory}, and {free:,} are free. "
            "Free some space or choose another --root, then run the same command again: it continues where it stopped",
        )


def _records(directory: Path) -> dict[str, _Record]:
    """What is known of files that came earlier, from the ledger of an unfinished download or the provenance of a finished one."""
    entries: list[Any] = []
    try:
        entries += json.loads((directory / PROVENANCE).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        entries.clear()
    try:
        lines = (directory / _LEDGER).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    records: dict[str, _Record] = {}
    for entry in (*entries, *lines):
        try:
            value = json.loads(entry) if isinstance(entry, str) else entry
            record = _Record(str(value["name"]), int(value["bytes"]), str(value["sha256"]), str(value["retrieved"]))
        except (ValueError, KeyError, TypeError):
            continue  # the line that a killed process was writing
        records[record.name] = record
    return records


def _append(ledger: Any, record: _Record) -> None:
    ledger.write(json.dumps(record.facts()) + "\n")
    ledger.flush()
    os.fsync(ledger.fileno())


def _remove_others(directory: Path, names: set[str]) -> None:
    for path in directory.rglob("*"):
        if path.is_file() and path.relative_to(directory).as_posix() not in names:
            path.unlink()


def _write_provenance(dataset: str, config: RawFiles, records: list[_Record], path: Path) -> None:
    """Records what each file is, where it came from and when; with no secret that was in a URL."""
    files = [
        {**record.facts(), "version": file.version, "source": public_location(file.location)}
        for file, record in zip(config.files, records, strict=True)
    ]
    record = {"dataset": dataset, "revision": config.revision, "licence": config.licence, "homepage": config.homepage, "files": files}
    write_json(path, record)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


download = step_task(description="Bring a dataset's files here and check them")(download_body)
