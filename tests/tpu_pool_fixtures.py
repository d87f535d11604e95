"""Fixtures of the tests of the pool: one server, one worker and one undisturbed run for all of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cloud_pool import WORKER_SECRETS, SimulatedCloud, simulated_cloud
from tests.main_job import MainJob
from tests.prefect_server import Prefect, prefect_server
from tests.tpu_pool import LONG, Slices, on_pool, start_worker, work_pools


@pytest.fixture(scope="session")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    home = tmp_path_factory.mktemp("prefect")
    with prefect_server(home, *work_pools(home)) as prefect:
        start_worker(prefect, "first")
        yield prefect


@pytest.fixture(scope="session")
def slices(prefect: Prefect) -> Slices:
    return Slices(prefect.home)


@pytest.fixture(scope="session")
def cloud(prefect: Prefect, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimulatedCloud]:
    """The pool `cloud`, whose worker has secrets of its own that nobody else is to see."""
    with simulated_cloud(prefect, tmp_path_factory.mktemp("cloud"), **WORKER_SECRETS) as cloud:
        yield cloud


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
def start(prefect: Prefect, root: Path, tmp_path: Path) -> Iterator[Callable[..., MainJob]]:
    """`on_pool` with the data of the finished run; what still runs at the end of the test is killed."""
    jobs: list[MainJob] = []

    def start(*arguments: str, **options: str) -> MainJob:
        jobs.append(on_pool(prefect, root, tmp_path, *arguments, **options))
        return jobs[-1]

    yield start
    for job in jobs:
        if job.process.poll() is None:
            job.kill(tree=True)


@pytest.fixture
def job(start: Callable[..., MainJob]) -> MainJob:
    return start(*LONG)
