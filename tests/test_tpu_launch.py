"""How a run gets its next slice where an older one stays, a quota is used up, Cloud TPU does not answer, or it is cancelled meanwhile."""

from __future__ import annotations

import asyncio
from types import MethodType
from typing import Any

import httpx
import pytest
from google.api_core.exceptions import FailedPrecondition
from prefect.client.schemas.objects import State, StateType

from deployments.tpu import launch as module
from deployments.tpu.cloud import Exhausted, Unavailable
from deployments.tpu.launch import Postponed
from deployments.tpu.reconcile import Reconciler
from deployments.tpu.worker import TPUWorker
from tests.simulated_pool import CONFIGURATION, FIRST, SECOND, Clouds, Server, now, worker

QUOTA = Exhausted("Cloud TPU refused for 600 s for a quota at there (429 TPUV4PodPerProjectPerZone)")


class Told:
    """What a worker says to Prefect: the slice's name, or what kept it from being made."""

    value: Any = None

    def started(self, value: Any) -> None:
        self.value = value


def submit(server: Server, clouds: Clouds, run: Any, by: Any = None) -> Any:
    """A worker takes the run and asks for its slice, as Prefect has it do."""
    one, told = by or worker(server, clouds), Told()
    one._postpone = MethodType(TPUWorker._postpone, one)
    server.put(run.id, State(type=StateType.PENDING, name="Submitting"))
    asyncio.run(TPUWorker.run(one, server.runs[run.id], CONFIGURATION, task_status=told))  # pyright: ignore[reportArgumentType]
    return told.value


def waits(server: Server, run: Any) -> float:
    """Seconds until the run is tried again."""
    due = server.state(run).state_details.scheduled_time
    assert due is not None
    return (due - now()).total_seconds()


@pytest.mark.parametrize("refused", [False, True])
def test_a_run_waits_by_name_for_its_older_slice_to_be_gone(monkeypatch: pytest.MonkeyPatch, refused: bool) -> None:
    monkeypatch.setattr(module, "GONE_SECONDS", 0.05)
    server, clouds = Server(), Clouds()
    run = server.run("PENDING")
    old = clouds.put(run, "ACTIVE" if refused else "DELETING")
    if refused:
        clouds.errors["delete", old] = FailedPrecondition("it is being changed")
    for pause in (30, 60, 120):
        assert isinstance(submit(server, clouds, run), Postponed)
        state = server.state(run)
        assert (state.type, state.name) == (StateType.SCHEDULED, "WaitingForDeletion")
        assert f"waits for the slice {old}" in (state.message or "")
        assert "gcloud compute tpus queued-resources delete" in (state.message or "")
        assert ("it is being changed" in (state.message or "")) == refused
        assert pause - 5 < waits(server, run) <= pause
    clouds.there.clear()
    assert submit(server, clouds, run) == f"{FIRST}/queuedResources/pl-{run.id.hex}-1"
    assert "Crashed" not in server.names(run)
    assert "HostFailed" not in server.names(run)


def test_an_older_slice_in_a_zone_that_the_form_names_no_more_is_waited_for() -> None:
    server, clouds = Server(), Clouds()
    run = server.run("PENDING")
    old = clouds.put(run, place="projects/p/locations/europe-west4-a", attempt=3)
    server.runs[run.id].infrastructure_pid = old
    assert submit(server, clouds, run).endswith("-4")
    assert clouds.deleted == [old]


