"""The emulator of the Cloud TPU API, through Google's own client: what a slice goes through, and that no process of it is left."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.api_core import exceptions
from google.cloud import tpu_v2
from google.cloud.tpu_v2.services.tpu.transports import TpuGrpcAsyncIOTransport
from google.protobuf import duration_pb2

from deployments.tpu.emulator import address
from deployments.tpu.emulator.address import running_emulator
from deployments.tpu.emulator.cloud import Cloud
from deployments.tpu.emulator.control import Control, order
from deployments.tpu.emulator.fulfilment import Supply
from deployments.tpu.emulator.host import xla_flags
from deployments.tpu.emulator.metadata import MetadataServer
from deployments.tpu.emulator.refusal import Refusal
from deployments.tpu.emulator.service import Service

CHECKOUT = Path(__file__).resolve().parent.parent
ZONE = "projects/p/locations/us-central2-b"
State = tpu_v2.QueuedResourceState.State
TWO_HOSTS = "v4-16"

# What a host does: it counts its boots, says what it was given, starts processes that try to get away, and says when it is told to end.
SCRIPT = f"""#!{sys.executable} -IS
import json, os, signal, subprocess, sys
from http.client import HTTPConnection

def metadata(method, path, body=None):
    connection = HTTPConnection(os.environ["GCE_METADATA_IP"])
    connection.request(method, "/computeMetadata/v1/instance/" + path, body, {{"Metadata-Flavor": "Google"}})
    answer = connection.getresponse()
    return answer.read().decode() if answer.status == 200 else None

def end(*_):
    print("told to end", flush=True)
    sys.exit(0)

signal.signal(signal.SIGTERM, end)
names = ["agent-worker-number", "accelerator-type", "worker-network-endpoints", "tpu-env", "own"]
metadata("PUT", "guest-attributes/test/attributes", json.dumps({{name: metadata("GET", "attributes/" + name) for name in names}}))
metadata("PUT", "guest-attributes/test/environment", json.dumps(dict(os.environ)))
away = [
    subprocess.Popen(["sleep", "1000"], start_new_session=True),
    subprocess.Popen(["env", "-i", "PATH=" + os.environ["PATH"], "sh", "-c", "setsid sleep 1000 & echo $!"], stdout=subprocess.PIPE),
]
metadata("PUT", "guest-attributes/test/processes", json.dumps([os.getpid(), away[0].pid, int(away[1].stdout.readline())]))
boots = int(metadata("GET", "guest-attributes/test/boots") or 0) + 1
print("boot", boots, flush=True)
metadata("PUT", "guest-attributes/test/boots", str(boots))
while True:
    signal.pause()
"""


@asynccontextmanager
async def connected(server: str) -> AsyncIterator[tpu_v2.TpuAsyncClient]:
    async with grpc.aio.insecure_channel(server) as channel:
        yield tpu_v2.TpuAsyncClient(transport=TpuGrpcAsyncIOTransport(channel=channel))


@pytest.fixture
def clouds(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Makes clouds that are gone, with their hosts, when the test ends."""
    made: list[Service] = []

    def make(supply: Supply | None = None, **options: Any) -> Service:
        made.append(Service(Cloud(tmp_path, supply, grace_seconds=20.0), **options))
        return made[-1]

    yield make
    for service in made:
        service.stop()
        service.cloud.close(grace=0.0)


def run(service: Service, test: Callable[[tpu_v2.TpuAsyncClient], Awaitable[None]]) -> None:
    async def connect() -> None:
        async with connected(service.start()) as client, asyncio.timeout(60):
            await test(client)

    asyncio.run(connect())


