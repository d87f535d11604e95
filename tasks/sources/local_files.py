"""Finds local files by a path or a glob, without being led out of the directory the glob starts in."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from tasks.sources.source_file import DataError

PACKAGED_TEXTS = Path(__file__).resolve().parent.parent / "corpus"
_LOCAL_URL = re.compile(r"(?:file|local)://", re.IGNORECASE)


def is_local(source: str) -> bool:
    """Whether a source, or a file's location, is a path on this machine (also as `file://` or `package:`)."""
    return bool(_LOCAL_URL.match(source)) or not re.match(r"[A-Za-z][A-Za-z0-9+.-]+:(?://|:)", source)


def local_path(source: str) -> Path:
    """The absolute path, or glob, that a local source means. Raises DataError where it means none."""
    if source.startswith("package:"):
        pattern = source.removeprefix("package:")
        if not pattern or pattern.startswith("/") or ".." in PurePosixPath(pattern).parts:
            raise DataError(f"source={source!r} must be a glob below the packaged texts")
        return PACKAGED_TEXTS / pattern
    if scheme := _LOCAL_URL.match(source):
        # a `?` is a wildcard here and a `#` a letter, so it is not split like other URLs
        host, slash, path = source[scheme.end() :].partition("/")
        if host not in ("", "localhost"):
            raise DataError(f"source={source!r} names the host {host!r}; write file:///path for a local file")
        return Path(unquote(slash + path))
    return Path(source).expanduser().absolute()


def find_local(source: str, *, allow_links: bool = False) -> dict[str, Path]:
    """The files of a local source by their names below the fixed part of the glob, which is the directory above the first wildcard.

    `*`, `?` and `[...]` match within a name, `**` descends; none matches names that begin with a dot. `**` does not follow
    links to directories inside the fixed part: what is there is found at its own place, and loops have no end.
    Raises DataError for a source that matches no file, for a link that leads nowhere and, unless `allow_links`, for one that
    leads out of the fixed part.
    """
    pattern = local_path(source)
    base = _fixed_part(pattern)
    if not base.is_dir():
        raise DataError(f"source={source!r} matches no file: there is no directory {base}; correct the path")
    search = _Search(base, allow_links=allow_links)
    found = {path.relative_to(base).as_posix(): path for path in search.expand(base, pattern.relative_to(base).parts)}
    if not found:
        raise DataError(f"source={source!r} {_why_nothing(pattern, base)}")
    return dict(sorted(found.items()))


class _Search:
    def __init__(self, base: Path, *, allow_links: bool) -> None:
        self._base, self._real_base = base, base.resolve()
        self._allow_links = allow_links
        self._followed: set[Path] = set()

    def expand(self, directory: Path, parts: tuple[str, ...]) -> Iterator[Path]:
        """The regular files below `directory` whose names are as `parts` say."""
        head, rest = parts[0], parts[1:]
        if head == "**":
            yield from self.expand(directory, rest or ("*",))
            for place in self._entries(directory):
                if not place.name.startswith(".") and place.is_dir() and self._descends(place):
                    yield from self.expand(place, parts)
            return
        for place in self._matching(directory, head):
            self._check_link(place)
            if not rest and place.is_file():
                yield place
            elif rest and place.is_dir():
                yield from self.expand(place, rest)

    def _matching(self, directory: Path, part: str) -> list[Path]:
        if not glob.has_magic(part):
            place = directory / part
            return [place] if os.path.lexists(place) else []
        hidden = part.startswith(".")
        names = (entry for entry in self._entries(directory) if hidden or not entry.name.startswith("."))
        return [place for place in names if fnmatch.fnmatchcase(place.name, part)]

    def _entries(self, directory: Path) -> list[Path]:
        try:
            return sorted(directory.iterdir())
        except OSError as error:
            raise DataError(f"{directory} cannot be read ({error.strerror}); check its permissions") from None

    def _descends(self, place: Path) -> bool:
        """Whether `**` goes into a directory: into every real one, and once into each that an allowed link leads out to."""
        if not place.is_symlink():
            return True
        self._check_link(place)
        target = place.resolve()
        if target.is_relative_to(self._real_base) or self._real_base.is_relative_to(target) or target in self._followed:
            return False
        self._followed.add(target)
        return True

    def _check_link(self, place: Path) -> None:
        if not place.is_symlink():
            return
        if not place.exists():
            raise DataError(f"{place} is a link to {place.readlink()}, which is not there; mend or remove the link")
        target = place.resolve()
        if not self._allow_links and not target.is_relative_to(self._real_base):
            raise DataError(
                f"{place} is a link that leads out of {self._base}, to {target}; leave it out of the source, "
                "or set allow_links=true if that is meant"
            )


def _fixed_part(pattern: Path) -> Path:
    """The directory above the first component with a wildcard, or above the file."""
    for index, part in enumerate(pattern.parts):
        if glob.has_magic(part):
            return Path(*pattern.parts[:index])
    return pattern.parent


def _why_nothing(pattern: Path, base: Path) -> str:
    if pattern.is_dir():
        return f"is a directory; write a glob for its files, such as {pattern / '*.txt'}"
    if pattern.exists():
        return "is no regular file; give a file, or a glob"
    return f"matches no file below {base}; correct the pattern"
