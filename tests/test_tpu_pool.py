"""A run that leaves the laptop: control flow, worker, slice of two hosts, training, export; and everything that can go wrong in between."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.main_job import MainJob, assert_same_outcome
from tests.prefect_server import Prefect, wait_until_healthy
from tests.tpu_pool import LONG, STEPS, Slices, kill_worker, last_names, node_of, on_pool, saved_step, trained, until

pytest_plugins = ["tests.tpu_pool_fixtures"]
pytestmark = pytest.mark.slow

DISTURBANCES: dict[str, tuple[Callable[[Slices, str], None], str | None]] = {
    "preempted with notice": (lambda slices, name: slices.order("preempt", name=name, grace=25), "Preempted"),
    "preempted without": (lambda slices, name: slices.order("preempt", name=name, grace=0), "Preempted"),
    "rebooted": (lambda slices, name: slices.order("reboot", name=name, grace=0), None),
    "a follower dies": (lambda slices, name: slices.order("kill_host", node=node_of(name), worker=1), "HostFailed"),
    "the leader dies": (lambda slices, name: slices.order("kill_host", node=node_of(name), worker=0), "HostFailed"),
}


@pytest.mark.parametrize("what", DISTURBANCES)
def test_it_goes_on_and_ends_bit_equal(prefect: Prefect, slices: Slices, finished: MainJob, job: MainJob, what: str) -> None:
    disturb, state = DISTURBANCES[what]
    trained(job, 120)
    name = slices.one()
    disturb(slices, name)
    job.succeed()
    names = last_names(prefect)
    assert names[-1] == "Completed"
    assert names.count("Running") >= 2, names
    assert {"Preempted", "HostFailed"} & {*names} == ({state} if state else set()), names
    assert_same_outcome(job.root, finished.root)
    slices.gone()


@pytest.mark.parametrize("when", ["waiting", "training", "ending"])
def test_the_worker_is_killed(prefect: Prefect, slices: Slices, finished: MainJob, job: MainJob, when: str) -> None:
    before = len(prefect.flow_runs("pretrain"))
    if when == "waiting":
        slices.order("capacity", slices=0)
        until(lambda: len(prefect.flow_runs("pretrain")) > before and "WaitingForTPU" in last_names(prefect), "WaitingForTPU")
        kill_worker(prefect)
        slices.order("capacity", slices=99)
    else:
        trained(job, 120 if when == "training" else STEPS)
        kill_worker(prefect)
    job.succeed()
    assert len(prefect.flow_runs("pretrain")) == before + 1
    assert "HostFailed" not in last_names(prefect)
    assert_same_outcome(job.root, finished.root)
    slices.gone()


def test_the_control_flow_is_killed_and_adopts_its_run(
    prefect: Prefect, slices: Slices, finished: MainJob, job: MainJob, tmp_path: Path
) -> None:
    before = len(prefect.flow_runs("pretrain"))
    trained(job, 50)
    job.kill(tree=True)
    again = on_pool(prefect, job.root, tmp_path, *LONG)
    again.succeed()
    assert len(prefect.flow_runs("pretrain")) == before + 1
    assert last_names(prefect).count("Running") == 1
    links = [artifact["data"] for artifact in prefect.post("/artifacts/filter") if artifact["key"] == "training-run"]
    child = prefect.flow_runs("pretrain")[-1]["id"]
    assert sum(child in link for link in links) == 2  # the second control flow shows the run that it adopted
    assert_same_outcome(job.root, finished.root)
    slices.gone()


def test_ctrl_c_saves_and_gives_the_slice_back(prefect: Prefect, slices: Slices, finished: MainJob, job: MainJob, tmp_path: Path) -> None:
    trained(job, 120)
    job.interrupt()
    assert job.status() == 130, job.output
    assert "run the same command again" in job.output
    slices.gone()
    assert last_names(prefect)[-1] == "Cancelled"
    assert saved_step(job.root) % 50, "it saved where it was, not only where it would have anyway"
    again = on_pool(prefect, job.root, tmp_path, *LONG)
    again.succeed()
    assert_same_outcome(job.root, finished.root)


def test_cancelled_while_it_waits(prefect: Prefect, slices: Slices, finished: MainJob, root: Path, tmp_path: Path) -> None:
    before = len(prefect.flow_runs("pretrain"))
    slices.order("capacity", slices=0)
    job = on_pool(prefect, root, tmp_path, *LONG)
    try:
        until(lambda: len(prefect.flow_runs("pretrain")) > before and "WaitingForTPU" in last_names(prefect), "WaitingForTPU")
        run = prefect.flow_runs("pretrain")[-1]
        prefect.post(f"/flow_runs/{run['id']}/set_state", state={"type": "CANCELLING"})
        began = time.monotonic()
        until(lambda: last_names(prefect)[-1] == "Cancelled" and not slices.states(), "the end of the slice", 60)
        print(f"cancelled within {time.monotonic() - began:.1f} s")
        assert job.status() == 130, job.output
    finally:
        slices.order("capacity", slices=99)


def test_the_prefect_server_is_away_for_a_minute(prefect: Prefect, slices: Slices, finished: MainJob, job: MainJob) -> None:
    trained(job, 50)
    server = prefect.processes[0]
    os.kill(server.pid, signal.SIGKILL)
    server.wait()
    time.sleep(60)
    again = prefect.start("server", "start", "--host", "127.0.0.1", "--port", prefect.api.split(":")[2].split("/")[0])
    prefect.processes[0] = again
    wait_until_healthy(prefect.api, again)
    job.succeed()
    assert_same_outcome(job.root, finished.root)
    until(lambda: not slices.states(), "the end of the slice", 120)


def test_no_tpu_in_any_zone(prefect: Prefect, slices: Slices, finished: MainJob, root: Path, tmp_path: Path) -> None:
    slices.order("capacity", slices=0)
    job = on_pool(prefect, root, tmp_path, *LONG)
    try:
        slices.order("fail", name=slices.one(), message="There is no more capacity in the zone")
        assert job.status() == 1, job.output
    finally:
        slices.order("capacity", slices=99)
    assert "GaveUp: Cloud TPU failed the request: There is no more capacity in the zone" in job.output
    assert "name more zones, or another slice" in job.output
    slices.gone()
