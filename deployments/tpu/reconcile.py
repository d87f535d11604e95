"""The loop that brings slices and flow runs together: look at both, ask `decide`, do what it says, again and again.

Slices are listed before flow runs are read. A slice exists only after its run was marked as pending, so what is read of the run is
never older than the slice, and a run that is scheduled has no newer slice than the ones listed.
"""

from __future__ import annotations

import datetime
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

import anyio
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType, WorkPoolFilter, WorkPoolFilterName
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import Abort, ObjectNotFound
from prefect.states import Crashed, Pending, Scheduled
from prefect.utilities.engine import propose_state

from deployments.tpu.decide import HALTED, RETRIES, Action, Change, Limits, RunSeen, SliceSeen, decide, missing
from deployments.tpu.form import TPUJobConfiguration
from deployments.tpu.request import LIMIT_LABELS, POOL_LABEL, RUN_LABEL, SliceName, label

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun, State

    from deployments.tpu.cloud import CloudSlice
    from deployments.tpu.worker import TPUWorker

LIVE = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
ENDED = [state for state in StateType if state not in LIVE]
PAGE = 200  # runs that the server sends at once
SUBMIT_SECONDS = 60.0  # for a worker to put its name on a run that it has taken
RETRY_DELAY = datetime.timedelta(seconds=1)


@dataclass
class _Found:
    """What one look found: our slices by full name, and the places that could be looked at."""

    slices: dict[str, CloudSlice]
    places: set[str]


