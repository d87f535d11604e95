"""Globs in sources of remote files: which paths they match, and which part of them is fixed."""

from __future__ import annotations

import re
from collections.abc import Callable

from fsspec.utils import glob_translate

from tasks.sources.source_file import DataError


def fixed_part(pattern: str) -> str:
    """The directory above the first wildcard, or above the file where there is none; without a slash at its end."""
    return re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")[0]


def glob_matcher(pattern: str) -> Callable[[str], bool]:
    """Whether a path is as the glob says; as everywhere, a wildcard matches no name that begins with a dot. Raises DataError."""
    try:
        shape = re.compile(glob_translate(pattern))
    except ValueError as error:
        raise DataError(f"{pattern!r} is no glob ({error}); correct it") from None
    return lambda path: bool(shape.match(path)) and not is_hidden(path)


def is_hidden(path: str) -> bool:
    """Whether a wildcard passes a path over: a name in it begins with a dot. `..` does not hide, it is to be refused."""
    return any(part.startswith(".") and part != ".." for part in path.split("/"))
