"""What the emulated cloud has: queued resources and nodes by name, behind one lock."""

from __future__ import annotations

import logging
import threading

from deployments.tpu.emulator.node import Node, on_all
from deployments.tpu.emulator.queued_request import Initiator, QueuedRequest, State
from deployments.tpu.emulator.refusal import not_found

_LOG = logging.getLogger(__name__)


class CloudState:
    """Queued resources and nodes. Whoever reads or changes them holds `changed`, which is notified of changes; only `remove` takes it."""

    def __init__(self) -> None:
        self.requests: dict[str, QueuedRequest] = {}
        self.nodes: dict[str, Node] = {}
        self.changed = threading.Condition()

    def set(
        self, request: QueuedRequest, state: State, initiator: Initiator = Initiator.STATE_INITIATOR_UNSPECIFIED, error: str = ""
    ) -> None:
        """Brings a request to a state; see `QueuedRequest.set_state`."""
        request.set_state(state, initiator, error)
        _LOG.info("%s is %s%s", request.name, state.name, error and f": {error}")
        self.changed.notify_all()

    def request(self, name: str) -> QueuedRequest:
        """The queued resource of that name.

        Raises:
            Refusal: NOT_FOUND.
        """
        if name not in self.requests:
            raise not_found(name)
        return self.requests[name]

    def node(self, name: str) -> Node:
        """The node of that name.

        Raises:
            Refusal: NOT_FOUND.
        """
        if name not in self.nodes:
            raise not_found(name)
        return self.nodes[name]

    def chosen(self, name: str, node: str | None) -> tuple[QueuedRequest, list[Node]]:
        """A queued resource and its nodes, or that one of them.

        Raises:
            Refusal: NOT_FOUND.
        """
        request = self.request(name)
        nodes = [one for one in request.nodes if node in (None, one.name)]
        if node is not None and not nodes:
            raise not_found(node)
        return request, nodes

    def remove(self, nodes: list[Node], grace: float) -> None:
        """Turns the nodes' hosts off for good, and forgets the nodes."""
        on_all([host for node in nodes for host in node.hosts], grace, remove=True)
        with self.changed:
            for node in nodes:
                self.nodes.pop(node.name, None)
                request = self.requests.get(node.message.queued_resource)
                if request is not None and node in request.nodes:
                    request.nodes.remove(node)
            self.changed.notify_all()