def test_a_quota_that_is_used_up_means_the_next_zone_and_then_to_wait() -> None:
    server, clouds = Server(), Clouds()
    run = server.run("PENDING")
    for place in (FIRST, SECOND):
        clouds.errors["create", place] = QUOTA
    assert isinstance(submit(server, clouds, run), Postponed)
    assert (server.state(run).type, server.state(run).name) == (StateType.SCHEDULED, "NextZone")
    assert (server.state(run).message or "").endswith("trying zone 2 of 2")
    submit(server, clouds, run)
    state = server.state(run)
    assert (state.type, state.name) == (StateType.SCHEDULED, "WaitingForQuota")
    for word in (
        "TPUV4PodPerProjectPerZone",
        "1 x v4-16, spot, in us-east5-a",
        "quotas?service=tpu.googleapis.com&project=p",
        "more `zones`",
    ):
        assert word in (state.message or "")
    assert 25 < waits(server, run) <= 30
    for _ in range(8):
        submit(server, clouds, run)
    assert 890 < waits(server, run) <= 900
    assert set(server.names(run)) == {"Pending", "Submitting", "NextZone", "WaitingForQuota"}  # no failure is counted, nothing ends
    del clouds.errors["create", FIRST]  # the quota of either zone may come back
    names = [submit(server, clouds, run), submit(server, clouds, run)]
    assert any(isinstance(name, str) and name.startswith(FIRST) for name in names)


def test_after_the_run_ran_it_waits_shortly_again() -> None:
    server, clouds = Server(), Clouds()
    run = server.run("PENDING")
    clouds.errors["slices", FIRST] = Unavailable("Cloud TPU did not do for 25 s what it was asked")
    for _ in range(3):
        submit(server, clouds, run)
    server.put(run.id, State(type=StateType.RUNNING, name="Running"))
    submit(server, clouds, run)
    assert server.state(run).name == "WaitingForAPI"
    assert 25 < waits(server, run) <= 30
    assert not clouds.there  # an older slice may be where Cloud TPU does not answer


def test_a_run_that_is_cancelled_while_it_is_to_wait_stays_cancelled() -> None:
    server, clouds = Server(), Clouds()
    run = server.run("PENDING")
    clouds.errors["create", FIRST] = QUOTA
    clouds.before_create = lambda: server.put(run.id, State(type=StateType.CANCELLED, name="Cancelled"))
    assert isinstance(submit(server, clouds, run), Postponed)
    assert server.names(run)[-1] == "Cancelled"


@pytest.mark.parametrize("how", ["cancelled", "deleted"])
def test_a_slice_that_is_made_for_a_run_that_ended_meanwhile_is_deleted(how: str) -> None:
    server, clouds = Server(), Clouds()
    run = server.run("PENDING")

    def end() -> None:
        if how == "cancelled":
            server.put(run.id, State(type=StateType.CANCELLED, name="Cancelled"))
        else:
            del server.runs[run.id]

    clouds.before_create = end
    assert clouds.deleted == [submit(server, clouds, run)]
    assert not clouds.there


def test_the_loop_finds_a_slice_wherever_the_worker_asked_for_it() -> None:
    """In zones that only a run's own form names; it is cancelled when nobody can see that, and its record goes."""
    server, clouds = Server(), Clouds()
    one = worker(server, clouds, provider="cloud", project="p")
    run, loop = server.run("PENDING"), Reconciler(one)
    asyncio.run(loop.look())
    assert not clouds.asked
    read, server.read_flow_run = server.read_flow_run, away  # pyright: ignore[reportAttributeAccessIssue]
    name = submit(server, clouds, run, one)
    assert name in clouds.there  # the server is away: it may still be wanted
    server.read_flow_run = read
    del server.runs[run.id]
    asyncio.run(loop.look())
    assert clouds.deleted == [name]


async def away(run: Any) -> Any:
    raise httpx.ConnectError("the server is away")


def test_zones_in_turn() -> None:
    def zone(*names: str) -> str:
        return module.zone_to_ask(["a", "b", "c"], [State(type=StateType.SCHEDULED, name=name) for name in names])

    assert [zone(*["NextZone"] * count) for count in range(5)] == ["a", "b", "c", "c", "c"]
    assert zone("WaitingForAPI") == "a"
    left = ["NextZone"] * 2
    assert [zone(*left, *["WaitingForQuota"] * count) for count in range(4)] == ["c", "a", "b", "c"]
