"""What the loop sees of flow runs, deployments and the pool, as `decide` and the list of places want it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect.client.schemas.objects import StateType

from deployments.tpu.decide import Change, Limits, RunSeen
from deployments.tpu.form import LOCAL_ZONE, SliceFields
from deployments.tpu.request import LIMIT_LABELS, SliceName

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun, State


def form_defaults(template: dict[str, Any]) -> dict[str, Any]:
    """The work pool's own values of the form; a deployment may complete what is open here."""
    properties = template.get("variables", {}).get("properties", {})
    return {name: field.get("default") for name, field in properties.items()}


def place_of(run: FlowRun) -> str:
    """`projects/P/locations/Z` of the slice that is written down for a run; empty where there is none."""
    return (run.infrastructure_pid or "").rpartition("/queuedResources/")[0]


def places_of(*levels: Mapping[str, Any] | None) -> set[str]:
    """Where slices may be by the values of a form, later levels prevailing: `projects/P/locations/Z` of each zone, or of `local`."""
    chosen = {name: value for level in levels for name, value in (level or {}).items() if value is not None}
    if chosen.get("provider", "local") == "local":
        return {SliceFields().parent(LOCAL_ZONE)}
    zones = chosen.get("zones")
    if not chosen.get("project") or not isinstance(zones, list):  # no slice can be asked for with that
        return set()
    return {f"projects/{chosen['project']}/locations/{zone}" for zone in zones}


def run_seen(run: FlowRun, states: list[State], newest_slice: str, *, settled_seconds: float = 0.0, age_seconds: float = 0.0) -> RunSeen:
    """The flow run as `decide` wants it; its past states are what counts preemptions, failures and zones."""
    assert run.state is not None
    # Two workers that see one event at once may both set the state for it: a run is taken up, Pending, between two events.
    names = [state.name for before, state in zip([None, *states], states, strict=False) if before is None or before.name != state.name]
    times = {type_: max((state.timestamp for state in states if state.type is type_), default=None) for type_ in StateType}
    ran, scheduled = times[StateType.RUNNING], times[StateType.SCHEDULED]
    return RunSeen(
        type=run.state.type.value,
        name=run.state.name or "",
        message=run.state.message or "",
        newest_slice=newest_slice,
        started=ran is not None and (scheduled is None or ran > scheduled),
        settled_seconds=settled_seconds,
        age_seconds=age_seconds,
        preemptions=names.count(Change.PREEMPTED.value),
        failures=names.count(Change.HOST_FAILED.value),
        zones_tried=1 + names.count(Change.NEXT_ZONE.value),
        spent_seconds=spent_seconds(states),
    )


def spent_seconds(states: Iterable[State]) -> float:
    """How long earlier slices of a run trained: from Running to the state that gave the run another slice. Their boots left no trace."""
    total, began = 0.0, None
    for state in sorted(states, key=lambda each: each.timestamp):
        if state.type is StateType.RUNNING:
            began = began or state.timestamp
        elif state.type is StateType.SCHEDULED and began is not None:
            total, began = total + (state.timestamp - began).total_seconds(), None
    return total


def limits_of(labels: dict[str, str]) -> Limits:
    """What the labels say that the run may use up."""
    said = {name.replace("-", "_"): labels[name] for name in LIMIT_LABELS if name in labels}
    seconds = said.get("max_active_seconds", "none")
    return Limits(
        max_preemptions=int(said.get("max_preemptions", Limits.max_preemptions)),
        max_failures=int(said.get("max_failures", Limits.max_failures)),
        num_zones=int(said.get("num_zones", Limits.num_zones)),
        max_wait_seconds=float(said.get("max_wait_seconds", Limits.max_wait_seconds)),
        max_active_seconds=math.inf if seconds == "none" else float(seconds),
    )


def newest_slice(flow_run: UUID, run: FlowRun | None, listed: Iterable[str]) -> str:
    """The full name of the run's last slice, whether it was listed or only written down."""
    named = [*listed, *([run.infrastructure_pid] if run is not None and run.infrastructure_pid else [])]
    mine = [full for full in named if (name := SliceName.parse(full)) is not None and name.flow_run == flow_run]
    return max(mine, key=attempt_of, default="")


def attempt_of(full: str | None) -> int:
    """The number of a slice among those of its run; 0 where there is none."""
    name = SliceName.parse(full or "")
    return name.attempt if name is not None else 0
