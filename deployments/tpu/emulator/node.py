"""One simulated slice: a node of the API, and its hosts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from google.cloud import tpu_v2

from deployments.tpu.emulator.host import Host, HostPlace
from deployments.tpu.emulator.refusal import not_found
from model.slices import slice_named

NodeState = tpu_v2.Node.State
DEVICES = "simulated-devices-per-host"  # metadata: virtual devices of each host, in place of the catalogue's chips
_LOOPBACK = "127.0.0.1"
_LIBTPU_PORT = 8470


@dataclass(frozen=True)
class WantedNode:
    """A node that a queued resource is to have."""

    name: str
    spec: tpu_v2.Node
    slice_id: int  # which one it is of `num_slices`
    num_slices: int


class Node:
    """A node with its hosts, off at first. Whoever has it guards `message`, what the API shows; the hosts guard themselves.

    Raises:
        OSError: a host has no room for its disk, or no port.
    """

    def __init__(self, directory: Path, wanted: WantedNode, *, queued_resource: str) -> None:
        self.name, self.slice_id, self.num_slices = wanted.name, wanted.slice_id, wanted.num_slices
        self.message = tpu_v2.Node(wanted.spec)
        self.message.name = self.name
        self.message.queued_resource = queued_resource
        self.message.multislice_node = self.num_slices > 1
        self.message.state = NodeState.CREATING
        tpu_v2.Node.pb(self.message).create_time.GetCurrentTime()
        self.hosts = self._hosts(directory)

    def boot(self) -> None:
        """Turns on all hosts.

        Raises:
            OSError: no process can be started.
        """
        for host in self.hosts:
            host.boot()

    def ready(self) -> None:
        """What the API shows of a node that is up."""
        self.message.state = NodeState.READY
        self.message.health = tpu_v2.Node.Health.HEALTHY
        self.message.network_endpoints = [tpu_v2.NetworkEndpoint(ip_address=_LOOPBACK, port=_LIBTPU_PORT) for _ in self.hosts]

    def host(self, worker: int) -> Host:
        """The host of that number.

        Raises:
            Refusal: NOT_FOUND.
        """
        if not 0 <= worker < len(self.hosts):
            raise not_found(f"{self.name}, worker {worker}")
        return self.hosts[worker]

    def guest_attributes(self, query_path: str, workers: list[str]) -> list[tpu_v2.GuestAttributes]:
        """What the hosts wrote, host by host: all of it ("/" or ""), a namespace ("NAMESPACE/") or one key ("NAMESPACE/KEY").

        Raises:
            Refusal: NOT_FOUND, there is no such worker, or none of them wrote anything there, as Compute Engine answers.
        """
        namespace, _, key = query_path.strip("/").partition("/")
        numbers = [int(worker) if worker.isdigit() else -1 for worker in workers] or list(range(len(self.hosts)))
        found: list[tpu_v2.GuestAttributes] = []
        for number in numbers:
            entries = [
                tpu_v2.GuestAttributesEntry(namespace=space, key=name, value=value)
                for (space, name), value in sorted(self.host(number).metadata.guest_attributes.items())
                if namespace in ("", space) and key in ("", name)
            ]
            found.append(tpu_v2.GuestAttributes(query_path=query_path, query_value=tpu_v2.GuestAttributesValue(items=entries)))
        if not any(one.query_value.items for one in found):
            raise not_found(f"{self.name}/guestAttributes/{query_path}")
        return found

    def _hosts(self, directory: Path) -> list[Host]:
        _, project, _, zone, _, node_id = self.name.split("/")
        accelerator_type = self.message.accelerator_type
        wanted = slice_named(accelerator_type)
        own = {str(key): str(value) for key, value in self.message.metadata.items()}
        devices = int(own.get(DEVICES, wanted.chips_per_host))
        hosts: list[Host] = []
        for worker in range(wanted.num_hosts):
            attributes = {**own, **self._attributes(worker, wanted.num_hosts)}
            place = HostPlace(project, zone, node_id, worker, accelerator_type, devices)
            hosts.append(Host(place, directory, lambda attributes=attributes: attributes))
        return hosts

    def _attributes(self, worker: int, num_hosts: int) -> dict[str, str]:
        """What Cloud TPU adds to a node's own metadata, as JAX reads it (jax/_src/clusters/cloud_tpu_cluster.py)."""
        environment = {"WORKER_ID": str(worker), "ACCELERATOR_TYPE": self.message.accelerator_type}
        if self.num_slices > 1:
            environment["MEGASCALE_NUM_SLICES"] = str(self.num_slices)
            environment["MEGASCALE_SLICE_ID"] = str(self.slice_id)
            environment["MEGASCALE_COORDINATOR_ADDRESS"] = _LOOPBACK
        return {
            "agent-worker-number": str(worker),
            "accelerator-type": self.message.accelerator_type,
            "worker-network-endpoints": ",".join([f"unknown:unknown:{_LOOPBACK}"] * num_hosts),
            "tpu-env": "\n".join(f"{key}: '{value}'" for key, value in environment.items()),
        }


def on_all(hosts: list[Host], grace: float, *, remove: bool = False) -> None:
    """Shuts down, or removes, hosts at the same time, as a slice goes; returns when all are off.

    Raises:
        RuntimeError: a process cannot be killed.
    """
    if hosts:
        with ThreadPoolExecutor(len(hosts)) as threads:
            list(threads.map(lambda host: host.remove(grace) if remove else host.shutdown(grace), hosts))
