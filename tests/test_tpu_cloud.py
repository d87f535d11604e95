"""The worker's client of Cloud TPU, against an API that answers late, badly, or not at all; and which slices nobody needs."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import grpc
import pytest
from prefect.exceptions import ObjectNotFound

from deployments.tpu import cloud as module
from deployments.tpu.cloud import CloudTpu, Exhausted, Refused, Unavailable
from deployments.tpu.emulator.service import Service
from deployments.tpu.form import TPUJobConfiguration
from deployments.tpu.request import SliceName, labels
from deployments.tpu.sweep import why_unneeded
from tests.simulated_slices import made_clouds

RUN = UUID("12345678-1234-5678-1234-567812345678")
CONFIGURATION = TPUJobConfiguration(provider="cloud", project="p", zones=["us-central2-b"], image="i", accelerator_type="v4-16")
PARENT = CONFIGURATION.parent("us-central2-b")
NAME = str(SliceName(RUN, 1))
PATIENCE = module.PATIENCE_SECONDS
SCRIPT = {"startup-script": "#!/bin/sh\nsleep 1000\n", "enable-guest-attributes": "TRUE"}


@pytest.fixture
def clouds(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    with made_clouds(tmp_path) as make:
        yield make


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 8.0)
    monkeypatch.setattr(module, "FIRST_PAUSE_SECONDS", 0.05)


def against(service: Service, test: Callable[[CloudTpu], Awaitable[None]]) -> None:
    address = service.start()

    async def connect() -> None:
        async with asyncio.timeout(60):
            await test(CloudTpu(address))

    asyncio.run(connect())


async def create(cloud: CloudTpu, attempt: int = 1) -> str:
    return await cloud.create(CONFIGURATION, "us-central2-b", str(SliceName(RUN, attempt)), labels(CONFIGURATION, RUN, "tpu"), SCRIPT)


class Faults:
    """Answers the first calls of a method with an error: before it is carried out, or after, when only the answer is lost."""

    def __init__(self, method: str, code: grpc.StatusCode, *, times: int, after: bool = False) -> None:
        self._method, self._code, self._left, self._after = method, code, times, after
        self.calls = 0

    def __call__(self, method: str, request: Any, call: Callable[[], Any]) -> Any:
        self.calls += method == self._method
        if method != self._method or self._left <= 0:
            return call()
        self._left -= 1
        if self._after:
            call()
        raise module_refusal(self._code)


def module_refusal(code: grpc.StatusCode) -> Exception:
    from deployments.tpu.emulator.refusal import Refusal

    return Refusal(code, "injected")


def test_a_request_whose_answer_is_lost_is_there_once(clouds: Callable[..., Service]) -> None:
    faults = Faults("CreateQueuedResource", grpc.StatusCode.UNAVAILABLE, times=2, after=True)

    async def test(cloud: CloudTpu) -> None:
        name = await create(cloud)
        assert name == f"{PARENT}/queuedResources/{NAME}"
        assert [each.name for each in await cloud.slices(PARENT, lambda labels: True)] == [name]
        assert await create(cloud) == name  # asked again by another worker

    against(clouds(around=faults), test)
    assert faults.calls == 3


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL])
def test_what_passes_is_tried_again(clouds: Callable[..., Service], code: grpc.StatusCode) -> None:
    faults = Faults("ListQueuedResources", code, times=3)

    async def test(cloud: CloudTpu) -> None:
        assert await cloud.slices(PARENT, lambda labels: True) == []

    against(clouds(around=faults), test)
    assert faults.calls == 4


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (grpc.StatusCode.PERMISSION_DENIED, "give it the role roles/tpu.admin in that project"),
        (grpc.StatusCode.UNAUTHENTICATED, "gcloud auth application-default login"),
        (grpc.StatusCode.INVALID_ARGUMENT, "refuses the request at projects/p/locations/us-central2-b"),
    ],
)
def test_what_stays_is_told_at_once_with_the_remedy(clouds: Callable[..., Service], code: grpc.StatusCode, words: str) -> None:
    faults = Faults("CreateQueuedResource", code, times=9)

    async def test(cloud: CloudTpu) -> None:
        with pytest.raises(Refused, match=words):
            await create(cloud)

    against(clouds(around=faults), test)
    assert faults.calls == 1


def test_a_slice_from_its_request_to_its_deletion(clouds: Callable[..., Service]) -> None:
    async def test(cloud: CloudTpu) -> None:
        name = await create(cloud)
        while (seen := (await cloud.slices(PARENT, lambda labels: labels["prefect-work-pool"] == "tpu"))[0]).state != "ACTIVE":
            await asyncio.sleep(0.05)
        seen = await cloud.with_hosts(seen)  # the attributes of its hosts answer 404: nobody has written any
        assert seen.labels["prefect-flow-run-id"] == str(RUN)
        assert (seen.lost_nodes, seen.exit_codes) == ((), {})  # its hosts run
        assert seen.active_since is not None
        assert abs((datetime.datetime.now(datetime.UTC) - seen.active_since).total_seconds()) < 60
        await cloud.delete(name)
        await cloud.delete(name)  # which another worker did just now
        while await cloud.exists(name):
            await asyncio.sleep(0.05)
        await cloud.delete(name)
        assert await cloud.slices(PARENT, lambda labels: True) == []

    against(clouds(), test)


def test_a_node_is_lost_when_the_node_is_not_found(clouds: Callable[..., Service]) -> None:
    faults = Faults("GetNode", grpc.StatusCode.NOT_FOUND, times=1)

    async def test(cloud: CloudTpu) -> None:
        await create(cloud)
        while (seen := (await cloud.slices(PARENT, lambda labels: True))[0]).state != "ACTIVE":
            await asyncio.sleep(0.05)
        assert (await cloud.with_hosts(seen)).lost_nodes == (NAME,)
        assert (await cloud.with_hosts(seen)).lost_nodes == ()

    against(clouds(around=faults), test)


@pytest.mark.parametrize(("code", "error"), [(grpc.StatusCode.UNAVAILABLE, Unavailable), (grpc.StatusCode.RESOURCE_EXHAUSTED, Exhausted)])
def test_what_does_not_pass_is_told_after_a_while_longer_for_a_request(
    clouds: Callable[..., Service], code: grpc.StatusCode, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert module.CREATE_PATIENCE_SECONDS == 600  # nobody looks after other slices with it
    assert PATIENCE <= 30
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(module, "CREATE_PATIENCE_SECONDS", 0.4)
    asked = "0 s .* projects/p/locations/us-central2-b .injected"
    lists, requests = (Faults(method, code, times=10**6) for method in ("ListQueuedResources", "CreateQueuedResource"))

    def around(method: str, request: Any, call: Callable[[], Any]) -> Any:
        return lists(method, request, lambda: requests(method, request, call))

    async def test(cloud: CloudTpu) -> None:
        with pytest.raises(error, match=asked):
            await cloud.slices(PARENT, lambda labels: True)
        with pytest.raises(error, match=asked):
            await create(cloud)

    against(clouds(around=around), test)
    assert lists.calls > 1
    assert requests.calls > 1


def test_credentials_that_are_not_there_are_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud import tpu_v2

    def nowhere() -> None:
        raise DefaultCredentialsError("Your default credentials were not found")

    monkeypatch.setattr(tpu_v2, "TpuAsyncClient", nowhere)
    with pytest.raises(Refused, match=r"not found.*: run `gcloud auth application-default login`"):
        CloudTpu()


class Runs:
    """A Prefect server that knows one run, or none."""

    def __init__(self, state: str | None, *, ago: float = 0.0, attempt: int = 1) -> None:
        self._state, self._ago, self._attempt = state, ago, attempt

    async def read_flow_run(self, identity: UUID) -> Any:
        assert identity == RUN
        if self._state is None:
            raise ObjectNotFound(Exception())
        timestamp = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=self._ago)
        state = SimpleNamespace(type=SimpleNamespace(value=self._state), name=self._state.title(), timestamp=timestamp)
        pid = f"{PARENT}/queuedResources/{SliceName(RUN, self._attempt)}"
        return SimpleNamespace(name="a run", state=state, infrastructure_pid=pid)


@pytest.mark.parametrize(
    ("runs", "age", "why"),
    [
        (Runs(None), 20, "its flow run was deleted, or belongs to another Prefect server"),
        (Runs(None), 5, None),  # a worker may be about to say whose it is
        (Runs("RUNNING", ago=600), 600, None),
        (Runs("PENDING", ago=600), 600, None),
        (Runs("RUNNING", attempt=2), 20, "its run a run went on to attempt 2"),
        (Runs("COMPLETED", ago=5), 20, None),
        (Runs("COMPLETED", ago=15), 20, "its run a run is Completed since"),
        (Runs("CRASHED", ago=15), 20, "its run a run is Crashed since"),
        (Runs("SCHEDULED", ago=5), 20, None),
        (Runs("SCHEDULED", ago=15), 20, "its run a run is Scheduled since"),  # it gets another slice
        (Runs("CANCELLING", ago=15), 20, "its run a run is Cancelling since"),
    ],
)
def test_slices_that_nobody_needs(runs: Any, age: float, why: str | None) -> None:
    created = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=age)
    each = module.CloudSlice(f"{PARENT}/queuedResources/{NAME}", "ACTIVE", {}, created)
    found = asyncio.run(why_unneeded(each, runs, minutes=10))
    assert (found is None) == (why is None)
    assert found is None or found.startswith(why or "")
    foreign = module.CloudSlice(f"{PARENT}/queuedResources/of-somebody-else", "ACTIVE", {}, created)
    assert asyncio.run(why_unneeded(foreign, runs, minutes=10)) is None
