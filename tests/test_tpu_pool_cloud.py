"""Whatever Cloud TPU answers, through the worker: refusals, lost answers, failed requests, zones without capacity."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import grpc
import pytest

from tests.cloud_pool import FIRST, POOL, SECOND, SimulatedCloud
from tests.main_job import MainJob, assert_same_outcome
from tests.prefect_server import Prefect
from tests.tpu_pool import LONG, last_names, states_of, trained, until

pytest_plugins = ["tests.tpu_pool_fixtures"]
pytestmark = pytest.mark.slow

Code = grpc.StatusCode


@pytest.fixture
def cloud(cloud: SimulatedCloud) -> Iterator[SimulatedCloud]:
    """As it was made, with capacity everywhere."""
    yield cloud
    for zone in (FIRST, SECOND):
        cloud.api.set_capacity(None, zone)
    cloud.supply.provision_seconds = 0.0


def test_quota_and_a_lost_answer(prefect: Prefect, cloud: SimulatedCloud, finished: MainJob, start: Callable[..., MainJob]) -> None:
    """429 twice, then a request that is carried out and whose answer is lost; once more while it trains."""
    cloud.faults.calls.clear()
    cloud.faults.order("CreateQueuedResource", Code.RESOURCE_EXHAUSTED, times=2)
    cloud.faults.order("CreateQueuedResource", Code.UNAVAILABLE, after=True)
    job = start(*LONG, pool=POOL)
    trained(job, 50)
    assert cloud.faults.calls["CreateQueuedResource"] == 4
    assert cloud.one().endswith("-1")
    cloud.faults.order("ListQueuedResources", Code.RESOURCE_EXHAUSTED, times=2)
    cloud.faults.order("GetGuestAttributes", Code.UNAVAILABLE, times=2)
    cloud.faults.order("DeleteQueuedResource", Code.UNAVAILABLE, after=True)
    job.succeed()
    cloud.gone()
    assert not cloud.faults.left
    assert last_names(prefect).count("Running") == 1
    assert_same_outcome(job.root, finished.root)


@pytest.mark.parametrize("how", ["it fails the request", "it has no capacity"])
def test_the_next_zone(prefect: Prefect, cloud: SimulatedCloud, finished: MainJob, start: Callable[..., MainJob], how: str) -> None:
    cloud.api.set_capacity(0, FIRST)
    job = start(*LONG, pool=POOL)
    name = cloud.one()
    assert name.startswith(FIRST)
    if how == "it fails the request":
        cloud.api.events.fail(name, "There is no more capacity in the zone")
    job.succeed()
    cloud.gone()
    run = prefect.flow_runs("pretrain")[-1]
    (moved,) = [state["message"] for state in states_of(prefect, run) if state["name"] == "NextZone"]
    assert moved.startswith("Cloud TPU failed the request: ")
    assert moved.endswith("trying zone 2 of 2")
    assert run["infrastructure_pid"].startswith(SECOND)
    assert_same_outcome(job.root, finished.root)


def test_a_refusal_names_the_role_that_is_missing(prefect: Prefect, cloud: SimulatedCloud, start: Callable[..., MainJob]) -> None:
    cloud.faults.calls.clear()
    cloud.faults.order("CreateQueuedResource", Code.PERMISSION_DENIED)
    before = len(prefect.flow_runs("pretrain"))
    job = start(*LONG, pool=POOL)
    until(lambda: len(prefect.flow_runs("pretrain")) > before, "a run")
    state = until(lambda: (found := prefect.flow_runs("pretrain")[-1]["state"])["type"] == "CRASHED" and found, "its end")
    began = time.monotonic()
    assert state["name"] == "GaveUp"
    assert "Cloud TPU refuses this account at projects/p/locations/us-central2-b" in state["message"]
    assert "roles/tpu.admin" in state["message"]
    assert job.status() == 1, job.output
    assert time.monotonic() - began < 30, "nobody waits for another try of what stays refused"
    assert "roles/tpu.admin" in job.output
    assert "Traceback" not in job.output
    assert cloud.faults.calls["CreateQueuedResource"] == 1
    assert not cloud.states()


def test_preempted_before_it_had_hosts(prefect: Prefect, cloud: SimulatedCloud, finished: MainJob, start: Callable[..., MainJob]) -> None:
    cloud.supply.provision_seconds = 600.0
    job = start(*LONG, pool=POOL)
    name = cloud.one()
    until(lambda: cloud.states().get(name) == "PROVISIONING", "PROVISIONING")
    until(lambda: "ProvisioningTPU" in last_names(prefect), "ProvisioningTPU")
    cloud.supply.provision_seconds = 0.0
    cloud.api.events.preempt(name, grace=0.0)
    job.succeed()
    cloud.gone()
    names = last_names(prefect)
    assert names.count("Preempted") == 1, names
    assert names.count("Running") == 1, names
    assert_same_outcome(job.root, finished.root)
