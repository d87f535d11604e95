"""The loop that brings slices and flow runs together: look at both, ask `decide`, do what it says, again and again.

Slices are listed before flow runs are read. A slice exists only after its run was marked as pending, so what is read of the run is
never older than the slice, and a run that is scheduled has no newer slice than the ones listed.
"""

from __future__ import annotations

import datetime
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from uuid import UUID

import anyio
from prefect.exceptions import Abort, ObjectNotFound
from prefect.states import Crashed, Pending, Scheduled
from prefect.utilities.engine import propose_state

from deployments.tpu.decide import HALTED, RETRIES, WAITING_STATES, Action, Change, Limits, SliceSeen, decide, missing
from deployments.tpu.form import TPUJobConfiguration
from deployments.tpu.pool import LIVE, Places, runs_of
from deployments.tpu.request import POOL_LABEL, SliceName, label
from deployments.tpu.seen import attempt_of, form_defaults, limits_of, newest_slice, place_of, run_seen
from deployments.tpu.standing import KEY, Standing, where_it_stands
from deployments.tpu.troubles import Troubles
from tasks.server_time import server_time_async

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

    from deployments.tpu.cloud import CloudSlice, CloudTpu
    from deployments.tpu.worker import TPUWorker

SUBMIT_SECONDS = 60.0  # for a worker to put its name on a run that it has taken
MAX_POLL_SECONDS = 10.0  # whatever a pool's form says that was made when more was allowed: who waits for a run counts on the loop
RETRY_DELAY = datetime.timedelta(seconds=1)


@dataclass
class _Found:
    """What one look found: our slices by full name, and the places that could be looked at."""

    slices: dict[str, CloudSlice]
    places: set[str]


@dataclass(frozen=True)
class _StateSeen:
    """A run's state, when this worker first saw it (monotonic), and how old it was then by the server's clock."""

    state: UUID
    at: float
    age: float


