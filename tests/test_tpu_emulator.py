"""The emulator of the Cloud TPU API, through Google's own client: what a slice goes through, and that no process of it is left."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.api_core import exceptions
from google.cloud import tpu_v2

from deployments.tpu.emulator.fulfilment import Supply
from deployments.tpu.emulator.service import Service
from tests.simulated_slices import (
    SCRIPT,
    TWO_HOSTS,
    ZONE,
    State,
    asked,
    gone,
    lives,
    made_clouds,
    node_of,
    processes,
    queued,
    reached,
    run,
    said,
)


@pytest.fixture
def clouds(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Makes clouds that are gone, with their hosts, when the test ends."""
    with made_clouds(tmp_path) as make:
        yield make


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
                "PATH", "HOME", "PWD", "GCE_METADATA_HOST", "GCE_METADATA_IP", "JAX_PLATFORMS", "XLA_FLAGS", "LC_CTYPE", "TMPDIR",
                "PREFECT_LLAMA_SIMULATED_SLICE", "PREFECT_LLAMA_EMULATED_HOST", "PREFECT_LLAMA_CACHE", "GCE_METADATA_ROOT",
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


def test_a_slice_can_be_taken_back_before_it_has_hosts(clouds: Callable[..., Service], tmp_path: Path) -> None:
    service = clouds(Supply(provision_seconds=600.0))

    async def test(client: tpu_v2.TpuAsyncClient) -> None:
        await client.create_queued_resource(asked())
        await reached(client, State.PROVISIONING)
        service.cloud.events.preempt(queued(), 0.0)
        await reached(client, State.SUSPENDED)
        await client.delete_queued_resource(name=queued())
        await gone(client)

    run(service, test)
    assert not [*tmp_path.glob("*.log")]


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
