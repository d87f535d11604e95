"""The worker's loop beside errors, other workers, other clocks, and slices that nobody wrote down."""

from __future__ import annotations

import asyncio
import dataclasses
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from google.api_core.exceptions import FailedPrecondition, NotFound
from prefect.client.schemas.objects import State, StateType

from deployments.tpu import reconcile as module
from deployments.tpu import standing
from deployments.tpu.cloud import Unavailable
from deployments.tpu.reconcile import Reconciler
from deployments.tpu.worker import TPUWorker
from tests.simulated_pool import FIRST, FORM, SECOND, ZONES, Clouds, Server, now, worker


def looks(loop: Reconciler, times: int = 1) -> None:
    async def look() -> None:
        for _ in range(times):
            await loop.look()

    asyncio.run(look())


def told(caplog: pytest.LogCaptureFixture, what: str) -> int:
    return sum(what in record.getMessage() for record in caplog.records if record.levelname == "WARNING")


@pytest.mark.parametrize("error", [NotFound("no"), FailedPrecondition("no"), Unavailable("503"), RuntimeError("?")])
def test_a_place_that_does_not_answer_is_told_once_and_keeps_no_other(caplog: pytest.LogCaptureFixture, error: Exception) -> None:
    server, clouds = Server(), Clouds()
    done, there = server.run("COMPLETED", ago=600), server.run("RUNNING", pid=f"{FIRST}/queuedResources/pl-0-1")
    name = clouds.put(done, exit_codes={0: 0}, place=SECOND)
    clouds.errors["slices", FIRST] = error
    looks(loop := Reconciler(worker(server, clouds, **FORM)), times=5)
    assert clouds.deleted == [name]
    assert server.names(there) == ["Running"]  # its slice may well be there
    assert told(caplog, f"looking for slices in {FIRST}: {type(error).__name__}: ") == 1
    assert all("; " in record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    clouds.errors.clear()
    looks(loop)
    clouds.errors["slices", FIRST] = error
    looks(loop, times=2)
    assert told(caplog, f"looking for slices in {FIRST}") == 2  # it was in order in between


def test_a_slice_that_cannot_be_deleted_keeps_no_other(caplog: pytest.LogCaptureFixture) -> None:
    server, clouds = Server(), Clouds()
    kept, *others = (clouds.put(server.run("COMPLETED"), exit_codes={0: 0}) for _ in range(3))
    clouds.errors["delete", kept] = FailedPrecondition("it is locked")
    looks(Reconciler(worker(server, clouds, **FORM)), times=3)
    assert clouds.deleted == others
    assert told(caplog, "it is locked") == 1
    assert told(caplog, "gcloud compute tpus queued-resources list") == 1


def test_a_run_that_cannot_be_looked_after_keeps_no_other(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    server, clouds = Server(), Clouds()
    broken, lost = (server.run("RUNNING", pid=f"{FIRST}/queuedResources/pl-{uuid4().hex}-1") for _ in range(2))

    async def limits(self: Any, run: Any) -> Any:
        if run.id == broken.id:
            raise ValueError("its form is wrong")
        return module.Limits()

    monkeypatch.setattr(Reconciler, "_limits", limits)
    looks(Reconciler(worker(server, clouds, **FORM)), times=4)
    assert server.names(lost) == ["Running", "HostFailed"]
    assert server.names(broken) == ["Running"]
    assert told(caplog, "its form is wrong") == 1


def test_what_hosts_say_may_fail_and_money_is_still_counted() -> None:
    server, clouds = Server(), Clouds()
    run = server.run("RUNNING")
    name = clouds.put(run, active_since=now())
    looks(loop := Reconciler(worker(server, clouds, **FORM)))
    clouds.errors["with_hosts", name] = FailedPrecondition("no")
    labels = clouds.there[name].labels | {"max-active-seconds": "0"}
    clouds.there[name] = dataclasses.replace(clouds.there[name], labels=labels, active_since=None)
    looks(loop)
    assert server.names(run) == ["Running", "GaveUp"]
    assert clouds.deleted == [name]


@pytest.mark.parametrize("ahead", [-600.0, 0.0, 600.0])
def test_a_crashed_run_is_tried_again_whatever_the_clocks_say(ahead: float) -> None:
    server, clouds = Server(ahead=ahead), Clouds()
    run = server.run("CRASHED", ago=60)  # the worker was started again, or looked at something else
    name = clouds.put(run, exit_codes={0: 1})
    looks(Reconciler(worker(server, clouds, **FORM)))
    assert server.names(run) == ["Crashed", "HostFailed"]
    assert clouds.deleted == [name]
    due = server.state(run).state_details.scheduled_time
    assert due is not None
    assert (due - now()).total_seconds() < 5
    assert (due - now() - server.ahead).total_seconds() < 5  # the server has it wait no longer


def test_a_crash_beyond_the_budget_is_named_so_and_its_host_has_time_for_its_log() -> None:
    server, clouds = Server(), Clouds()
    run = server.run("CRASHED")
    name = clouds.put(run)
    clouds.there[name] = dataclasses.replace(clouds.there[name], labels=clouds.there[name].labels | {"max-failures": "0"})
    looks(Reconciler(worker(server, clouds, **FORM)), times=3)
    assert server.names(run) == ["Crashed", "GaveUp"]
    assert server.state(run).type is StateType.CRASHED
    assert not clouds.deleted


@pytest.mark.parametrize("ahead", [-600.0, 600.0])
def test_nobody_waits_any_more_for_a_run_that_crashed_long_ago(ahead: float) -> None:
    server, clouds = Server(ahead=ahead), Clouds()
    run = server.run("CRASHED", ago=130)
    name = clouds.put(run, exit_codes={0: 1})
    looks(Reconciler(worker(server, clouds, **FORM)))
    assert server.names(run) == ["Crashed"]
    assert clouds.deleted == [name]


def test_a_cancelled_run_has_its_time_to_save_whatever_the_clocks_say() -> None:
    server, clouds = Server(ahead=-600.0), Clouds()
    run = server.run("RUNNING")
    server.put(run.id, State(type=StateType.CANCELLING, name="Cancelling"))
    clouds.put(run)
    looks(Reconciler(worker(server, clouds, **FORM)), times=3)
    assert server.names(run) == ["Running", "Cancelling"]
    assert not clouds.deleted


def test_the_loop_comes_soon_whatever_an_old_form_says() -> None:
    loop = Reconciler(worker(Server(), Clouds(), **FORM, poll_seconds=300.0))
    assert asyncio.run(loop.look()) <= 10
    assert TPUWorker.get_default_base_job_template()["variables"]["properties"]["poll_seconds"]["maximum"] == 10


@pytest.mark.parametrize("later", [[], [(StateType.PENDING, "WaitingForTPU"), (StateType.RUNNING, "Running")]])
def test_what_another_worker_did_meanwhile_is_not_done_again(later: list[tuple[StateType, str]]) -> None:
    server, clouds = Server(), Clouds()
    run = server.run("CRASHED")
    old = clouds.put(run, exit_codes={0: 1})
    loop = Reconciler(worker(server, clouds, **FORM))
    read, expected = server.read_flow_run_states, ["Crashed", "HostFailed", *(name for _, name in later)]

    async def taken_up(identity: Any) -> list[State]:
        states = await read(identity)
        for type_, name in [(StateType.SCHEDULED, "HostFailed"), *later]:
            server.put(identity, State(type=type_, name=name))
        if later:
            clouds.put(run, attempt=2)
        server.read_flow_run_states = read
        return states

    server.read_flow_run_states = taken_up
    looks(loop)
    assert server.names(run) == expected
    looks(loop, times=2)
    assert server.names(run) == expected
    assert clouds.deleted == [old]


def test_two_states_of_one_event_count_once() -> None:
    server, clouds = Server(), Clouds()
    run = server.run("RUNNING")
    for _ in range(3):  # at most three failures: six states of three events
        for type_, name in [(StateType.SCHEDULED, "HostFailed")] * 2 + [(StateType.PENDING, "Pending"), (StateType.RUNNING, "Running")]:
            server.put(run.id, State(type=type_, name=name))
        if server.names(run).count("Running") == 3:
            clouds.put(run, exit_codes={0: 1})
            looks(Reconciler(worker(server, clouds, **FORM)))
            assert server.names(run)[-1] == "HostFailed"
            return
    raise AssertionError("unreachable")


@pytest.mark.parametrize("name", ["HostFailed", "Preempted"])
def test_a_worker_that_died_after_it_set_the_state_leaves_a_slice_that_the_next_look_deletes(name: str) -> None:
    server, clouds = Server(), Clouds()
    run = server.run("RUNNING")
    server.put(run.id, State(type=StateType.SCHEDULED, name=name))
    old = clouds.put(run, exit_codes={0: 1})
    looks(Reconciler(worker(server, clouds, **FORM)), times=2)
    assert clouds.deleted == [old]
    assert server.names(run) == ["Running", name]


def test_an_event_is_not_counted_again_while_the_next_slice_is_asked_for() -> None:
    """Its state was set, its slice is still there, and a worker took it up already."""
    server, clouds = Server(), Clouds()
    run = server.run("RUNNING")
    server.put(run.id, State(type=StateType.SCHEDULED, name="HostFailed"))
    server.put(run.id, State(type=StateType.PENDING, name="Submitting"))
    old = clouds.put(run, exit_codes={0: 1})
    server.runs[run.id].infrastructure_pid = old
    one = worker(server, clouds, **FORM)
    one._submitting_flow_run_ids.add(run.id)
    looks(Reconciler(one), times=3)
    assert server.names(run) == ["Running", "HostFailed", "Submitting"]


@pytest.mark.parametrize("where", ["deployment", "run"])
def test_zones_of_job_variables_are_looked_at(where: str) -> None:
    """The form leaves them open. The run, or its record, is gone: nobody wrote down where its slice is."""
    server, clouds = Server(), Clouds()
    orphan = clouds.put(SimpleNamespace(id=uuid4()), place=SECOND)
    variables = {"zones": ZONES[1:]}
    if where == "deployment":
        server.deployments.append(SimpleNamespace(id=uuid4(), job_variables=variables))
    else:
        server.run("CANCELLED", job_variables=variables)
    looks(Reconciler(worker(server, clouds, provider="cloud", project="p")))
    assert clouds.asked == [SECOND]
    assert clouds.deleted == [orphan]


def test_a_waiting_run_says_each_minute_where_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one artifact: neither its states nor its artifacts grow."""
    server, clouds = Server(), Clouds()
    run = server.run("PENDING")
    clouds.put(run, "WAITING_FOR_RESOURCES", age=30)
    loop = Reconciler(worker(server, clouds, **FORM))
    looks(loop, times=3)
    (artifact,) = server.artifacts
    assert artifact.key == "tpu-slice"
    assert "us-central2-b is WAITING_FOR_RESOURCES" in artifact.data
    assert "queued-resources?project=p" in artifact.data
    message = server.state(run).message or ""
    assert "artifact" in message
    assert " ago" not in message  # it would stay true for a minute
    clouds.put(run, "WAITING_FOR_RESOURCES", age=3 * 3600 + 60)
    first = artifact.data
    looks(loop)
    assert artifact.data == first  # not at every look
    monkeypatch.setattr(standing, "REFRESH_SECONDS", 0.0)
    looks(loop)
    assert "That was 3 h 1 min ago" in artifact.data
    looks(Reconciler(worker(server, clouds, **FORM)), times=2)  # started again
    assert server.artifacts == [artifact]
    assert server.names(run) == ["Pending", "WaitingForTPU"]
    clouds.put(run, "ACTIVE", age=3 * 3600 + 120)
    server.put(run.id, State(type=StateType.RUNNING, name="Running"))
    looks(loop, times=2)
    assert "is ACTIVE" in artifact.data
