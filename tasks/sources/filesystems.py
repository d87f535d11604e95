"""Object stores and other file systems by URL, through fsspec: opens and lists them, and tells one state of a file from another."""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from tasks.sources.globs import is_hidden
from tasks.sources.part_file import md5_version
from tasks.sources.request_limits import Unavailable, is_retried
from tasks.sources.source_file import DataError, Found, public_location

# What file systems call the time at which a file became what it is.
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")


def open_filesystem(location: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL, and the path in it. Options such as credentials come from the environment, or fsspec's own configuration.

    Raises DataError for a protocol that fsspec does not know, or whose package is not installed.
    """
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs a traceback for each try; what fails is told by our own errors
    place = public_location(location)
    if "::" in location:
        raise DataError(f"{place} is a chain of file systems; unpack the inner one, and give the plain URL of the files")
    try:
        return url_to_fs(location)
    except ImportError as error:
        raise DataError(f"{place}: {error}; install that package beside this one, then run again") from None
    except ValueError as error:
        raise DataError(f"{place} cannot be opened ({error}); correct the URL") from None


def list_filesystem(source: str, base: str) -> list[Found]:
    """The files of a URL or a glob below `base`, with what their locations have after it. One try.

    Raises DataError for a directory, and as `filesystem_errors`.
    """
    with filesystem_errors(source):
        filesystem, pattern = open_filesystem(source)
        filesystem.invalidate_cache()
        if not glob.has_magic(source):
            info = filesystem.info(pattern)
            if info["type"] != "file":
                raise DataError(f"source={public_location(source)!r} is a directory; write a glob for its files, such as */*.jsonl.gz")
            return [_found(pattern.rstrip("/").rpartition("/")[2], "", info)]
        root = open_filesystem(f"{base}/")[1].rstrip("/")
        infos: Any = filesystem.glob(pattern, detail=True)
    files = []
    for path, info in infos.items():
        name = path.removeprefix(root).lstrip("/")
        if info["type"] == "file" and not is_hidden(name):
            files.append(_found(name, f"/{name}", info))
    return files


def _found(name: str, location: str, info: dict[str, Any]) -> Found:
    return Found(path=name, location=location, bytes=size_in(info), version=next(iter(versions_in(info)), None), published=name)


def versions_in(info: dict[str, Any]) -> tuple[str, ...]:
    """The versions, as SourceFile has them, in what a file system says of a file: content before names before times.

    Several, because many file systems say other things in a listing than about one file.
    """
    found = [md5_version(str(info[key])) for key in ("md5Hash", "md5") if info.get(key)]
    for key, kind in (("generation", "generation"), ("ETag", "etag"), ("etag", "etag"), ("crc32c", "crc32c")):
        if info.get(key):
            value = str(info[key]).strip('"')
            found.append(f"{kind}:{value}")
    found += [f"modified:{_instant(info[key])}" for key in _TIMES if info.get(key) is not None]
    return tuple(dict.fromkeys(version for version in found if version is not None))


def is_changed(planned: str | None, versions: tuple[str, ...]) -> bool:
    """Whether `versions` say that a file is not the planned one any more; what they do not speak of is not compared."""
    kind = (planned or "").partition(":")[0]
    return planned not in versions and any(version.startswith(f"{kind}:") for version in versions)


def _instant(value: Any) -> str:
    """A time in one spelling, in UTC, whether it was given as seconds, a datetime or ISO 8601."""
    try:
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        elif isinstance(value, int | float):
            value = datetime.fromtimestamp(value, UTC)
    except (ValueError, OverflowError, OSError):
        return str(value)
    if not isinstance(value, datetime):
        return str(value)
    return (value if value.tzinfo is not None else value.replace(tzinfo=UTC)).astimezone(UTC).isoformat()


def size_in(info: dict[str, Any]) -> int | None:
    """The size in bytes in what a file system says of a file, or None."""
    size = info.get("size")
    return int(size) if size is not None else None


@contextmanager
def filesystem_errors(location: str) -> Iterator[None]:
    """Turns what a file system raises into DataError where it stays so (no such file, no permission), else into Unavailable."""
    place = public_location(location)
    try:
        yield
    except (DataError, Unavailable):
        raise
    except FileNotFoundError:
        raise DataError(f"{place}: there is no such file; correct the URL") from None
    except PermissionError as error:
        raise DataError(f"{place}: no permission ({_brief(error)}); log in, or set the credentials its file system reads") from None
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise DataError(f"{place} cannot be read ({_brief(error)}); correct the URL") from None
    except Exception as error:
        status = getattr(error, "code", None) or getattr(error, "status", None)
        if isinstance(status, int) and 400 <= status < 500 and not is_retried(status):
            raise DataError(f"{place} answered {status} ({_brief(error)}); correct the URL or the credentials") from None
        raise Unavailable(f"{place}: {_brief(error)}", everyone=status == 429) from None


def _brief(error: BaseException) -> str:
    """The kind of error and its first words; file systems put whole requests into their messages, with what signs them."""
    words = str(error).split("?", 1)[0].split("\n", 1)[0][:120]
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