class Reconciler:
    """One worker's loop. What it remembers is only when it first saw something; a new worker counts anew."""

    def __init__(self, worker: TPUWorker) -> None:
        self._worker = worker
        self._halted: dict[str, float] = {}
        self._missing: dict[UUID, int] = {}
        self._places: set[str] | None = None  # where runs of the pool were; None before the first look

    async def run_forever(self) -> None:
        """Looks every `poll_seconds` until the worker ends. An error of one look is told, and the next one comes."""
        with anyio.CancelScope() as scope:
            self._worker._scheduled_task_scopes.add(scope)  # pyright: ignore[reportPrivateUsage]  (cancelled at teardown)
            while True:
                pause = 1.0
                try:
                    pause = await self.look()
                except Exception:
                    self._worker._logger.exception("looking after TPU slices failed; it is tried again")  # pyright: ignore[reportPrivateUsage]
                await anyio.sleep(pause)

    async def look(self) -> float:
        """Looks at everything once; returns the seconds until the next look."""
        worker = self._worker
        if worker._work_pool is None:  # pyright: ignore[reportPrivateUsage]  (the server has not answered yet)
            return 1.0
        defaults = form_defaults(worker.work_pool.base_job_template)
        live = await self._runs(LIVE)
        if self._places is None:
            # a run may have ended while no worker looked, and its slice still be there
            self._places = {place_of(run) for run in await self._runs(ENDED, most=PAGE)}
        if defaults.get("provider") == "cloud":
            self._places |= {f"projects/{defaults.get('project')}/locations/{zone}" for zone in defaults.get("zones") or ()}
        self._places |= {place_of(run) for run in live}
        found = await self._slices(self._places - {""})
        for each in found.slices.values():
            await self._settle(each, found)
        for run in await self._runs(LIVE):
            await self._look_for_lost(run, found)
        return float(defaults.get("poll_seconds") or 2.0)

    async def _runs(self, types: list[StateType], *, most: int | None = None) -> list[FlowRun]:
        """Flow runs of the pool in these states, those expected last first; all of them, or `most`."""
        pool = WorkPoolFilter(name=WorkPoolFilterName(any_=[self._worker.work_pool.name]))
        wanted = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=types)))
        found: list[FlowRun] = []
        while True:
            page = await self._worker.client.read_flow_runs(
                work_pool_filter=pool, flow_run_filter=wanted, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=PAGE, offset=len(found)
            )
            found += page
            if len(page) < PAGE or (most is not None and len(found) >= most):
                return found

    async def _slices(self, places: set[str]) -> _Found:
        """Our slices in all places. A place that does not answer is left out: nothing there counts as missing."""
        from deployments.tpu.cloud import Refused

        ours = label(self._worker.work_pool.name)
        found = _Found({}, set())
        for place in sorted(places):
            try:
                cloud = await self._worker.cloud(place)
                listed = await cloud.slices(place, lambda labels: labels.get(POOL_LABEL) == ours)
                for each in listed:
                    found.slices[each.name] = await cloud.with_hosts(each) if each.state == "ACTIVE" else each
                found.places.add(place)
            except (Refused, OSError, RuntimeError) as error:
                self._log("cannot list the slices in %s: %s", place, error)
        return found

    async def _settle(self, each: CloudSlice, found: _Found) -> None:
        name = SliceName.parse(each.name)
        if name is None:
            return
        run = await self._read(UUID(each.labels[RUN_LABEL]))
        newest = _newest(name.flow_run, run, found)
        if run is not None and newest == each.name and run.infrastructure_pid != newest and _attempt(run.infrastructure_pid) < name.attempt:
            # a worker died between asking for the slice and writing that down
            await self._worker.client.update_flow_run(run.id, infrastructure_pid=newest)
        states = await self._worker.client.read_flow_run_states(run.id) if run is not None else []
        action = decide(self._seen(each), run and run_seen(run, states, newest), limits_of(each.labels))
        await self._do(action, run, each)

    async def _look_for_lost(self, run: FlowRun, found: _Found) -> None:
        """A run whose slice is gone, and one that a worker took and never asked a slice for."""
        place = place_of(run)
        states = await self._worker.client.read_flow_run_states(run.id)
        mine = any((name := SliceName.parse(slice_name)) is not None and name.flow_run == run.id for slice_name in found.slices)
        if mine or (place and place not in found.places):
            self._missing.pop(run.id, None)
            return
        if run.state is not None and run.state.is_pending() and await self._being_submitted(run):
            return
        self._missing[run.id] = self._missing.get(run.id, 0) + 1
        if self._missing[run.id] < 3:  # a list may lag behind what was created
            return
        limits = await self._limits(run)
        await self._do(missing(run_seen(run, states, run.infrastructure_pid or ""), limits), run, None)

    async def _being_submitted(self, run: FlowRun) -> bool:
        """Whether a worker that lives is about to ask for the run's slice."""
        worker = self._worker
        if run.id in worker._submitting_flow_run_ids:  # pyright: ignore[reportPrivateUsage]
            return True
        assert run.state is not None
        name = run.labels.get("prefect.worker.name")
        if name == worker.name:
            return False
        if name is None:
            return (datetime.datetime.now(datetime.UTC) - run.state.timestamp).total_seconds() < SUBMIT_SECONDS
        workers = await worker.client.read_workers_for_work_pool(worker.work_pool.name)
        return any(other.name == name and other.status is not None and other.status.value == "ONLINE" for other in workers)

    def _seen(self, each: CloudSlice) -> SliceSeen:
        now = datetime.datetime.now(datetime.UTC)
        if any(code in HALTED for code in each.exit_codes.values()):
            halted = time.monotonic() - self._halted.setdefault(each.name, time.monotonic())
        else:
            halted = 0.0
            self._halted.pop(each.name, None)
        return SliceSeen(
            name=each.name,
            state=each.state,
            exit_codes=each.exit_codes,
            lost_nodes=each.lost_nodes,
            age_seconds=(now - each.created).total_seconds(),
            active_seconds=(now - each.active_since).total_seconds() if each.active_since else 0.0,
            halted_seconds=halted,
            message=each.message or "; ".join(f"host {rank}: {text}" for rank, text in sorted(each.errors.items())),
        )

    async def _limits(self, run: FlowRun) -> Limits:
        """What a run may use up, from its configuration, where there is no slice to carry it."""
        worker = self._worker
        configuration = await TPUJobConfiguration.resolve_for_flow_run(
            run, client=worker.client, work_pool=worker.work_pool, worker_name=worker.name, worker_id=worker.backend_id
        )
        return Limits(max_failures=configuration.max_failures, max_preemptions=configuration.max_preemptions)

    async def _read(self, flow_run: UUID) -> FlowRun | None:
        try:
            return await self._worker.client.read_flow_run(flow_run)
        except ObjectNotFound:
            return None

    async def _do(self, action: Action, run: FlowRun | None, each: CloudSlice | None) -> None:
        """The run first, then its slice: a worker that dies in between leaves a slice without a use, which the next look deletes."""
        if action.change is not None and run is not None:
            if action.change is not Change.WAIT:
                self._worker.get_flow_run_logger(run).warning("%s", action.why)
            await self._change(action, run, each)
        if action.delete and each is not None:
            self._log("deleting %s: %s", each.name, action.why)
            await (await self._worker.cloud(each.name)).delete(each.name)

    async def _change(self, action: Action, run: FlowRun, each: CloudSlice | None) -> None:
        worker, change = self._worker, action.change
        if change is Change.CANCELLED:
            await worker._mark_flow_run_as_cancelled(run, {"message": action.why})  # pyright: ignore[reportPrivateUsage]
            return
        if change is Change.WAIT:
            state = Pending(name=action.why, message=where_it_stands(each))
        elif change in RETRIES:
            assert change is not None
            state = Scheduled(name=change.value, message=action.why, scheduled_time=datetime.datetime.now(datetime.UTC) + RETRY_DELAY)
        else:
            state = Crashed(name=Change.GAVE_UP.value, message=action.why)
        try:
            if run.state is not None and run.state.is_final():
                await worker.client.set_flow_run_state(run.id, state, force=True)
            else:
                await propose_state(worker.client, state, flow_run_id=run.id)
        except (Abort, ObjectNotFound) as refused:
            self._log("the run %s does not become %s: %s", run.name, state.name, refused)

    def _log(self, message: str, *values: object) -> None:
        self._worker._logger.info(message, *values)  # pyright: ignore[reportPrivateUsage]