class Reconciler:
    """One worker's loop. What it remembers is only when it first saw something; a new worker counts anew.

    An error that one place, slice or run causes is told once, and the look goes on.
    """

    def __init__(self, worker: TPUWorker) -> None:
        self._worker = worker
        self._places = Places(worker)
        self._troubles = Troubles(worker._logger)  # pyright: ignore[reportPrivateUsage]
        self._standing = Standing()
        self._halted: dict[str, float] = {}
        self._active_since: dict[str, datetime.datetime] = {}
        self._states: dict[UUID, _StateSeen] = {}
        self._missing: dict[UUID, int] = {}

    async def run_forever(self) -> None:
        """Looks every `poll_seconds` until the worker ends. An error of one look is told, and the next one comes."""
        with anyio.CancelScope() as scope:
            self._worker._scheduled_task_scopes.add(scope)  # pyright: ignore[reportPrivateUsage]  (cancelled at teardown)
            while True:
                pause = 1.0
                with self._troubles.of("looking after TPU slices"):
                    pause = await self.look()
                await anyio.sleep(pause)

    async def look(self) -> float:
        """Looks at everything once; returns the seconds until the next look."""
        worker = self._worker
        if worker._work_pool is None:  # pyright: ignore[reportPrivateUsage]  (the server has not answered yet)
            return 1.0
        defaults = form_defaults(worker.work_pool.base_job_template)
        places = await self._places.find(defaults, await runs_of(worker, LIVE))
        found = await self._slices(places)
        for each in found.slices.values():
            with self._troubles.of(each.name):
                await self._settle(each, found)
        live = await runs_of(worker, LIVE)
        for run in live:
            with self._troubles.of(f"the run {run.name}"):
                await self._look_for_lost(run, found)
        self._forget(found, live)
        return min(float(defaults.get("poll_seconds") or 2.0), MAX_POLL_SECONDS)

    async def _slices(self, places: set[str]) -> _Found:
        """Our slices in all places. A place that does not answer is left out: nothing there counts as missing."""
        ours = label(self._worker.work_pool.name)
        found = _Found({}, set())

        async def _look_at(place: str) -> None:
            with self._troubles.of(f"looking for slices in {place}"):
                cloud = await self._worker.cloud(place)
                listed = await cloud.slices(place, lambda labels: labels.get(POOL_LABEL) == ours)
                found.slices |= {each.name: await self._with_hosts(cloud, each) for each in listed}
                found.places.add(place)

        async with anyio.create_task_group() as group:  # one that does not answer keeps the others for its patience at most
            for place in sorted(places):
                group.start_soon(_look_at, place)
        return found

    async def _with_hosts(self, cloud: CloudTpu, each: CloudSlice) -> CloudSlice:
        if each.state != "ACTIVE":
            return each
        with self._troubles.of(f"the hosts of {each.name}"):
            each = await cloud.with_hosts(each)
            if each.active_since is not None:
                self._active_since[each.name] = each.active_since
        return replace(each, active_since=self._active_since.get(each.name))

    async def _settle(self, each: CloudSlice, found: _Found) -> None:
        worker, name = self._worker, SliceName.parse(each.name)
        if name is None:
            return
        run = await self._read(name.flow_run)
        newest = newest_slice(name.flow_run, run, found.slices)
        if run is None or run.state is None:
            await self._do(decide(self._seen(each), None, limits_of(each.labels)), run, each)
            return
        if newest == each.name and run.infrastructure_pid != newest and attempt_of(run.infrastructure_pid) < name.attempt:
            # a worker died between asking for the slice and writing that down
            await worker.client.update_flow_run(run.id, infrastructure_pid=newest)
        elif run.state.is_pending() and run.state.name not in WAITING_STATES.values() and await self._being_submitted(run):
            return  # an older slice, of which the run was told already: whoever asks for the next one deletes it first
        states = await worker.client.read_flow_run_states(run.id)
        settled, age = await self._since(run)
        seen = run_seen(run, states, newest, settled_seconds=settled, age_seconds=age)
        await self._do(decide(self._seen(each), seen, limits_of(each.labels)), run, each)
        if newest == each.name:
            await self._standing.show(worker.client, run, each)

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
            return (await self._since(run))[0] < SUBMIT_SECONDS
        workers = await worker.client.read_workers_for_work_pool(worker.work_pool.name)
        return any(other.name == name and other.status is not None and other.status.value == "ONLINE" for other in workers)

    async def _since(self, run: FlowRun) -> tuple[float, float]:
        """Seconds since this worker first saw the run's state, and, of a crashed run, since the server set it.

        No two machines' clocks are compared: they may be minutes apart.
        """
        assert run.state is not None
        known = self._states.get(run.id)
        if known is None or known.state != run.state.id:
            age = (await server_time_async(self._worker.client) - run.state.timestamp).total_seconds() if run.state.is_crashed() else 0.0
            known = self._states[run.id] = _StateSeen(run.state.id, time.monotonic(), max(age, 0.0))
        seconds = time.monotonic() - known.at
        return seconds, known.age + seconds if run.state.is_crashed() else 0.0

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
        """The run first, then its slice: a worker that dies in between leaves a slice without a use, which the next look deletes.

        Where the run is not what was decided on any more, another worker or a person was faster: the next look decides anew.
        """
        if action.change is not None and run is not None and not await self._change(action, run, each):
            return
        if action.delete and each is not None:
            self._log("deleting %s: %s", each.name, action.why)
            await (await self._worker.cloud(each.name)).delete(each.name)

    async def _change(self, action: Action, run: FlowRun, each: CloudSlice | None) -> bool:
        """Sets the run's state; whether it has that state now."""
        worker, change = self._worker, action.change
        now = await self._read(run.id)
        if now is None or now.state is None or run.state is None or now.state.id != run.state.id:
            return False
        if change is not Change.WAIT:
            worker.get_flow_run_logger(run).warning("%s", action.why)
        if change is Change.CANCELLED:
            await worker._mark_flow_run_as_cancelled(run, {"message": action.why})  # pyright: ignore[reportPrivateUsage]
            return True
        if change is Change.WAIT:
            assert each is not None
            state = Pending(name=action.why, message=f"{where_it_stands(each)}; the run's artifact {KEY} says each minute how it stands")
        elif change in RETRIES:
            assert change is not None
            # at once for both clocks, the server's and this worker's
            due = min(datetime.datetime.now(datetime.UTC), await server_time_async(self._worker.client)) + RETRY_DELAY
            state = Scheduled(name=change.value, message=action.why, scheduled_time=due)
        else:
            state = Crashed(name=Change.GAVE_UP.value, message=action.why)
        try:
            if run.state.is_final():
                await worker.client.set_flow_run_state(run.id, state, force=True)
            else:
                await propose_state(worker.client, state, flow_run_id=run.id)
        except (Abort, ObjectNotFound) as refused:
            self._log("the run %s does not become %s: %s", run.name, state.name, refused)
            return False
        return True

    def _forget(self, found: _Found, live: list[FlowRun]) -> None:
        """What is remembered of slices and runs that are gone."""
        runs = {run.id for run in live} | {name.flow_run for each in found.slices if (name := SliceName.parse(each)) is not None}
        self._states = {run: seen for run, seen in self._states.items() if run in runs}
        self._missing = {run: count for run, count in self._missing.items() if run in runs}
        if found.places >= self._worker.places:  # a slice in a place that does not answer may still be there
            self._halted = {name: since for name, since in self._halted.items() if name in found.slices}
            self._active_since = {name: since for name, since in self._active_since.items() if name in found.slices}
        self._standing.keep_only(runs)
        self._troubles.forget_the_rest()

    def _log(self, message: str, *values: object) -> None:
        self._worker._logger.info(message, *values)  # pyright: ignore[reportPrivateUsage]
