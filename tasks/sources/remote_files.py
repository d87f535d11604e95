"""Finds remote files by any source that is no local path, and remembers what servers listed. Downloads nothing."""

from __future__ import annotations

import glob
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote, urlsplit

from tasks.sources.file_lists import ListSource, list_entries
from tasks.sources.filesystems import list_filesystem
from tasks.sources.globs import fixed_part
from tasks.sources.http_requests import inquire, open_client
from tasks.sources.hub_files import hub_place, list_hub
from tasks.sources.request_limits import Unavailable, listing_requests
from tasks.sources.source_file import DataError, Found, NotListed, public_location
from tasks.sources.source_memory import remember_listing, remembered_listing

# One plan asks for the same listing more than once.
_RECENT_SECONDS = 60.0
_recent: dict[Any, tuple[float, list[Found]]] = {}


@dataclass(frozen=True)
class _Question:
    """What to ask a server. source: as it is written. key: tells it from every other. ask: makes one listing.

    A listing is what every location begins with, and the files with locations that go on from there, which hold no secret.
    base: what locations begin with; None: the listing says it. lasting: whether the answer stays the same for ever.
    """

    source: str
    key: str
    ask: Callable[[], tuple[str, list[Found]]]
    base: str | None = None
    lasting: bool = False


def find_remote(source: str) -> list[Found]:
    """The files of a remote source, in the order of their paths.

    The listing of a commit of the Hub never changes, so it is remembered and not asked for again. Any other is asked
    for each time; where its server is away, what it listed last is used, with a warning.
    Raises DataError for a source that names no file, or whose server does not answer and never did.
    """
    return _recently(source, lambda: _answer(_question(source)))


def find_listed(listed: ListSource, pin: str | None) -> list[Found]:
    """The files of a source `LIST#GLOB`, in the order of their paths; `pin` is the sha256 of the list, where that is known.

    Raises as `find_remote`, and DataError for a list that is not the pinned one.
    """
    source = f"{listed.location}#{listed.pattern}"
    question = _Question(source, f"{source} {pin}", lambda: ("", list_entries(listed, pin)), base="")
    # a pinned list is remembered itself, once for all globs
    return _recently((source, pin), lambda: _answer(question, remember=pin is None))


def _recently(key: Any, find: Callable[[], list[Found]]) -> list[Found]:
    if (known := _recent.get(key)) is not None and time.monotonic() - known[0] < _RECENT_SECONDS:
        return known[1]
    found = find()
    _recent[key] = (time.monotonic(), found)
    return found


def _question(source: str) -> _Question:
    if source.startswith("hf://"):
        place = hub_place(source)
        return _Question(source, place.key, lambda: list_hub(place), lasting=place.is_pinned)
    if source.lower().startswith(("http://", "https://")):
        return _Question(source, source, lambda: (source, [_ask_http(source)]), base=source)
    base = fixed_part(source) if glob.has_magic(source) else source
    return _Question(source, source, lambda: (base, listing_requests().call(lambda: list_filesystem(source, base))), base=base)


def _answer(question: _Question, *, remember: bool = True) -> list[Found]:
    source = public_location(question.source)
    found = _recall(question) if question.lasting else None
    if found is None:
        try:
            base, files = question.ask()
            if remember and all(file.location == public_location(file.location) for file in files):
                remember_listing(question.key, {"base": public_location(base), "files": [vars(file) for file in files]})
            found = _located(base, files)
        except Unavailable as error:
            found = _recall(question)
            if found is None:
                raise NotListed(f"source={source!r} cannot be listed ({error}); check the network, then run again") from None
            logging.getLogger(__name__).warning("%s cannot be listed (%s); going on with what it listed last", source, error)
    if not found:
        raise DataError(f"source={source!r} matches no file; correct the pattern")
    return found


def _recall(question: _Question) -> list[Found] | None:
    value: Any = remembered_listing(question.key)
    try:
        # what was written down has no password in it; the source has
        return _located(value["base"] if question.base is None else question.base, [Found(**file) for file in value["files"]])
    except (TypeError, KeyError):
        return None


def _located(base: str, files: list[Found]) -> list[Found]:
    return sorted((replace(file, location=base + file.location) for file in files), key=lambda file: file.path)


def _ask_http(source: str) -> Found:
    path = unquote(urlsplit(source).path)
    name = path.rpartition("/")[2]
    if not name or "*" in path:
        raise DataError(f"source={public_location(source)!r}: HTTP lists no directories; give the URL of each file")
    with open_client() as client:
        size, version = listing_requests().call(lambda: inquire(client, source))
    return Found(path=name, location="", bytes=size, version=version, published=path)
