"""The emulated cloud as the API sees it: queued resources and nodes of all zones."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import grpc
from google.cloud import tpu_v2

from deployments.tpu.emulator.events import Events
from deployments.tpu.emulator.fulfilment import Fulfilment, Supply
from deployments.tpu.emulator.node import NodeState
from deployments.tpu.emulator.queued_request import WAITING, Initiator, State, queued_request
from deployments.tpu.emulator.refusal import Refusal, precondition
from deployments.tpu.emulator.state import CloudState

# "the queued resource will only be deleted if ... the queued resource is in the ACCEPTED, FAILED, or SUSPENDED state" (API, `force`);
# WAITING_FOR_RESOURCES has since taken the place of ACCEPTED.
_DELETED_WITHOUT_FORCE = (*WAITING, State.FAILED, State.SUSPENDED)


class Cloud:
    """Queued resources and nodes. Any thread may call it.

    directory: logs and disks of the hosts. supply: what the zones have. grace_seconds: between SIGTERM and SIGKILL where a node is deleted.
    events: what happens to slices otherwise.
    """

    def __init__(self, directory: Path, supply: Supply | None = None, *, grace_seconds: float = 20.0) -> None:
        self.grace_seconds = grace_seconds
        self._supply = supply or Supply()
        self._state = CloudState()
        self.events = Events(self._state)
        self._fulfilment = Fulfilment(self._state, self.events, self._supply, directory)

    def create(self, request: tpu_v2.CreateQueuedResourceRequest) -> tpu_v2.QueuedResource:
        """A new queued resource, ACCEPTED; the rest happens by itself.

        Raises:
            Refusal: INVALID_ARGUMENT; ALREADY_EXISTS for the queued resource or one of its nodes.
        """
        made = queued_request(request)
        with self._state.changed:
            taken = {
                *self._state.requests,
                *self._state.nodes,
                *(node.name for one in self._state.requests.values() for node in one.wanted),
            }
            for name in (made.name, *(node.name for node in made.wanted)):
                if name in taken:
                    raise Refusal(grpc.StatusCode.ALREADY_EXISTS, f"Resource '{name}' already exists")
            self._state.requests[made.name] = made
            shown = tpu_v2.QueuedResource(made.message)
        threading.Thread(target=self._fulfilment.fulfil, args=(made,), daemon=True).start()
        return shown

    def get(self, name: str) -> tpu_v2.QueuedResource:
        """The queued resource as it is now.

        Raises:
            Refusal: NOT_FOUND.
        """
        with self._state.changed:
            return tpu_v2.QueuedResource(self._state.request(name).message)

    def list(self, parent: str) -> list[tpu_v2.QueuedResource]:
        """Queued resources of a zone, by name; "" is all zones, and so is the location "-" of a project."""
        with self._state.changed:
            return [
                tpu_v2.QueuedResource(self._state.requests[name].message) for name in sorted(self._state.requests) if _below(parent, name)
            ]

    def delete(self, name: str, *, force: bool) -> Callable[[], None]:
        """Marks it DELETING. The function that is returned ends its hosts, and returns when it is gone.

        Raises:
            Refusal: NOT_FOUND; FAILED_PRECONDITION if it has nodes, or is about to, and `force` is not set.
        """
        with self._state.changed:
            request = self._state.request(name)
            if not force and request.state not in _DELETED_WITHOUT_FORCE:
                raise precondition(f"{name} is {request.state.name}: delete its nodes first, or set force")
            self._state.set(request, State.DELETING)
            for node in request.nodes:
                node.message.state = NodeState.DELETING
            nodes = list(request.nodes)

        def finish() -> None:
            self._state.remove(nodes, self.grace_seconds)
            with self._state.changed:
                if self._state.requests.get(name) is request:
                    del self._state.requests[name]
                self._state.changed.notify_all()

        return finish

    def get_node(self, name: str) -> tpu_v2.Node:
        """The node as it is now.

        Raises:
            Refusal: NOT_FOUND.
        """
        with self._state.changed:
            return tpu_v2.Node(self._state.node(name).message)

    def list_nodes(self, parent: str) -> list[tpu_v2.Node]:
        """Nodes of a zone, by name; see `list`."""
        with self._state.changed:
            return [tpu_v2.Node(self._state.nodes[name].message) for name in sorted(self._state.nodes) if _below(parent, name)]

    def delete_node(self, name: str) -> Callable[[], None]:
        """Marks it DELETING; the function that is returned ends it. With its last node a queued resource is SUSPENDED, by its user.

        Raises:
            Refusal: NOT_FOUND.
        """
        with self._state.changed:
            node = self._state.node(name)
            node.message.state = NodeState.DELETING
            request = self._state.requests.get(node.message.queued_resource)

        def finish() -> None:
            self._state.remove([node], self.grace_seconds)
            with self._state.changed:
                if request is not None and not request.nodes and request.state is State.ACTIVE:
                    self._state.set(request, State.SUSPENDED, Initiator.USER)

        return finish

    def guest_attributes(self, request: tpu_v2.GetGuestAttributesRequest) -> list[tpu_v2.GuestAttributes]:
        """What hosts of a node wrote, one by one.

        Raises:
            Refusal: NOT_FOUND, the node, a worker, or anything that they wrote there.
        """
        with self._state.changed:
            node = self._state.node(request.name)
        return node.guest_attributes(request.query_path, list(request.worker_ids))

    def set_capacity(self, slices: int | None, zone: str | None = None) -> None:
        """Slices of a zone (projects/PROJECT/locations/ZONE), or of all zones that have none of their own. Running ones stay."""
        with self._state.changed:
            if zone is None:
                self._supply.capacity = slices
            elif slices is None:
                self._supply.zone_capacity.pop(zone, None)
            else:
                self._supply.zone_capacity[zone] = slices
            self._state.changed.notify_all()

    def close(self, grace: float) -> None:
        """Ends all hosts."""
        with self._state.changed:
            for request in self._state.requests.values():
                self._state.set(request, State.DELETING)
            nodes = list(self._state.nodes.values())
        self._state.remove(nodes, grace)


def _below(parent: str, name: str) -> bool:
    """Whether a resource is in that zone; the location "-" stands for all, and "" for all projects."""
    project, _, location = parent.partition("/locations/")
    return not parent or (name.startswith(f"{project}/") if location == "-" else name.startswith(f"{parent}/"))
