"""Sources `LIST#GLOB`: a text file that names files, one a line, by URL or by path from its server's root; the glob picks among them."""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import zlib
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit

from tasks.sources.globs import fixed_part, glob_matcher
from tasks.sources.http_requests import answered, inquire, open_client
from tasks.sources.hub_files import hub_place, list_hub
from tasks.sources.local_files import is_local, local_path
from tasks.sources.request_limits import listing_requests
from tasks.sources.source_file import DataError, Found, public_location
from tasks.sources.source_memory import remember_list, remembered_list

# As it arrives, and unpacked: the URLs of half a million files.
_MAX_BYTES = 64 << 20
# A server answers about ten requests a second: so many files are asked for while a person waits for a plan, and no more.
_MAX_INQUIRIES = 1000
# What stays as it is where a path becomes part of a URL; what is percent-encoded already is not encoded again.
_SAFE = "/%?=&+,:;@!$'()*~"
_SECRET = re.compile(r"https?://[^/]*@|[^?]*\?", re.IGNORECASE)


@dataclass(frozen=True)
class ListSource:
    """A list of files, and which of them are meant. location: a URL (http, https, hf) or a local path. pattern: a glob."""

    location: str
    pattern: str

    @property
    def name(self) -> str:
        """The list's own base name, by which its digest is published."""
        if is_local(self.location):
            return local_path(self.location).name
        return unquote(urlsplit(self.location).path).rpartition("/")[2]


@dataclass(frozen=True)
class _Entry:
    """A line. number: counted from 1. location: the URL of its file. path: of that URL, decoded, without the leading slash."""

    number: int
    location: str
    path: str


def list_source(source: str) -> ListSource | None:
    """Reads a source `LIST#GLOB`; None for every other.

    A local one is a list only where LIST is a file and the whole is not: paths may hold a `#`. On the Hub a `#` before a
    slash is the end of a directory's name. Raises DataError where LIST or GLOB is missing or cannot be one.
    """
    if is_local(source):
        ends = [match.start() for match in re.finditer("#", source)]
        if not ends or local_path(source).exists():
            return None
        end = next((end for end in ends if local_path(source[:end]).is_file()), None)
    elif source.lower().startswith(("http://", "https://")):
        end = source.find("#") if "#" in source else None
    else:
        end = match.start() if source.startswith("hf://") and (match := re.search("#(?!/)", source)) else None
    if end is None:
        return None
    listed = ListSource(source[:end], source[end + 1 :].lstrip("/"))
    if not listed.name or "*" in listed.location:
        raise DataError(f"source={public_location(source)!r}: what is before the # must be one file, a list of files; correct it")
    if not listed.pattern:
        raise DataError(f"source={public_location(source)!r} picks nothing from its list; write a glob after the #, such as **/*.gz")
    return listed


def list_entries(listed: ListSource, pin: str | None) -> list[Found]:
    """The files that a list names and its glob matches, with whole URLs as locations.

    pin: the sha256 that the list has to have, in lower case. A pinned list that was read once is not asked for again, and its
    files are not asked for either: the list and the line tell one state of a file from another, the size is learned when it
    comes. Without a pin every file is asked for.

    Raises DataError for a list that cannot be read, is not the pinned one or names what it must not, and where nothing
    matches; Unavailable where a server does not answer.
    """
    remote = not is_local(listed.location)
    known = remembered_list(listed.location, pin) if remote and pin is not None else None
    data = known if known is not None else _fetch(listed.location) if remote else _read(listed.location)
    digest = hashlib.sha256(data).hexdigest()
    if pin not in (None, digest):
        raise DataError(
            f"{public_location(listed.location)} has the sha256 {digest}, and dataset.sha256 says {pin}; get the published list, or "
            "correct it"
        )
    lines = _lines(data, public_location(listed.location))
    picked = _pick(listed, _entries(listed, lines))
    if pin is None:
        return _inquire_all(listed, digest, picked)
    if remote and known is None and not any(_SECRET.match(line) for _, line in lines):
        remember_list(listed.location, digest, data)
    return [
        Found(path=name, location=entry.location, bytes=None, version=f"list:{digest}:{entry.number}", published=entry.path)
        for name, entry in picked.items()
    ]


def _fetch(location: str) -> bytes:
    url = location
    if location.startswith("hf://"):
        base, found = list_hub(hub_place(location))
        if not found:
            raise DataError(f"source={location!r} matches no file; correct the path of the list")
        url = base + found[0].location

    def attempt() -> bytes:
        data = bytearray()
        with open_client() as client, answered(client, "GET", url) as response:
            # as it is stored: that is what has the digest
            for piece in response.iter_raw():
                data += piece
                _check_size(len(data), public_location(location))
        return bytes(data)

    return listing_requests().call(attempt)