def asked(name: str = "q", *, slices: int = 1, zone: str = ZONE, seconds: float | None = None, **changes: Any) -> Any:
    """A request for v4-16; `changes` are of the node."""
    metadata = {"startup-script": SCRIPT, "enable-guest-attributes": "TRUE", "own": "value"}
    node = tpu_v2.Node({"accelerator_type": TWO_HOSTS, "runtime_version": "tpu-ubuntu2204-base", "metadata": metadata, **changes})
    spec = tpu_v2.QueuedResource.Tpu.NodeSpec(parent=zone, node=node)
    if slices == 1:
        spec.node_id = f"{name}-node"
    else:
        spec.multislice_params = tpu_v2.QueuedResource.Tpu.NodeSpec.MultisliceParams(node_count=slices, node_id_prefix=f"{name}-node")
    wanted = tpu_v2.QueuedResource(tpu={"node_spec": [spec]})
    if seconds is not None:
        duration = duration_pb2.Duration()
        duration.FromNanoseconds(int(seconds * 1e9))
        wanted.queueing_policy = tpu_v2.QueuedResource.QueueingPolicy(valid_until_duration=duration)
    return tpu_v2.CreateQueuedResourceRequest(parent=zone, queued_resource_id=name, queued_resource=wanted)


def queued(name: str = "q", zone: str = ZONE) -> str:
    return f"{zone}/queuedResources/{name}"


def node_of(name: str = "q-node") -> str:
    return f"{ZONE}/nodes/{name}"


async def reached(client: tpu_v2.TpuAsyncClient, state: Any, name: str | None = None) -> tpu_v2.QueuedResource:
    while True:
        found = await client.get_queued_resource(name=name or queued())
        if found.state.state is state:
            return found
        assert found.state.state is not State.FAILED
        await asyncio.sleep(0.02)


async def gone(client: tpu_v2.TpuAsyncClient, name: str | None = None) -> None:
    while True:
        try:
            await client.get_queued_resource(name=name or queued())
        except exceptions.NotFound:
            return
        await asyncio.sleep(0.02)


async def said(client: tpu_v2.TpuAsyncClient, key: str, value: str | None = None, node: str | None = None) -> list[Any]:
    """What all hosts of a node say under a key, once they do, and once it is `value`."""
    while True:
        answer = await client.get_guest_attributes({"name": node or node_of(), "query_path": f"test/{key}"})
        values = [item.value for host in answer.guest_attributes for item in host.query_value.items]
        if len(values) == len(answer.guest_attributes) and (value is None or set(values) == {value}):
            return [json.loads(one) for one in values]
        await asyncio.sleep(0.02)


def lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):  # it may end while its file is read
        return False


async def processes(client: tpu_v2.TpuAsyncClient, node: str | None = None) -> list[list[int]]:
    await said(client, "boots", node=node)
    found = await said(client, "processes", node=node)
    assert all(lives(process) for host in found for process in host)
    return found


