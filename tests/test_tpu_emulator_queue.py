"""The emulated queue: capacity, times, what is refused; and a host's metadata server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.api_core import exceptions
from google.cloud import tpu_v2

from deployments.tpu.emulator.fulfilment import Supply
from deployments.tpu.emulator.host import xla_flags
from deployments.tpu.emulator.metadata import MetadataServer
from deployments.tpu.emulator.refusal import Refusal
from deployments.tpu.emulator.service import Service
from tests.simulated_slices import ZONE, State, asked, gone, lives, made_clouds, node_of, processes, queued, reached, run


@pytest.fixture
def clouds(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Makes clouds that are gone, with their hosts, when the test ends."""
    with made_clouds(tmp_path) as make:
        yield make


def test_a_zone_gives_what_it_has_in_the_order_of_requests(clouds: Callable[..., Service]) -> None:
    service = clouds(Supply(capacity=2))

    async def test(client: tpu_v2.TpuAsyncClient) -> None:
        elsewhere = "projects/p/locations/europe-west4-b"
        await client.create_queued_resource(asked("first", metadata={}))
        await reached(client, State.ACTIVE, queued("first"))
        await client.create_queued_resource(asked("second", slices=2, metadata={}))
        await reached(client, State.WAITING_FOR_RESOURCES, queued("second"))
        await client.create_queued_resource(asked("third", metadata={}))
        await client.create_queued_resource(asked("q", slices=2, zone=elsewhere, metadata={}))
        await reached(client, State.ACTIVE, queued(zone=elsewhere))
        # one slice is free, but the second came first
        await reached(client, State.WAITING_FOR_RESOURCES, queued("third"))
        assert [one.name async for one in await client.list_queued_resources({"parent": ZONE, "page_size": 2})] == [
            queued(name) for name in ("first", "second", "third")
        ]
        assert len([one async for one in await client.list_queued_resources(parent="projects/p/locations/-")]) == 4
        await client.delete_queued_resource({"name": queued("first"), "force": True})
        await reached(client, State.ACTIVE, queued("second"))
        await reached(client, State.WAITING_FOR_RESOURCES, queued("third"))
        await client.delete_queued_resource(name=queued("third"))  # without force: it waits
        await gone(client, queued("third"))
        for number in range(2):  # its user takes the nodes away
            await client.delete_node(name=node_of(f"second-node-{number}"))
        suspended = await reached(client, State.SUSPENDED, queued("second"))
        assert suspended.state.state_initiator is tpu_v2.QueuedResourceState.StateInitiator.USER

    run(service, test)


def test_a_request_that_waits_too_long_fails_and_stays(clouds: Callable[..., Service]) -> None:
    service = clouds(Supply(capacity=0))

    async def test(client: tpu_v2.TpuAsyncClient) -> None:
        await client.create_queued_resource(asked(seconds=0.3))
        await client.create_queued_resource(asked("patient", seconds=1000))
        while (found := await client.get_queued_resource(name=queued())).state.state is not State.FAILED:
            assert found.state.state in (State.ACCEPTED, State.WAITING_FOR_RESOURCES)
            await asyncio.sleep(0.02)
        assert "valid_until" in found.state.failed_data.error.message
        await reached(client, State.WAITING_FOR_RESOURCES, queued("patient"))
        service.cloud.set_capacity(1, ZONE)
        await reached(client, State.ACTIVE, queued("patient"))
        await asyncio.to_thread(service.cloud.events.fail, queued("patient"), "out of luck")
        failed = await client.get_queued_resource(name=queued("patient"))
        assert (failed.state.state, failed.state.failed_data.error.message) == (State.FAILED, "out of luck")
        assert not [one async for one in await client.list_nodes(parent=ZONE)]

    run(service, test)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"accelerator_type": "v4-7"}, "accelerator_type='v4-7'"),
        ({"accelerator_type": "v5e-16"}, "accelerator_type='v5e-16'"),
        ({"runtime_version": ""}, "runtime_version"),
        ({"metadata": {"simulated-devices-per-host": "no"}}, "simulated-devices-per-host"),
        ({"name": "q q"}, "queued_resource_id='q q'"),
        ({"zone": "us-central2-b"}, "parent='us-central2-b'"),
    ],
)
def test_a_request_that_cannot_be_is_refused_naming_the_field(clouds: Callable[..., Service], changes: dict[str, Any], field: str) -> None:
    async def test(client: tpu_v2.TpuAsyncClient) -> None:
        with pytest.raises(exceptions.InvalidArgument, match=field):
            await client.create_queued_resource(asked(**changes))
        assert not [one async for one in await client.list_queued_resources(parent=ZONE)]

    run(clouds(), test)


def test_what_is_not_there_is_not_found(clouds: Callable[..., Service]) -> None:
    async def test(client: tpu_v2.TpuAsyncClient) -> None:
        for call in (client.get_queued_resource, client.delete_queued_resource, client.get_node, client.delete_node):
            with pytest.raises(exceptions.NotFound):
                await call(name=queued())
        with pytest.raises(exceptions.NotFound):
            await client.get_guest_attributes({"name": node_of()})

    run(clouds(), test)


