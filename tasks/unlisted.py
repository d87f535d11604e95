"""Datasets whose servers do not answer: what a plan can still say of them, from the size their configuration declares."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from tasks.mixture_config import Dataset, Mixture
from tasks.sources import NotListed, SourceFile, list_files
from tasks.sources.local_files import is_local
from tasks.steps import Step


def unlisted_datasets(mixture: Mixture) -> dict[str, str]:
    """Datasets that cannot be listed now and declare their size, by name, with the reason. A server that is away is asked once.

    Raises:
        DataError: a dataset is refused, or cannot be listed and does not declare its size.
    """
    away: dict[str, str] = {}
    unlisted: dict[str, str] = {}
    for dataset in mixture.datasets:
        if dataset.source_bytes is None or not dataset.has_files or all(map(is_local, dataset.sources)):
            continue
        servers = {_server(source) for source in dataset.sources}
        known = next((away[server] for server in servers if server in away), None)
        if known is None:
            try:
                list_files(dataset)
                continue
            except NotListed as error:
                known = str(error)
                away |= dict.fromkeys(servers, known)
        unlisted[dataset.name] = known
    return unlisted


def stand_in(dataset: Dataset) -> SourceFile:
    """One file of the declared size, with the kind of name that the dataset's files have."""
    return SourceFile(name=PurePosixPath(dataset.sources[0]).name, bytes=dataset.source_bytes, version="unlisted:")


def _server(source: str) -> str:
    return "hf://" if source.startswith("hf://") else urlsplit(source)._replace(path="", query="", fragment="").geturl()


def depending(steps: tuple[Step, ...], unlisted: Collection[str]) -> set[Step]:
    """The steps, inputs first, whose fingerprints the files of the unlisted datasets would change."""
    found: set[Step] = set()
    for step in steps:
        if (step.kind == "raw" and step.name in unlisted) or not found.isdisjoint(step.upstream):
            found.add(step)
    return found


def not_listed(unlisted: dict[str, str]) -> list[str]:
    """What to tell of the datasets that `unlisted_datasets` found: one warning, or none."""
    if not unlisted:
        return []
    names = list(unlisted)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [
        f"the files of {', '.join(names[:3])}{more} cannot be listed, so their published sizes are planned with, and what is there "
        f"already is not known: {unlisted[names[0]]}"
    ]
