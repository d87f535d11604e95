"""Fixtures of the tests of the pool: one server, one worker and one undisturbed run for all of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.main_job import MainJob
from tests.prefect_server import Prefect, prefect_server
from tests.tpu_pool import LONG, Slices, on_pool, start_worker, work_pools


@pytest.fixture(scope="session")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    home = tmp_path_factory.mktemp("prefect")
    with prefect_server(home, *work_pools(home)) as prefect:
        start_worker(prefect, "first")
        yield prefect
    Slices(home).end()


@pytest.fixture(scope="session")
def slices(prefect: Prefect) -> Slices:
    return Slices(prefect.home)


@pytest.fixture(scope="session")
def finished(prefect: Prefect, tmp_path_factory: pytest.TempPathFactory) -> MainJob:
    """An undisturbed run on the pool; nobody writes into its artifacts."""
    place = tmp_path_factory.mktemp("finished")
    job = on_pool(prefect, place / "root", place, *LONG)
    job.succeed()
    return job


@pytest.fixture
def root(finished: MainJob, tmp_path: Path) -> Path:
    """The data of the finished run, without its training."""
    for kind in ("raw", "tokenizers", "tokens", "mixtures"):
        shutil.copytree(finished.root / kind, tmp_path / "root" / kind)
    return tmp_path / "root"


@pytest.fixture
def job(prefect: Prefect, root: Path, tmp_path: Path) -> Iterator[MainJob]:
    job = on_pool(prefect, root, tmp_path, *LONG)
    yield job
    if job.process.poll() is None:
        job.kill(tree=True)