def test_two_hosts_from_the_request_to_their_deletion(clouds: Callable[..., Service], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_cpu_enable_fast_math=false")

    async def test(client: tpu_v2.TpuAsyncClient) -> None:
        operation = await client.create_queued_resource(asked())
        assert (await operation.result()).name == queued()
        with pytest.raises(exceptions.AlreadyExists):
            await client.create_queued_resource(asked())
        assert await reached(client, State.ACTIVE)
        assert [one.name async for one in await client.list_queued_resources(parent=ZONE)] == [queued()]
        node = await client.get_node(name=node_of())
        assert (node.state, node.queued_resource) == (tpu_v2.Node.State.READY, queued())
        assert [one.ip_address for one in node.network_endpoints] == ["127.0.0.1"] * 2
        assert tpu_v2.Node.pb(node).create_time.ToNanoseconds() > 0
        for worker, attributes in enumerate(await said(client, "attributes")):
            assert attributes["agent-worker-number"] == str(worker)
            assert attributes["accelerator-type"] == TWO_HOSTS
            assert [one.split(":")[2] for one in attributes["worker-network-endpoints"].split(",")] == ["127.0.0.1"] * 2
            assert attributes["tpu-env"] == f"WORKER_ID: '{worker}'\nACCELERATOR_TYPE: 'v4-16'"
            assert attributes["own"] == "value"
        for environment in await said(client, "environment"):
            assert environment["XLA_FLAGS"] == "--xla_cpu_enable_fast_math=false --xla_force_host_platform_device_count=4"
            assert (environment["JAX_PLATFORMS"], environment["PREFECT_LLAMA_SIMULATED_SLICE"]) == ("cpu", TWO_HOSTS)
            assert set(environment) <= {
                "PATH", "HOME", "PWD", "GCE_METADATA_HOST", "GCE_METADATA_IP", "JAX_PLATFORMS", "XLA_FLAGS", "LC_CTYPE",
                "PREFECT_LLAMA_SIMULATED_SLICE", "PREFECT_LLAMA_EMULATED_HOST",
            }  # fmt: skip
        running = await processes(client)
        second = await client.get_guest_attributes({"name": node_of(), "query_path": "test/attributes", "worker_ids": ["1"]})
        assert [json.loads(one.query_value.items[0].value)["agent-worker-number"] for one in second.guest_attributes] == ["1"]
        whole = await client.get_guest_attributes({"name": node_of(), "query_path": "test/"})
        assert {item.key for item in whole.guest_attributes[0].query_value.items} == {"attributes", "environment", "processes", "boots"}
        with pytest.raises(exceptions.FailedPrecondition, match="ACTIVE"):
            await client.delete_queued_resource(name=queued())
        deletion = await client.delete_queued_resource({"name": queued(), "force": True})
        await deletion.result()
        with pytest.raises(exceptions.NotFound):
            await client.get_queued_resource(name=queued())
        with pytest.raises(exceptions.NotFound):
            await client.get_node(name=node_of())
        assert not [process for host in running for process in host if lives(process)]

    run(clouds(), test)
    for worker in range(2):
        assert (tmp_path / f"q-node-w{worker}.log").read_text() == "boot 1\ntold to end\n"
    assert not list((tmp_path / "disks").iterdir())


def test_two_slices_of_two_hosts_know_which_they_are_and_can_be_lost_one_by_one(clouds: Callable[..., Service]) -> None:
    service = clouds()

    async def test(client: tpu_v2.TpuAsyncClient) -> None:
        await client.create_queued_resource(asked(slices=2))
        await reached(client, State.ACTIVE)
        for number in range(2):
            for worker, attributes in enumerate(await said(client, "attributes", node=node_of(f"q-node-{number}"))):
                assert attributes["tpu-env"].splitlines() == [
                    f"WORKER_ID: '{worker}'",
                    "ACCELERATOR_TYPE: 'v4-16'",
                    "MEGASCALE_NUM_SLICES: '2'",
                    f"MEGASCALE_SLICE_ID: '{number}'",
                    "MEGASCALE_COORDINATOR_ADDRESS: '127.0.0.1'",
                ]
        lost, kept = [await processes(client, node_of(f"q-node-{number}")) for number in (1, 0)]
        await asyncio.to_thread(service.cloud.events.preempt, queued(), 0.0, node_of("q-node-1"))
        assert not any(lives(process) for host in lost for process in host)
        assert all(lives(process) for host in kept for process in host)
        states = {one.name: one.state.name async for one in await client.list_nodes(parent=ZONE)}
        assert states == {node_of("q-node-0"): "READY", node_of("q-node-1"): "PREEMPTED"}

    run(service, test)


@pytest.mark.parametrize("grace", [20.0, 0.0])
def test_a_preempted_slice_is_warned_or_not_and_its_queued_resource_suspended(
    clouds: Callable[..., Service], tmp_path: Path, grace: float
) -> None:
    service = clouds()

    async def test(client: tpu_v2.TpuAsyncClient) -> None:
        await client.create_queued_resource(asked())
        await reached(client, State.ACTIVE)
        running = await processes(client)
        await asyncio.to_thread(service.cloud.events.preempt, queued(), grace)
        suspended = await client.get_queued_resource(name=queued())
        assert suspended.state.state is State.SUSPENDED
        assert suspended.state.state_initiator is tpu_v2.QueuedResourceState.StateInitiator.SERVICE
        assert (await client.get_node(name=node_of())).state is tpu_v2.Node.State.PREEMPTED
        assert not any(lives(process) for host in running for process in host)
        await client.delete_queued_resource(name=queued())
        await gone(client)

    run(service, test)
    assert ("told to end" in (tmp_path / "q-node-w0.log").read_text()) == (grace > 0)


def test_a_process_that_does_not_listen_is_killed_after_the_grace(clouds: Callable[..., Service]) -> None:
    service = clouds()
    deaf = SCRIPT.replace("signal.signal(signal.SIGTERM, end)", "signal.signal(signal.SIGTERM, signal.SIG_IGN)")

    async def test(client: tpu_v2.TpuAsyncClient) -> None:
        await client.create_queued_resource(asked(metadata={"startup-script": deaf, "enable-guest-attributes": "TRUE"}))
        await reached(client, State.ACTIVE)
        running = await processes(client)
        await asyncio.to_thread(service.cloud.events.preempt, queued(), 0.3)
        assert not any(lives(process) for host in running for process in host)

    run(service, test)


def test_a_rebooted_slice_runs_its_script_again_and_keeps_guest_attributes(clouds: Callable[..., Service], tmp_path: Path) -> None:
    service = clouds()

    async def test(client: tpu_v2.TpuAsyncClient) -> None:
        await client.create_queued_resource(asked())
        await reached(client, State.ACTIVE)
        await said(client, "boots", "1")
        before = await processes(client)
        await asyncio.to_thread(service.cloud.events.reboot, queued(), 20.0)
        await said(client, "boots", "2")
        assert not any(lives(process) for host in before for process in host)
        assert (await client.get_node(name=node_of())).state is tpu_v2.Node.State.READY
        assert (await client.get_queued_resource(name=queued())).state.state is State.ACTIVE

    run(service, test)
    assert (tmp_path / "q-node-w1.log").read_text() == "boot 1\ntold to end\nboot 2\n"


def test_the_power_of_one_host_fails_and_takes_all_its_processes(clouds: Callable[..., Service]) -> None:
    service = clouds()

    async def test(client: tpu_v2.TpuAsyncClient) -> None:
        await client.create_queued_resource(asked())
        await reached(client, State.ACTIVE)
        first, second = await processes(client)
        await asyncio.to_thread(service.cloud.events.kill_host, node_of(), 1)
        assert not any(map(lives, second))
        assert all(map(lives, first))
        assert (await client.get_node(name=node_of())).state is tpu_v2.Node.State.READY

    run(service, test)


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


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A directory whose emulator, should there be one, is ended."""
    yield tmp_path
    written = tmp_path / "emulator.json"
    if written.exists():
        process = json.loads(written.read_text())["pid"]
        if lives(process):
            os.kill(process, signal.SIGKILL)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_one_emulator_of_a_directory_that_dies_with_its_hosts_and_is_replaced(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[Path] = []
    start = address._start
    monkeypatch.setattr(address, "_start", lambda place, options: (starts.append(place), start(place, options))[1])
    with ThreadPoolExecutor(2) as threads:
        addresses = set(threads.map(lambda _: running_emulator(directory), range(2)))
    assert (len(addresses), starts) == (1, [directory])
    written = json.loads((directory / "emulator.json").read_text())

    async def test() -> list[list[int]]:
        async with connected(written["address"]) as client, asyncio.timeout(60):
            await client.create_queued_resource(asked())
            await reached(client, State.ACTIVE)
            running = await processes(client)
            with pytest.raises(ValueError, match="NOT_FOUND"):
                order(written["control"], "preempt", name=queued("other"), grace=0)
            with pytest.raises(ValueError, match="order='destroy'"):
                order(written["control"], "destroy")
            with pytest.raises(ValueError, match="grace"):
                order(written["control"], "preempt", name=queued())
            order(written["control"], "reboot", name=queued(), grace=0)
            await said(client, "boots", "2")
            assert not any(lives(process) for host in running for process in host)
            return await processes(client)

    running = asyncio.run(test())
    os.kill(written["pid"], signal.SIGKILL)
    until(lambda: not any(lives(process) for host in running for process in host))
    assert running_emulator(directory) != written["address"]
    again = json.loads((directory / "emulator.json").read_text())
    assert again["pid"] != written["pid"]

    async def start_another() -> None:
        async with connected(again["address"]) as client, asyncio.timeout(60):
            await client.create_queued_resource(asked("other", accelerator_type="v4-8"))
            await reached(client, State.ACTIVE, queued("other"))
            await processes(client, node_of("other-node"))

    asyncio.run(start_another())
    os.kill(again["pid"], signal.SIGTERM)
    until(lambda: not lives(again["pid"]))
    assert not (directory / "emulator.json").exists()
    assert (directory / "other-node-w0.log").read_text() == "boot 1\ntold to end\n"
    assert not list((directory / "disks").iterdir())  # those of the killed one too
    assert f"{queued('other')} is ACTIVE" in (directory / "emulator.log").read_text()


def test_a_service_with_queued_resources_or_requests_is_not_idle(clouds: Callable[..., Service]) -> None:
    service = clouds(Supply(capacity=0))
    assert not service.is_idle(60.0)
    assert service.is_idle(0.0)
    service.cloud.create(asked())
    assert not service.is_idle(0.0)


def test_an_emulator_that_nobody_needs_ends(directory: Path) -> None:
    running_emulator(directory, options=["--idle-seconds", "2"])
    process = json.loads((directory / "emulator.json").read_text())["pid"]
    until(lambda: not lives(process))
    assert "no queued resource" in (directory / "emulator.log").read_text()


class Started(Exception):
    """An emulator would have been started."""


@pytest.fixture
def no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object) -> None:
        raise Started

    monkeypatch.setattr(address, "_start", start)
    monkeypatch.setattr(address, "_PATIENCE", 0.2)


@pytest.mark.usefixtures("no_start")
def test_none_is_started_beside_one_that_lives_and_does_not_answer(tmp_path: Path) -> None:
    with (tmp_path / "emulator.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="did not come up"):
            running_emulator(tmp_path)


@pytest.mark.usefixtures("no_start")
def test_only_the_emulator_that_wrote_the_address_is_taken_for_it(tmp_path: Path) -> None:
    told: dict[str, Any] = {"pid": 7, "directory": str(tmp_path), "ends": False}
    control = Control(Cloud(tmp_path), lambda: told)
    written = tmp_path / "emulator.json"
    written.write_text(json.dumps({"address": "127.0.0.1:1", "control": control.address, "pid": 7}))
    try:
        assert running_emulator(tmp_path) == "127.0.0.1:1"
        for field, value in (("pid", 8), ("directory", "/other"), ("ends", True)):
            told[field], before = value, told[field]
            with pytest.raises(Started):
                running_emulator(tmp_path)
            told[field] = before
        written.write_text("{")
        with pytest.raises(Started):
            running_emulator(tmp_path)
    finally:
        control.close()


def test_an_emulator_that_does_not_come_up_is_told_with_its_log(directory: Path) -> None:
    with pytest.raises(RuntimeError, match="invalid int value: 'x'"):
        running_emulator(directory, options=["--port", "x"])


def test_the_module_a_worker_imports_is_light() -> None:
    code = "import sys; import deployments.tpu.emulator.address; print({'grpc', 'google', 'jax', 'prefect'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
