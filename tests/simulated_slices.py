"""Simulated slices for tests: Google's own client, a request for two hosts, and what they say of themselves."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
from google.api_core import exceptions
from google.cloud import tpu_v2
from google.cloud.tpu_v2.services.tpu.transports import TpuGrpcAsyncIOTransport
from google.protobuf import duration_pb2

from deployments.tpu.emulator.cloud import Cloud
from deployments.tpu.emulator.fulfilment import Supply
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


@contextmanager
def made_clouds(directory: Path) -> Iterator[Callable[..., Service]]:
    """Makes clouds that are gone, with their hosts, at the end of the block."""
    made: list[Service] = []

    def make(supply: Supply | None = None, **options: Any) -> Service:
        made.append(Service(Cloud(directory, supply, grace_seconds=20.0), **options))
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
        try:
            answer = await client.get_guest_attributes({"name": node or node_of(), "query_path": f"test/{key}"})
        except exceptions.NotFound:  # none has said it yet
            await asyncio.sleep(0.02)
            continue
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
