"""Finds a dataset's files and identifies them by content, so that a moved corpus is the same corpus."""

from __future__ import annotations

import glob
import json
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from model.config_base import Config
from model.durable import sha256_of, write_json

PACKAGED_TEXTS = Path(__file__).resolve().parent / "corpus"

# Smaller files are hashed again every time: that takes less than a second, and a memo cannot then be wrong about them.
MEMO_BYTES = 64 << 20
# A file changed so recently can change again without its times showing it.
_SETTLED_SECONDS = 10
_WINDOWS_OR_CONTROL = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|]')


class DataError(ValueError):
    """Something about the data that the person running has to know: what, where, and what to do."""


class SourceFile(Config):
    """One file of a dataset: its name within the dataset and its content."""

    name: str
    bytes: int
    sha256: str


def find_files(dataset: str, sources: Iterable[str]) -> dict[str, Path]:
    """The files of a dataset by the names they get, in the order of the names.

    A name is the path below the fixed part of the glob; with several sources the source's number comes in front.
    Raises DataError for a source that matches no file, or a name that cannot be used.
    """
    patterns = tuple(sources)
    found: dict[str, Path] = {}
    for number, source in enumerate(patterns):
        pattern = _local_pattern(dataset, source)
        base = _fixed_part(pattern)
        paths = [Path(path) for path in glob.glob(str(pattern), recursive=True)] if glob.has_magic(str(pattern)) else [pattern]
        files = [path for path in paths if path.is_file()]
        if not files:
            raise DataError(f"dataset {dataset!r}: source={source!r} {_why_nothing(pattern)}")
        for path in files:
            name = path.relative_to(base).as_posix()
            found[check_file_name(name if len(patterns) == 1 else f"{number:03d}/{name}")] = path
    return dict(sorted(found.items()))


def describe_files(dataset: str, files: dict[str, Path]) -> tuple[SourceFile, ...]:
    """Size and sha256 of each file. Raises DataError for one that cannot be read."""
    memo = _DigestMemo()
    described: list[SourceFile] = []
    for name, path in files.items():
        try:
            described.append(SourceFile(name=name, bytes=path.stat().st_size, sha256=memo.digest(path)))
        except OSError as error:
            raise DataError(f"dataset {dataset!r}: {path} cannot be read ({error.strerror}); check its permissions") from None
    memo.save()
    return tuple(described)


def check_readable(dataset: str, files: dict[str, Path], *, allow_empty: bool) -> None:
    """Raises DataError where a file cannot be opened, is empty, or all are."""
    empty: list[str] = []
    for path in files.values():
        try:
            with path.open("rb") as file:
                if not file.read(1):
                    empty.append(str(path))
        except OSError as error:
            raise DataError(f"dataset {dataset!r}: {path} cannot be read ({error.strerror}); check its permissions") from None
    if len(empty) == len(files):
        raise DataError(f"dataset {dataset!r}: its {len(files)} source file(s) are all empty, {empty[0]} for one; point source at text")
    if empty and not allow_empty:
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        raise DataError(f"dataset {dataset!r}: {empty[0]}{more} has no bytes; remove it, or set on_bad_document='skip'")


def check_file_name(name: str) -> str:
    """`name` itself, where it is a relative path that stays below its directory on any system. Raises DataError."""
    path = PurePosixPath(name)
    parts_fine = all(part not in ("..", ".") and part == part.rstrip(". ") for part in path.parts)
    if not name or path.is_absolute() or not parts_fine or _WINDOWS_OR_CONTROL.search(name) or len(name.encode()) > 1000:
        raise DataError(f"source file name {name[:120]!r} cannot be used below a directory of ours; rename the file")
    return name


def _local_pattern(dataset: str, source: str) -> Path:
    if source.startswith("package:"):
        return PACKAGED_TEXTS / check_file_name_pattern(dataset, source.removeprefix("package:"))
    if source.startswith("file://"):
        url = urlsplit(source)
        if url.netloc not in ("", "localhost"):
            raise DataError(f"dataset {dataset!r}: source={source!r} names the host {url.netloc!r}; write file:///path for a local file")
        return Path(unquote(url.path))
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", source):
        raise DataError(f"dataset {dataset!r}: source={source!r} is not local; download it and give its path")
    return Path(source).expanduser().absolute()


def check_file_name_pattern(dataset: str, pattern: str) -> str:
    """A glob below the packaged texts. Raises DataError where it would leave them."""
    if not pattern or pattern.startswith("/") or ".." in PurePosixPath(pattern).parts:
        raise DataError(f"dataset {dataset!r}: source='package:{pattern}' must be a glob below the packaged texts")
    return pattern


def _fixed_part(pattern: Path) -> Path:
    """The directory above the first component with a wildcard, or above the file."""
    parts = pattern.parts
    for index, part in enumerate(parts):
        if glob.has_magic(part):
            return Path(*parts[:index])
    return pattern.parent


def _why_nothing(pattern: Path) -> str:
    if pattern.is_dir():
        return f"is a directory; write a glob for its files, such as {pattern / '*.txt'}"
    if pattern.exists():
        return "is no regular file; give a file, or a glob"
    base = _fixed_part(pattern)
    if not base.is_dir():
        return f"matches no file: there is no directory {base}; correct the path"
    return f"matches no file below {base}; correct the pattern"


class _DigestMemo:
    """Remembers digests of large files between runs, by path, size, times and inode. A memo that is lost costs time only."""

    def __init__(self) -> None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self._path = cache / "prefect-llama" / "source-digests.json"
        self._changed = False
        try:
            value = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            value = {}
        self._known: dict[str, str] = {str(key): str(digest) for key, digest in value.items()} if isinstance(value, dict) else {}

    def digest(self, path: Path) -> str:
        """The file's sha256, remembered where it is large and was not touched since."""
        status = path.stat()
        if status.st_size < MEMO_BYTES:
            return sha256_of(path)
        key = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}|{status.st_ctime_ns}|{status.st_dev}:{status.st_ino}"
        if re.fullmatch("[0-9a-f]{64}", self._known.get(key, "")):
            return self._known[key]
        digest = sha256_of(path)
        if time.time() - max(status.st_mtime, status.st_ctime) > _SETTLED_SECONDS:
            self._known[key] = digest
            self._changed = True
        return digest

    def save(self) -> None:
        """Writes what was added. A cache that cannot be written is done without."""
        if self._changed:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_json(self._path, self._known)
            except OSError:
                self._changed = False