def _read(location: str) -> bytes:
    path = local_path(location)
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    _check_size(len(data), str(path))
    return data


def _check_size(count: int, place: str) -> None:
    if count > _MAX_BYTES:
        raise DataError(f"{place} has more than {_MAX_BYTES >> 20} MiB, so it is no list of files; correct the source, or split the list")


def _lines(data: bytes, place: str) -> list[tuple[int, str]]:
    """The lines that name files, with their numbers."""
    try:
        if data.startswith(b"\x1f\x8b"):
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
                data = file.read(_MAX_BYTES + 1)
            _check_size(len(data), place)
        text = data.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{place} is no list of files, which is UTF-8 text or that compressed by gzip ({error}); correct it") from None
    lines = ((number, line.strip()) for number, line in enumerate(text.split("\n"), 1))
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def _entries(listed: ListSource, lines: list[tuple[int, str]]) -> list[_Entry]:
    """What the lines name. Raises DataError for a line that is no URL of a web server and leads nowhere on the list's own."""
    if is_local(listed.location):
        root = None
    elif listed.location.startswith("hf://"):
        root = hub_place(listed.location).endpoint
    else:
        url = urlsplit(listed.location)
        root = f"{url.scheme}://{url.netloc}"
    entries = []
    for number, line in lines:
        location = _location(line, root)
        path = unquote(urlsplit(location).path) if location is not None else ""
        if location is None or ".." in path.split("/"):
            remedy = "" if root is not None else " (a list on this machine has no server, so its lines must be whole URLs)"
            raise DataError(
                f"{public_location(listed.location)}, line {number}: {public_location(line)[:200]!r} is neither an http(s) URL nor a path "
                f"from the root of the list's server{remedy}; correct the list"
            )
        entries.append(_Entry(number, location, path.removeprefix("/")))
    return entries


def _location(line: str, root: str | None) -> str | None:
    """The URL that a line means, or None."""
    if not line.isprintable():
        return None
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", line):
        return None if root is None or line.startswith("//") else f"{root}/{quote(line.removeprefix('/'), safe=_SAFE)}"
    try:
        url = urlsplit(line)
        # reading the port checks it
        fine = url.scheme in ("http", "https") and url.hostname and url.port != 0 and " " not in line
    except ValueError:
        return None
    return line if fine else None


def _pick(listed: ListSource, entries: list[_Entry]) -> dict[str, _Entry]:
    """The entries that the glob matches, by their names: below its fixed part or, where it has none, below the parent of them all."""
    fits = glob_matcher(listed.pattern)
    picked = list({entry.location: entry for entry in reversed(entries) if fits(entry.path)}.values())
    place = public_location(listed.location)
    if not picked:
        example = f", such as {entries[0].path!r}" if entries else ""
        raise DataError(f"{place} names {len(entries)} file(s){example}, and {listed.pattern!r} matches none; correct the glob after the #")
    above = fixed_part(listed.pattern) or _common_parent([entry.path for entry in picked])
    named: dict[str, _Entry] = {}
    for entry in picked:
        name = entry.path[len(above) + 1 :] if above else entry.path
        if (other := named.setdefault(name, entry)) is not entry:
            raise DataError(
                f"{place}, lines {entry.number} and {other.number}: both files would have the name {name!r}; leave one out of the list"
            )
    return named


def _common_parent(paths: list[str]) -> str:
    parents = [path.split("/")[:-1] for path in paths]
    # what the first and the last in order have in common, all between them have
    first, last = min(parents), max(parents)
    count = 0
    while count < min(len(first), len(last)) and first[count] == last[count]:
        count += 1
    return "/".join(first[:count])


def _inquire_all(listed: ListSource, digest: str, picked: dict[str, _Entry]) -> list[Found]:
    if len(picked) > _MAX_INQUIRIES:
        raise DataError(
            f"{public_location(listed.location)} names {len(picked)} files that match, more than the {_MAX_INQUIRIES} that are asked for "
            f"each; pin the list with sha256={{{listed.name!r}: {digest!r}}}, or narrow the glob after the #"
        )
    found, requests = [], listing_requests()
    with open_client() as client:
        for name, entry in picked.items():
            size, version = requests.call(lambda location=entry.location: inquire(client, location))
            found.append(Found(path=name, location=entry.location, bytes=size, version=version, published=entry.path))
    return found
