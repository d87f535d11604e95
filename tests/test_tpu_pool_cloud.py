"""Whatever Cloud TPU answers, through the worker: refusals, lost answers, failed requests, zones without capacity.

The runs of `pretrain` are asked for directly: `train-llama` would have the root in a bucket, which changes nothing here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.cloud_pool import FIRST, SECOND, CloudRun, SimulatedCloud
from tests.main_job import MainJob, checkpoint_directory, curves
from tests.prefect_server import Prefect

pytest_plugins = ["tests.tpu_pool_fixtures"]
pytestmark = pytest.mark.slow

Code = grpc.StatusCode


@pytest.fixture
def cloud(cloud: SimulatedCloud) -> Iterator[SimulatedCloud]:
    """As it was made, with capacity everywhere."""
    cloud.faults.calls.clear()
    yield cloud
    for zone in (FIRST, SECOND):
        cloud.api.set_capacity(None, zone)
    cloud.supply.provision_seconds = 0.0


@pytest.fixture
def asked(prefect: Prefect, finished: MainJob, tmp_path: Path) -> CloudRun:
    """The job of the finished run, again; nobody has looked at it yet, if the test does not wait."""
    return CloudRun(prefect, finished, tmp_path)


def assert_as_undisturbed(run: CloudRun, cloud: SimulatedCloud, finished: MainJob) -> None:
    """It trained to its end on one slice at a time, which is gone, and the numbers are those of the finished run."""
    run.until_final("Completed")
    cloud.gone()
    assert run.names.count("Running") == 1, run.names
    assert curves(run.directory) == curves(checkpoint_directory(finished.root))


def test_quota_and_a_lost_answer(cloud: SimulatedCloud, finished: MainJob, asked: CloudRun) -> None:
    """429 twice, then a request that is carried out and whose answer is lost; once more while it trains."""
    cloud.faults.order("CreateQueuedResource", Code.RESOURCE_EXHAUSTED, times=2)
    cloud.faults.order("CreateQueuedResource", Code.UNAVAILABLE, after=True)
    asked.submit()
    asked.trained(50)
    assert cloud.faults.calls["CreateQueuedResource"] == 4
    assert cloud.one().endswith("-1")
    cloud.faults.order("ListQueuedResources", Code.RESOURCE_EXHAUSTED, times=2)
    cloud.faults.order("GetGuestAttributes", Code.UNAVAILABLE, times=2)
    cloud.faults.order("DeleteQueuedResource", Code.UNAVAILABLE, after=True)
    assert_as_undisturbed(asked, cloud, finished)
    assert not cloud.faults.left


@pytest.mark.parametrize("how", ["it fails the request", "it has no capacity"])
def test_the_next_zone(cloud: SimulatedCloud, finished: MainJob, asked: CloudRun, how: str) -> None:
    cloud.api.set_capacity(0, FIRST)
    asked.submit()
    name = cloud.one()
    assert name.startswith(FIRST)
    if how == "it fails the request":
        cloud.api.events.fail(name, "There is no more capacity in the zone")
    assert_as_undisturbed(asked, cloud, finished)
    (moved,) = [state["message"] for state in asked.states if state["name"] == "NextZone"]
    # Cloud TPU fails a request that waited too long, and the worker counts too
    assert moved.startswith(("Cloud TPU failed the request: ", "no TPU after "))
    assert moved.endswith("trying zone 2 of 2")
    assert asked.run["infrastructure_pid"].startswith(SECOND)


def test_a_refusal_names_the_role_that_is_missing(cloud: SimulatedCloud, asked: CloudRun) -> None:
    """By a state that says that nobody tries it again: whoever waits for the run waits no longer."""
    cloud.faults.order("CreateQueuedResource", Code.PERMISSION_DENIED)
    asked.submit()
    state = asked.until_final("GaveUp")
    assert state["type"] == "CRASHED"
    assert "Cloud TPU refuses this account at projects/p/locations/us-central2-b" in state["message"]
    assert "roles/tpu.admin" in state["message"]
    assert cloud.faults.calls["CreateQueuedResource"] == 1
    assert not cloud.states()


def test_preempted_before_it_had_hosts(cloud: SimulatedCloud, finished: MainJob, asked: CloudRun) -> None:
    cloud.supply.provision_seconds = 600.0
    asked.submit()
    name = cloud.one()
    asked.until_named("ProvisioningTPU")
    cloud.supply.provision_seconds = 0.0
    cloud.api.events.preempt(name, grace=0.0)
    assert_as_undisturbed(asked, cloud, finished)
    assert asked.names.count("Preempted") == 1, asked.names