def form_defaults(template: dict[str, Any]) -> dict[str, Any]:
    """The work pool's own values of the form; a deployment may complete what is open here."""
    properties = template.get("variables", {}).get("properties", {})
    return {name: field.get("default") for name, field in properties.items()}


def place_of(run: FlowRun) -> str:
    """`projects/P/locations/Z` of the slice that is written down for a run; empty where there is none."""
    return (run.infrastructure_pid or "").rpartition("/queuedResources/")[0]


def run_seen(run: FlowRun, states: list[State], newest_slice: str) -> RunSeen:
    """The flow run as `decide` wants it; its past states are what counts preemptions, failures and zones."""
    assert run.state is not None
    names = [state.name for state in states]
    times = {type_: max((state.timestamp for state in states if state.type is type_), default=None) for type_ in StateType}
    ran, scheduled = times[StateType.RUNNING], times[StateType.SCHEDULED]
    return RunSeen(
        type=run.state.type.value,
        name=run.state.name or "",
        message=run.state.message or "",
        newest_slice=newest_slice,
        started=ran is not None and (scheduled is None or ran > scheduled),
        settled_seconds=(datetime.datetime.now(datetime.UTC) - run.state.timestamp).total_seconds(),
        preemptions=names.count(Change.PREEMPTED.value),
        failures=names.count(Change.HOST_FAILED.value),
        zones_tried=1 + names.count(Change.NEXT_ZONE.value),
    )


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


def where_it_stands(each: CloudSlice | None) -> str:
    """The message of a waiting run: slice, place, age, and where to look in Google's console."""
    if each is None:
        return ""
    _, project, _, zone, _, name = each.name.split("/")
    age = (datetime.datetime.now(datetime.UTC) - each.created).total_seconds()
    link = "" if project == "local" else f"; https://console.cloud.google.com/compute/tpus/queued-resources?project={project}"
    return f"{name} in {zone} is {each.state}, asked for {age / 60:.0f} minutes ago{link}"


def _newest(flow_run: UUID, run: FlowRun | None, found: _Found) -> str:
    """The full name of the run's last slice, whether it was listed or only written down."""
    named = [*found.slices, *([run.infrastructure_pid] if run is not None and run.infrastructure_pid else [])]
    mine = [full for full in named if (name := SliceName.parse(full)) is not None and name.flow_run == flow_run]
    return max(mine, key=_attempt, default="")


def _attempt(full: str | None) -> int:
    name = SliceName.parse(full or "")
    return name.attempt if name is not None else 0