def test_calls_can_be_recorded_refused_and_their_replies_lost(clouds: Callable[..., Service]) -> None:
    calls: list[str] = []

    def around(method: str, request: Any, call: Callable[[], Any]) -> Any:
        calls.append(method)
        if method == "GetNode":
            raise Refusal(grpc.StatusCode.PERMISSION_DENIED, "tpu.nodes.get")
        answer = call()
        if method == "CreateQueuedResource":
            raise Refusal(grpc.StatusCode.UNAVAILABLE, "the reply is lost")
        return answer

    async def test(client: tpu_v2.TpuAsyncClient) -> None:
        with pytest.raises(exceptions.ServiceUnavailable):
            await client.create_queued_resource(asked(metadata={}))
        await client.get_queued_resource(name=queued())
        with pytest.raises(exceptions.Forbidden, match=r"tpu\.nodes\.get"):
            await client.get_node(name=node_of())
        assert calls == ["CreateQueuedResource", "GetQueuedResource", "GetNode"]

    run(clouds(around=around), test)


def test_a_script_that_cannot_be_executed_is_told_in_the_log(clouds: Callable[..., Service], tmp_path: Path) -> None:
    async def test(client: tpu_v2.TpuAsyncClient) -> None:
        await client.create_queued_resource(asked(accelerator_type="v4-8", metadata={"startup-script": "#!/no/such/interpreter\n"}))
        await reached(client, State.ACTIVE)
        while "cannot be executed" not in (tmp_path / "q-node-w0.log").read_text():
            await asyncio.sleep(0.02)

    run(clouds(), test)


@pytest.fixture
def metadata() -> Iterator[Callable[..., MetadataServer]]:
    made: list[MetadataServer] = []

    def make(**attributes: str) -> MetadataServer:
        made.append(MetadataServer(lambda: attributes, project="p", zone="us-central2-b"))
        return made[-1]

    yield make
    for server in made:
        server.close()


def ask(server: MetadataServer, path: str, method: str = "GET", body: str = "", flavor: str = "Google") -> tuple[int, str]:
    connection = HTTPConnection(server.address)
    connection.request(method, path, body, {"Metadata-Flavor": flavor})
    answer = connection.getresponse()
    assert answer.headers["Metadata-Flavor"] == "Google"
    return answer.status, answer.read().decode()


def test_the_metadata_server_answers_as_compute_engine_does(metadata: Callable[..., MetadataServer]) -> None:
    server, root = metadata(own="value"), "/computeMetadata/v1"
    assert ask(server, "/")[0] == 200
    assert ask(server, f"{root}/project/project-id") == (200, "p")
    assert ask(server, f"{root}/instance/zone") == (200, "projects/p/zones/us-central2-b")
    status, token = ask(server, f"{root}/instance/service-accounts/default/token?scopes=a")
    assert (status, json.loads(token)) == (200, {"access_token": "emulated", "expires_in": 3600, "token_type": "Bearer"})
    assert ask(server, f"{root}/instance/attributes/own") == (200, "value")
    assert ask(server, f"{root}/instance/attributes/none")[0] == 404
    assert ask(server, f"{root}/instance/attributes/own", flavor="")[0] == 403
    assert ask(server, f"{root}/instance/attributes/own", "PUT", "other")[0] == 404
    assert ask(server, "/computeMetadata/v2/instance/attributes/own")[0] == 404


def test_guest_attributes_have_to_be_enabled(metadata: Callable[..., MetadataServer]) -> None:
    path = "/computeMetadata/v1/instance/guest-attributes/space/key"
    closed = metadata()
    assert ask(closed, path, "PUT", "a")[0] == 403
    assert ask(closed, path)[0] == 403
    enabled = metadata(**{"enable-guest-attributes": "TRUE"})
    assert ask(enabled, path)[0] == 404
    assert ask(enabled, path, "PUT", "a", flavor="")[0] == 403
    assert ask(enabled, path, "PUT", "a") == (200, "")
    assert ask(enabled, path) == (200, "a")
    assert enabled.guest_attributes == {("space", "key"): "a"}


def test_processes_are_found_after_the_process_of_their_machine_was_killed(clouds: Callable[..., Service]) -> None:
    service = clouds()

    async def test(client: tpu_v2.TpuAsyncClient) -> None:
        await client.create_queued_resource(asked(accelerator_type="v4-8"))
        await reached(client, State.ACTIVE)
        ((script, elsewhere, unmarked),) = await processes(client)
        machine = int(Path(f"/proc/{script}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(machine, signal.SIGKILL)
        while lives(script):
            await asyncio.sleep(0.02)
        os.kill(unmarked, signal.SIGKILL)  # neither descent nor mark tells of it any more
        assert lives(elsewhere)
        await asyncio.to_thread(service.cloud.events.kill_host, node_of(), 0)
        assert not lives(elsewhere)

    run(service, test)


def test_the_number_of_devices_replaces_an_earlier_one() -> None:
    assert xla_flags("--a=1 --xla_force_host_platform_device_count=8 --b", 2) == "--a=1 --b --xla_force_host_platform_device_count=2"
    assert xla_flags("", 3) == "--xla_force_host_platform_device_count=3"
