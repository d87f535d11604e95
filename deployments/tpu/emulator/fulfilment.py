"""How a queued resource gets its slices: the queue, the capacity of its zone, provisioning."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from deployments.tpu.emulator.events import Events
from deployments.tpu.emulator.node import Node
from deployments.tpu.emulator.queued_request import WAITING, QueuedRequest, State
from deployments.tpu.emulator.state import CloudState

_TICK = 0.05  # seconds between looks at clocks
_HOLDS_SLICES = (State.PROVISIONING, State.ACTIVE, State.SUSPENDING)


@dataclass
class Supply:
    """What the zones have, and how fast they give it.

    capacity: slices of each zone, None for no bound; zone_capacity: of single zones (projects/PROJECT/locations/ZONE).
    """

    capacity: int | None = None
    zone_capacity: dict[str, int] = field(default_factory=dict)
    queue_seconds: float = 0.0  # how long a request is ACCEPTED, at least
    provision_seconds: float = 0.0  # how long it is PROVISIONING, at least


class Fulfilment:
    """Brings requests from ACCEPTED to ACTIVE, each on a thread of its own. directory: logs and disks of the hosts."""

    def __init__(self, state: CloudState, events: Events, supply: Supply, directory: Path) -> None:
        self._state, self._events, self._supply, self._directory = state, events, supply, directory

    def fulfil(self, request: QueuedRequest) -> None:
        """Brings one request from ACCEPTED to ACTIVE, unless it is taken elsewhere meanwhile."""
        with self._state.changed:
            if not self._stays(request, lambda elapsed: elapsed >= self._supply.queue_seconds):
                return
            if not self._has_turn(request):
                self._state.set(request, State.WAITING_FOR_RESOURCES)
                if not self._stays(request, lambda _: self._has_turn(request)):
                    return
            self._state.set(request, State.PROVISIONING)
        try:
            self._provision(request)
        except OSError as error:
            self._events.fail(request.name, f"a host cannot be simulated: {error}")
            raise

    def _provision(self, request: QueuedRequest) -> None:
        with self._state.changed:
            for wanted in request.wanted:
                node = Node(self._directory, wanted, queued_resource=request.name)
                request.nodes.append(node)
                self._state.nodes[node.name] = node
            nodes = list(request.nodes)
            if not self._stays(request, lambda elapsed: elapsed >= self._supply.provision_seconds):
                return
        for node in nodes:
            node.boot()
        with self._state.changed:
            if request.state is State.PROVISIONING:
                for node in nodes:
                    node.ready()
                self._state.set(request, State.ACTIVE)

    def _stays(self, request: QueuedRequest, until: Callable[[float], bool]) -> bool:
        """Waits until that is true of the seconds waited. False if it left its state, if only because it may not wait any longer."""
        state, began = request.state, time.monotonic()
        while not until(time.monotonic() - began):
            if state in WAITING and time.time() >= request.valid_until:
                self._state.set(request, State.FAILED, error="The request was not fulfilled by the time of queueing_policy.valid_until")
                return False
            self._state.changed.wait(_TICK)
            if request.state is not state:
                return False
        return True

    def _has_turn(self, request: QueuedRequest) -> bool:
        capacity = self._supply.zone_capacity.get(request.zone, self._supply.capacity)
        if capacity is None:
            return True
        here = [one for one in self._state.requests.values() if one.zone == request.zone]
        held = sum(len(one.wanted) for one in here if one.state in _HOLDS_SLICES or (one.state is State.DELETING and one.nodes))
        first = next((one for one in here if one.state is State.WAITING_FOR_RESOURCES), request)
        return first is request and held + len(request.wanted) <= capacity
