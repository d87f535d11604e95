"""What the Prefect server knows of the work pool: its flow runs, and where their slices may be."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType, WorkPoolFilter, WorkPoolFilterName
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.sorting import FlowRunSort

from deployments.tpu.emulator.address import is_free
from deployments.tpu.seen import place_of, places_of
from deployments.tpu.worker import emulator_directory, is_local

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

    from deployments.tpu.worker import TPUWorker

LIVE = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
ENDED = [state for state in StateType if state not in LIVE]
PAGE = 200  # runs, or deployments, that the server sends at once
DEPLOYMENTS_SECONDS = 300.0  # between two looks at the pool's deployments


async def runs_of(worker: TPUWorker, types: list[StateType], *, most: int | None = None) -> list[FlowRun]:
    """Flow runs of the worker's pool in these states, those expected last first; all of them, or `most`."""
    wanted = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=types)))
    found: list[FlowRun] = []
    while True:
        page = await worker.client.read_flow_runs(
            work_pool_filter=_pool(worker),
            flow_run_filter=wanted,
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
            limit=PAGE,
            offset=len(found),
        )
        found += page
        if len(page) < PAGE or (most is not None and len(found) >= most):
            return found


class Places:
    """Adds to the worker's `places` where slices of its pool may be, whoever made them and whatever became of their runs."""

    def __init__(self, worker: TPUWorker) -> None:
        self._worker = worker
        self._variables: dict[UUID, dict[str, Any]] = {}  # job variables of the pool's deployments
        self._read_at: float | None = None

    async def find(self, defaults: dict[str, Any], live: list[FlowRun]) -> set[str]:
        """All places so far. defaults: the pool's own values of the form. live: the pool's runs that may have slices."""
        runs, first = live, self._read_at is None
        if self._read_at is None or time.monotonic() - self._read_at > DEPLOYMENTS_SECONDS:
            self._variables = await self._deployments()
            if first:  # a run may have ended while no worker looked, and its slice still be there
                runs = [*live, *await runs_of(self._worker, ENDED, most=PAGE)]
            self._read_at = time.monotonic()
        found = places_of(defaults).union(*(places_of(defaults, variables) for variables in self._variables.values()))
        for run in runs:
            variables = self._variables.get(run.deployment_id) if run.deployment_id is not None else None
            found |= places_of(defaults, variables, run.job_variables)
        if not _emulator_lives():  # it would be started to say that it has none
            found = {place for place in found if not is_local(place)}
        self._worker.places |= found | {place_of(run) for run in runs} - {""}
        return self._worker.places

    async def _deployments(self) -> dict[UUID, dict[str, Any]]:
        found: dict[UUID, dict[str, Any]] = {}
        while True:
            page = await self._worker.client.read_deployments(work_pool_filter=_pool(self._worker), limit=PAGE, offset=len(found))
            found |= {each.id: each.job_variables for each in page}
            if len(page) < PAGE:
                return found


def _emulator_lives() -> bool:
    directory = emulator_directory()
    return directory.is_dir() and not is_free(directory)


def _pool(worker: TPUWorker) -> WorkPoolFilter:
    return WorkPoolFilter(name=WorkPoolFilterName(any_=[worker.work_pool.name]))
