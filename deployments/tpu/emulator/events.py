"""What happens to simulated slices and is not asked for through the API: preemption, maintenance, failures."""

from __future__ import annotations

from deployments.tpu.emulator.node import NodeState, on_all
from deployments.tpu.emulator.queued_request import Initiator, State
from deployments.tpu.emulator.refusal import precondition
from deployments.tpu.emulator.state import CloudState


class Events:
    """Things that happen on order. Each returns when it has happened; any thread may call it."""

    def __init__(self, state: CloudState) -> None:
        self._state = state

    def preempt(self, name: str, grace: float, node: str | None = None) -> None:
        """Takes away an ACTIVE queued resource: SIGTERM, SIGKILL after `grace` seconds, SUSPENDED; 0: without a warning.

        One that is PROVISIONING is taken away before it has hosts. node: only that slice of several, after which the queued resource
        stays ACTIVE.

        Raises:
            Refusal: NOT_FOUND; FAILED_PRECONDITION if it is neither.
        """
        with self._state.changed:
            request, nodes = self._state.chosen(name, node)
            if request.state not in (State.ACTIVE, State.PROVISIONING):
                raise precondition(f"{name} is {request.state.name}, neither ACTIVE nor PROVISIONING")
            early = request.state is State.PROVISIONING
            if node is None:
                self._state.set(request, State.SUSPENDING, Initiator.SERVICE)
            for one in nodes:
                one.message.state = NodeState.PREEMPTED
        on_all([host for one in nodes for host in one.hosts], grace, remove=early)  # a host that was removed never boots
        with self._state.changed:
            if request.state is State.SUSPENDING:
                self._state.set(request, State.SUSPENDED, Initiator.SERVICE)

    def reboot(self, name: str, grace: float, node: str | None = None) -> None:
        """Maintenance: its nodes, or one, go off and on again; the startup scripts run again.

        Raises:
            Refusal: NOT_FOUND.
            OSError: no process can be started.
        """
        with self._state.changed:
            _, nodes = self._state.chosen(name, node)
            for one in nodes:
                one.message.state = NodeState.RESTARTING
        on_all([host for one in nodes for host in one.hosts], grace)
        for one in nodes:
            with self._state.changed:
                if one.message.state is NodeState.RESTARTING:  # it was not deleted or preempted meanwhile
                    one.boot()
                    one.ready()

    def kill_host(self, node: str, worker: int) -> None:
        """The power of one host fails, and nothing of the API tells.

        Raises:
            Refusal: NOT_FOUND.
        """
        with self._state.changed:
            host = self._state.node(node).host(worker)
        host.shutdown(0.0)

    def fail(self, name: str, message: str) -> None:
        """The queued resource FAILED, wherever it was on its way; its nodes are gone without a warning.

        Raises:
            Refusal: NOT_FOUND.
        """
        with self._state.changed:
            request = self._state.request(name)
            self._state.set(request, State.FAILED, error=message)
            nodes = list(request.nodes)
        self._state.remove(nodes, 0.0)
