"""Control flows killed at every stage, and two workers on one pool: one run, one slice, one result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.main_job import MainJob, assert_same_outcome
from tests.prefect_server import Prefect
from tests.tpu_pool import LONG, STEPS, Slices, end_worker, last_names, on_pool, start_worker, trained, until

pytest_plugins = ["tests.tpu_pool_fixtures"]
pytestmark = pytest.mark.slow


@pytest.fixture
def no_capacity(slices: Slices, prefect: Prefect) -> Iterator[Callable[[], None]]:
    """Nothing is granted until the function is called."""

    def grant() -> None:
        slices.order("capacity", slices=99)

    slices.order("capacity", slices=0)
    yield grant
    grant()


def newest(prefect: Prefect, before: int) -> list[str]:
    """The states of the run that came after `before` others; none while there is none."""
    return last_names(prefect) if len(prefect.flow_runs("pretrain")) > before else []


def assert_adopted(prefect: Prefect, slices: Slices, finished: MainJob, job: MainJob, logs: Path, before: int) -> None:
    """The same command again ends well, with the run and the slice that there were."""
    on_pool(prefect, job.root, logs, *LONG).succeed()
    runs = prefect.flow_runs("pretrain")
    assert len(runs) == before + 1
    assert last_names(prefect).count("Running") == 1
    assert slices.attempts(runs[-1]) == [1]
    assert_same_outcome(job.root, finished.root)
    slices.gone()


def test_killed_before_a_worker_took_its_run(
    prefect: Prefect, slices: Slices, finished: MainJob, start: Callable[..., MainJob], tmp_path: Path
) -> None:
    before = len(prefect.flow_runs("pretrain"))
    end_worker(prefect, "first")
    try:
        job = start(*LONG)
        until(lambda: newest(prefect, before), "a run that is scheduled")
        job.kill(tree=True)
        assert newest(prefect, before) in (["Scheduled"], ["Scheduled", "Late"])
    finally:
        start_worker(prefect, "first")
    assert_adopted(prefect, slices, finished, job, tmp_path, before)


def test_killed_while_its_slice_is_queued(
    prefect: Prefect, slices: Slices, finished: MainJob, no_capacity: Callable[[], None], job: MainJob, tmp_path: Path
) -> None:
    before = len(prefect.flow_runs("pretrain"))
    until(lambda: "WaitingForTPU" in newest(prefect, before), "WaitingForTPU")
    job.kill(tree=True)
    assert list(slices.states().values()) == ["WAITING_FOR_RESOURCES"]
    no_capacity()
    assert_adopted(prefect, slices, finished, job, tmp_path, before)


def test_killed_while_nobody_looks_at_the_end_of_training(
    prefect: Prefect, slices: Slices, finished: MainJob, job: MainJob, tmp_path: Path
) -> None:
    before = len(prefect.flow_runs("pretrain"))
    trained(job, 250)
    job.kill(tree=True)
    until(lambda: newest(prefect, before)[-1] == "Completed" and not slices.states(), "the end of training")
    assert_adopted(prefect, slices, finished, job, tmp_path, before)


def test_killed_while_it_exports(prefect: Prefect, slices: Slices, finished: MainJob, job: MainJob, tmp_path: Path) -> None:
    before = len(prefect.flow_runs("pretrain"))
    trained(job, STEPS)
    until(lambda: job.child("model.export"), "the export")
    job.kill(tree=True)
    assert_adopted(prefect, slices, finished, job, tmp_path, before)


def test_two_workers_on_one_pool(prefect: Prefect, slices: Slices, finished: MainJob, start: Callable[..., MainJob]) -> None:
    """Both look at the same slice at the same time, and count what they see only once. Then one is enough."""
    before = len(prefect.flow_runs("pretrain"))
    start_worker(prefect, "second")
    try:
        job = start(*LONG)
        trained(job, 120)
        slices.order("preempt", name=slices.one(), grace=25)
        trained(job, 250)
        end_worker(prefect, "first")
        try:
            job.succeed()
            slices.gone()
        finally:
            start_worker(prefect, "first")
    finally:
        end_worker(prefect, "second")
    (run,) = prefect.flow_runs("pretrain")[before:]
    assert last_names(prefect).count("Preempted") == 1
    assert last_names(prefect).count("Running") == 2
    assert slices.attempts(run) == [1, 2]
    assert_same_outcome(job.root, finished.root)
