"""What a file of a dataset is: its name within the dataset, its content, and where it lies now."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import urlsplit, urlunsplit

from model.config_base import Config, runtime

_WINDOWS_OR_CONTROL = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|]')
# A partial or temporary file takes the name with something around it, and 255 bytes are what file systems allow.
_MAX_PART_BYTES = 200


class DataError(ValueError):
    """Something about the data that the person running has to know: what, where, and what to do."""


class NotListed(DataError):
    """A remote source whose server does not answer, and of which nothing is remembered."""


class SourceFile(Config):
    """One file of a dataset, identified by as much as is known of its content before it is read.

    bytes: its size; None where its server does not say.
    sha256: of its bytes, hexadecimal; None where nobody published it.
    version: where sha256 is None, the one thing that tells one state of the file from another, as `kind:value`:
        git-blob (the Hub), md5, etag, modified, generation, crc32c, or list (`list:digest:line` of a pinned list of files).
    location: a path or a URL. It can hold a password or a signature, so what is written down is `public_location(location)`.
    """

    name: str
    bytes: int | None = None
    sha256: str | None = None
    version: str | None = None
    location: str = runtime("")


@dataclass(frozen=True)
class Found:
    """A file that a source names, and what is known of it before it is read.

    path: below the fixed part of the source.
    location, bytes, sha256, version: as in SourceFile.
    published: the name its publisher gave it, as much of it as can say what the file is for.
    """

    path: str
    location: str
    bytes: int | None
    sha256: str | None = None
    version: str | None = None
    published: str = ""


def check_file_name(name: str) -> str:
    """`name` itself, where it is a relative path that stays below its directory on any system, and is seen there. Raises DataError."""
    if any("\ud800" <= character <= "\udfff" for character in name):  # how Python spells bytes of a name that are no UTF-8
        raise DataError(f"source file name {name[:120]!r} is not UTF-8; rename the file, or leave it out of the source")
    path = PurePosixPath(name)
    parts_fine = all(
        part == part.rstrip(". ") and not part.startswith(".") and len(part.encode()) <= _MAX_PART_BYTES for part in path.parts
    )
    plain = path.as_posix() == name and path.name != "manifest.json" and not _WINDOWS_OR_CONTROL.search(name)
    if not name or path.is_absolute() or not parts_fine or not plain or len(name.encode()) > 1000:
        raise DataError(
            f"source file name {name[:120]!r} cannot be used below a directory of ours; rename the file, or leave it out of the source"
        )
    return name


def public_location(location: str) -> str:
    """A location without what can be secret in a URL: user and password, and the query, which is where signatures are.

    A `?` in a location that is no HTTP URL stays where it begins no query, since object names and globs can hold one.
    """
    try:
        url = urlsplit(location)
    except ValueError:  # a host that cannot be one
        return re.sub("//[^/]*@", "//", location.partition("?")[0])
    if "://" not in location or url.scheme in ("", "file", "local", "package"):
        return location
    host = url.netloc.rpartition("@")[2]
    if url.scheme in ("http", "https") or re.match(r"[\w.%-]+=", url.query):
        return urlunsplit((url.scheme, host, url.path, "", ""))
    return location.replace(f"//{url.netloc}", f"//{host}", 1)
