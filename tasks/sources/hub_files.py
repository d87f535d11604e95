"""Lists files of repositories on the Hugging Face Hub, each at one commit: `hf://datasets/org/name@revision/glob`."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

from tasks.sources.globs import fixed_part, glob_matcher
from tasks.sources.http_requests import hub_endpoint
from tasks.sources.request_limits import Requests, Unavailable, is_retried, listing_requests, retry_after_seconds
from tasks.sources.source_file import DataError, Found

if TYPE_CHECKING:
    from huggingface_hub import RepoFile

T = TypeVar("T")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubPlace:
    """A source on the Hub. kind: "dataset" or "model". revision: a commit, tag, branch, or None. path: a glob, or a file's path."""

    source: str
    endpoint: str
    kind: str
    repository: str
    revision: str | None
    path: str

    @property
    def is_pinned(self) -> bool:
        """Whether what it names cannot change."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    @property
    def key(self) -> str:
        """Tells it from other sources on any hub."""
        return f"{self.endpoint} {self.source}"

    @property
    def page(self) -> str:
        """Where a person sees the repository."""
        return f"{self.endpoint}/{'datasets/' if self.kind == 'dataset' else ''}{self.repository}"

    def at(self, revision: str) -> str:
        """The source with this revision, as a person writes it."""
        return f"hf://{'datasets/' if self.kind == 'dataset' else ''}{self.repository}@{revision}/{self.path}"


def hub_place(source: str) -> HubPlace:
    """Reads a source that begins with hf://. Raises DataError where it names no file of a dataset or a model."""
    from huggingface_hub import parse_hf_uri

    try:
        uri = parse_hf_uri(source)
    except ValueError as error:
        raise DataError(f"source={source!r} cannot be read ({error}); write hf://datasets/org/name@revision/path") from None
    if uri.type not in ("dataset", "model"):
        raise DataError(f"source={source!r} is a {uri.type}; give a dataset, hf://datasets/org/name@revision/path, or a model")
    if not uri.path_in_repo:
        raise DataError(f"source={source!r} names no file; add a path or a glob, such as {source.rstrip('/')}/**/*.parquet")
    if ".." in uri.path_in_repo.split("/"):
        raise DataError(f"source={source!r} names a directory above; write the path itself")
    return HubPlace(source, hub_endpoint(), uri.type, uri.id, uri.revision, uri.path_in_repo)


def list_hub(place: HubPlace) -> tuple[str, list[Found]]:
    """What the locations of the files begin with, and the files with what their locations end in.

    Raises DataError for a source without a revision, and for what the Hub refuses; Unavailable where it does not answer.
    """
    commit = listing_requests().call(lambda: _once(place, lambda: _commit(place)))
    if place.revision is None:
        raise DataError(
            f"source={place.source!r} has no revision, so what it names can change; the default branch is at {place.at(commit)}"
        )
    below = fixed_part(place.path)
    found = []
    # the Hub's own client tries a tree again itself
    requests = Requests(attempts=1) if glob.has_magic(place.path) else listing_requests()
    for file in requests.call(lambda: _once(place, lambda: _files(place, commit, below))):
        digest = file.lfs.sha256 if file.lfs is not None else None
        found.append(
            Found(
                path=file.path[len(below) + 1 if below else 0 :],
                location=quote(file.path, safe="/"),
                bytes=file.size,
                sha256=digest,
                version=None if digest else f"git-blob:{file.blob_id}",
                published=file.path,
            )
        )
    return f"{place.page}/resolve/{commit}/", found


def _commit(place: HubPlace) -> str:
    from huggingface_hub import HfApi

    info = HfApi(endpoint=place.endpoint).repo_info(place.repository, repo_type=place.kind, revision=place.revision, timeout=30)
    if not info.sha or not _COMMIT.fullmatch(info.sha):
        raise DataError(f"{place.page} does not say at which commit {place.revision or 'it'} is; give the commit as its revision")
    return info.sha


def _files(place: HubPlace, commit: str, below: str) -> list[RepoFile]:
    from huggingface_hub import HfApi, RepoFile

    api = HfApi(endpoint=place.endpoint)
    if not glob.has_magic(place.path):
        entries: Iterable = api.get_paths_info(place.repository, [place.path], repo_type=place.kind, revision=commit)
        fits = place.path.__eq__
    else:
        deep = "/" in place.path[len(below) + 1 :] or "**" in place.path
        entries = api.list_repo_tree(place.repository, below or None, recursive=deep, repo_type=place.kind, revision=commit)
        fits = glob_matcher(place.path)
    files = [entry for entry in entries if isinstance(entry, RepoFile)]
    return [file for file in files if fits(file.path)]


def _once(place: HubPlace, call: Callable[[], T]) -> T:
    """One try, with the Hub's errors as ours."""
    from huggingface_hub import errors

    try:
        return call()
    except errors.GatedRepoError:
        raise DataError(
            f"{place.page} is gated: accept its licence on that page, and log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise DataError(f"{place.page} does not exist, or is private: correct the name, or log in with `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise DataError(f"{place.page} has no revision {place.revision!r}; give a commit, a tag or a branch that is there") from None
    except errors.EntryNotFoundError:
        raise DataError(f"{place.page} has no such path at {place.revision}: {place.path}; correct it") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if not is_retried(status):
            raise DataError(f"{place.page} answered {status}; correct the source, or log in with `hf auth login`") from None
        after = retry_after_seconds(error.response.headers.get("Retry-After"))
        raise Unavailable(f"{place.page} answered {status}", retry_after=after, everyone=status == 429) from None
    except errors.OfflineModeIsEnabled:
        raise Unavailable("HF_HUB_OFFLINE is set: unset it, or use files that are here", again=False) from None
    except (OSError, errors.HTTPError) as error:
        raise Unavailable(f"{place.page}: {error}") from None
