"""One queued resource: whether it can be asked for, which nodes it is to have, and until when it may wait."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field

from google.cloud import tpu_v2

from deployments.tpu.emulator.node import DEVICES, Node, WantedNode
from deployments.tpu.emulator.refusal import invalid
from model.slices import SLICES

State = tpu_v2.QueuedResourceState.State
Initiator = tpu_v2.QueuedResourceState.StateInitiator
WAITING = (State.ACCEPTED, State.WAITING_FOR_RESOURCES)
_PARENT = re.compile(r"projects/[^/]+/locations/[^/]+")
_ID = re.compile(r"[A-Za-z0-9_.~+%-]+")


@dataclass(eq=False)
class QueuedRequest:
    """A queued resource on its way. Whoever has it guards it."""

    message: tpu_v2.QueuedResource  # what the API shows
    zone: str  # projects/PROJECT/locations/ZONE
    wanted: list[WantedNode]
    valid_until: float  # seconds since 1970; infinity: it may wait for ever
    nodes: list[Node] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Its resource name."""
        return self.message.name

    @property
    def state(self) -> State:
        """Where it is on its way."""
        return self.message.state.state

    def set_state(self, state: State, initiator: Initiator = Initiator.STATE_INITIATOR_UNSPECIFIED, error: str = "") -> None:
        """Goes to a state; `error` is why it failed."""
        shown = tpu_v2.QueuedResourceState(state=state, state_initiator=initiator)
        if state is State.FAILED:
            shown.failed_data.error.code = 9  # google.rpc.Code.FAILED_PRECONDITION
            shown.failed_data.error.message = error
        self.message.state = shown


def queued_request(request: tpu_v2.CreateQueuedResourceRequest) -> QueuedRequest:
    """The queued resource that is asked for, in state ACCEPTED.

    Raises:
        Refusal: INVALID_ARGUMENT, naming the field and what is wanted.
    """
    if not _PARENT.fullmatch(request.parent):
        raise invalid("parent", request.parent, "give projects/PROJECT/locations/ZONE")
    _checked_id("queued_resource_id", request.queued_resource_id)
    wanted = [
        node
        for number, spec in enumerate(request.queued_resource.tpu.node_spec)
        for node in _wanted(f"tpu.node_spec[{number}]", request, spec)
    ]
    if not wanted:
        raise invalid("tpu.node_spec", [], "give at least one node")
    if len({node.name for node in wanted}) < len(wanted):
        raise invalid("tpu.node_spec", [node.name for node in wanted], "give each node an id of its own")
    message = tpu_v2.QueuedResource(request.queued_resource)
    message.name = f"{request.parent}/queuedResources/{request.queued_resource_id}"
    tpu_v2.QueuedResource.pb(message).create_time.GetCurrentTime()
    made = QueuedRequest(message, request.parent, wanted, _valid_until(message))
    made.set_state(State.ACCEPTED)
    return made


def _wanted(field: str, request: tpu_v2.CreateQueuedResourceRequest, spec: tpu_v2.QueuedResource.Tpu.NodeSpec) -> list[WantedNode]:
    if spec.parent != request.parent:
        raise invalid(f"{field}.parent", spec.parent, f"give the parent of the request, {request.parent}")
    if spec.node.accelerator_type not in SLICES:
        raise invalid(f"{field}.node.accelerator_type", spec.node.accelerator_type, "there is no such accelerator type")
    if not spec.node.runtime_version:
        raise invalid(f"{field}.node.runtime_version", "", "give a runtime version")
    devices = spec.node.metadata.get(DEVICES, "1")
    if not re.fullmatch(r"[1-9]\d{0,3}", devices):
        raise invalid(f"{field}.node.metadata[{DEVICES}]", devices, "give a number of devices from 1 to 9999")
    if "multislice_params" not in spec:
        return [WantedNode(f"{request.parent}/nodes/{_checked_id(f'{field}.node_id', spec.node_id)}", spec.node, 0, 1)]
    count = spec.multislice_params.node_count
    if count < 2:
        raise invalid(f"{field}.multislice_params.node_count", count, "give 2 or more, or a node_id in place of multislice_params")
    prefix = _checked_id(f"{field}.multislice_params.node_id_prefix", spec.multislice_params.node_id_prefix or request.queued_resource_id)
    return [WantedNode(f"{request.parent}/nodes/{prefix}-{number}", spec.node, number, count) for number in range(count)]


def _checked_id(field: str, value: str) -> str:
    if not _ID.fullmatch(value):
        raise invalid(field, value, "give an id of letters, digits and _.~+%-")
    return value


def _valid_until(message: tpu_v2.QueuedResource) -> float:
    """When the request fails if it still waits: seconds since 1970.

    Source: "if the request cannot be fulfilled by this time the request will be failed" (QueueingPolicy of the API); it then stays in
    the queue, FAILED, until it is deleted (cloud.google.com/tpu/docs/queued-resources).
    """
    policy = tpu_v2.QueuedResource.pb(message).queueing_policy
    constraint = policy.WhichOneof("start_timing_constraints")
    if constraint is None:
        return float("inf")
    if constraint == "valid_until_duration":
        return time.time() + policy.valid_until_duration.ToTimedelta().total_seconds()
    if constraint == "valid_until_time":
        return policy.valid_until_time.ToNanoseconds() / 1e9
    raise invalid("queueing_policy", constraint, "the emulator knows valid_until_duration and valid_until_time")
