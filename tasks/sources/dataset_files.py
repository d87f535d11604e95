"""A dataset's files: found wherever they are, identified by content, and refused before work starts where they cannot be meant."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from model.config_base import nearest
from tasks.mixture_config import Dataset
from tasks.sources.local_files import find_local, is_local
from tasks.sources.source_file import DataError, Found, SourceFile, check_file_name, public_location
from tasks.sources.source_memory import DigestMemo

if TYPE_CHECKING:
    from tasks.sources.file_lists import ListSource

# A word of its own in a path, as publishers name splits: test-00000.parquet, data/validation/x, my_val_set, testset.jsonl.
_SPLITS = r"tests?|testing|validations?|validate|valid|val|evaluations?|evaluate|evals?|held[-_ ]?out"
_SET = r"(?:[-_ .]?(?:sets?|data|splits?))?"
# `dev` begins many other names (dev_to, dev-tools), so it counts only where it ends one, or a number or "set" follows.
_DEV = rf"dev(?:{_SET}(?=[-_ .]?(?:\d|[./]|$))|[-_ .]?(?:sets?|data|splits?)(?![a-z]))"
_HELD_OUT = re.compile(rf"(?<![a-z])(?:(?:{_SPLITS}){_SET}(?![a-z])|{_DEV})", re.IGNORECASE)
_HELD_OUT_DIRECTORY = re.compile(rf"(?:{_SPLITS}|dev){_SET}", re.IGNORECASE)


def list_files(dataset: Dataset) -> tuple[SourceFile, ...]:
    """The files of a dataset in the order of their names: local ones hashed, remote ones listed. Downloads nothing.

    A name is the path below the fixed part of the glob; with several sources the source's number comes in front.
    Raises DataError for a source that names no file, a file that cannot be read or has a name that cannot be used, a
    digest that is not the published one, and a remote file of which nothing tells one state from another.
    """
    found = _find(dataset)
    memo = DigestMemo()
    files = [_describe(f"dataset {dataset.name!r}", name, file, dataset, memo) for name, file in found.items()]
    memo.save()
    return tuple(files)


def check_files(dataset: Dataset, *, trained: bool) -> tuple[str, ...]:
    """The names of the files.

    Raises DataError where a file cannot be read, is empty, or all are; and where one to train on is named like held-out data.
    Looked at are the names below the fixed part of each glob and the directory they are in, for HTTP (also from a list) the
    path of the URL, and on the Hub the path in the repository. Directories further up may be called as they like.
    """
    found = _find(dataset)
    for file in found.values():
        if is_local(file.location):
            _check_readable(dataset.name, Path(file.location))
        if trained and not dataset.allow_test_in_train and (word := _held_out(file)):
            raise DataError(
                f"dataset {dataset.name!r}: {public_location(file.location)} has {word!r} in its name, so it looks like data to "
                "evaluate on, which a model must not be trained on; leave it out of the source, or set allow_test_in_train=true"
            )
    empty = [public_location(file.location) for file in found.values() if file.bytes == 0]
    if len(empty) == len(found):
        raise DataError(
            f"dataset {dataset.name!r}: its {len(found)} source file(s) are all empty, {empty[0]} for one; point source at text"
        )
    if empty and dataset.on_bad_document != "skip":
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        raise DataError(f"dataset {dataset.name!r}: {empty[0]}{more} has no bytes; remove it, or set on_bad_document='skip'")
    return tuple(found)


def _held_out(file: Found) -> str | None:
    """The word by which a file looks like data to evaluate on, in its published path or as the name of its directory."""
    if word := _HELD_OUT.search(file.published):
        return word.group()
    path = urlsplit(file.location).path if "://" in file.location else file.location
    above = path.removesuffix(file.published) if file.published else ""
    directory = PurePosixPath(above if above != path and above.endswith("/") else PurePosixPath(path).parent).name
    return directory if _HELD_OUT_DIRECTORY.fullmatch(directory) else None


def find_one(location: str, *, sha256: str | None = None) -> SourceFile:
    """The one file that a path or URL names, with the digest it has to have.

    Raises DataError where it names none or several, or a local one cannot be read.
    """
    location = expanded(location)
    listed = _list_source(location)
    found = _find_source(location, allow_links=True) if listed is None else _find_listed(listed, None)
    if len(found) != 1:
        raise DataError(f"{public_location(location)} names {len(found)} files where one is wanted; correct it")
    name = found[0].path.rpartition("/")[2]
    file = found[0] if sha256 is None else replace(found[0], sha256=sha256)
    version = None if file.sha256 else file.version
    return SourceFile(name=name, bytes=file.bytes, sha256=file.sha256, version=version, location=file.location)


def _find(dataset: Dataset) -> dict[str, Found]:
    """The files by the names they get, in the order of the names."""
    found: dict[str, Found] = {}
    lists: set[str] = set()
    try:
        _check_digests(dataset)
        for number, source in enumerate(map(expanded, dataset.sources)):
            front = "" if len(dataset.sources) == 1 else f"{number:03d}/"
            listed = _list_source(source)
            if listed is None:
                files = _find_source(source, allow_links=dataset.allow_links)
            else:
                pin = dataset.sha256.get(f"{front}{listed.name}") or dataset.sha256.get(listed.name)
                lists |= {f"{front}{listed.name}", listed.name}
                files = _find_listed(listed, pin)
            found |= {check_file_name(f"{front}{file.path}"): file for file in files}
        for name in found:
            above = next((parent for parent in _above(name) if parent in found), None)
            if above is not None:
                raise DataError(f"{above!r} is a file and a directory with {name!r} at once; leave one out of the source")
        for name in dataset.sha256:
            if name not in found and name not in lists:
                raise DataError(f"sha256 names {name!r}, which is no file of it{nearest(name, [*found, *lists])}; correct the name")
    except DataError as error:
        raise type(error)(f"dataset {dataset.name!r}: {error}") from None
    return dict(sorted(found.items()))


def expanded(source: str) -> str:
    """`source` with each `${NAME}` replaced from the environment: what must not stand in a configuration, such as a signature.

    Raises DataError where a name is not set.
    """

    def value(match: re.Match[str]) -> str:
        if (found := os.environ.get(match[1])) is None:
            raise DataError(f"source={public_location(source)!r} names the environment variable {match[1]}, which is not set: set it")
        return found

    return re.sub(r"\$\{(\w+)\}", value, source)


def _check_digests(dataset: Dataset) -> None:
    for name, digest in dataset.sha256.items():
        if not re.fullmatch("[0-9a-fA-F]{64}", digest):
            raise DataError(f"sha256[{name!r}]={digest[:80]!r} is no sha256, which has 64 hexadecimal digits; correct it")


def _above(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def _list_source(source: str) -> ListSource | None:
    if "#" not in source:
        return None
    from tasks.sources.file_lists import list_source

    return list_source(source)


def _find_listed(listed: ListSource, pin: str | None) -> list[Found]:
    from tasks.sources.remote_files import find_listed

    return find_listed(listed, pin.lower() if pin is not None else None)


def _find_source(source: str, *, allow_links: bool) -> list[Found]:
    if not is_local(source):
        from tasks.sources.remote_files import find_remote

        return find_remote(source)
    found = []
    for name, path in find_local(source, allow_links=allow_links).items():
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
        found.append(Found(path=name, location=str(path), bytes=size, published=name))
    return found


def _describe(what: str, name: str, file: Found, dataset: Dataset, memo: DigestMemo) -> SourceFile:
    published = dataset.sha256.get(name, "").lower() or None
    digest, size = file.sha256, file.bytes
    if is_local(file.location):
        try:
            digest, size = memo.digest(Path(file.location)), Path(file.location).stat().st_size
        except OSError as error:
            raise DataError(f"{what}: {file.location} cannot be read ({error.strerror}); check its permissions") from None
    where = public_location(file.location)
    if digest is not None and published not in (None, digest):
        raise DataError(
            f"{what}: {where} has the sha256 {digest}, and dataset.sha256 says {published}; get the published file, or correct it"
        )
    digest = digest or published
    if digest is None and file.version is None and dataset.revision is None:
        raise DataError(
            f"{what}: the server of {where} gives neither ETag nor date, so nothing tells when the file changes; give its "
            f"digest as sha256={{{name!r}: ...}}, or name the state of the data in dataset.revision"
        )
    return SourceFile(name=name, bytes=size, sha256=digest, version=None if digest else file.version, location=file.location)


def _check_readable(dataset: str, path: Path) -> None:
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise DataError(f"dataset {dataset!r}: {path} cannot be read ({error.strerror}); check its permissions") from None
