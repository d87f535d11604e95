"""A Prefect server, a cloud and a worker of a tpu pool for tests of its loop, in this process: they remember, and do what they are told."""

from __future__ import annotations

import datetime
import logging
from email.utils import format_datetime
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

from prefect.client.schemas.objects import State, StateType
from prefect.client.schemas.responses import OrchestrationResult, SetStateStatus, StateAcceptDetails
from prefect.exceptions import ObjectNotFound

from deployments.tpu.cloud import CloudSlice
from deployments.tpu.form import TPUJobConfiguration
from deployments.tpu.request import SliceName, labels

ZONES = ["us-central2-b", "us-east5-a"]
FORM: dict[str, Any] = {"provider": "cloud", "project": "p", "zones": ZONES, "image": "i"}
CONFIGURATION = TPUJobConfiguration(**FORM)
FIRST, SECOND = (CONFIGURATION.parent(zone) for zone in ZONES)


def now() -> datetime.datetime:
    """By this machine's clock."""
    return datetime.datetime.now(datetime.UTC)


class Server:
    """What the loop and a launch ask of Prefect. ahead: seconds of its clock before this machine's."""

    def __init__(self, *, ahead: float = 0.0) -> None:
        self.runs: dict[UUID, Any] = {}
        self.states: dict[UUID, list[State]] = {}
        self.deployments: list[Any] = []
        self.artifacts: list[Any] = []
        self.ahead = datetime.timedelta(seconds=ahead)

    def run(self, type_: str, name: str = "", *, pid: str | None = None, ago: float = 0.0, **fields: Any) -> Any:
        written = {"infrastructure_pid": pid, "labels": {}, "deployment_id": None, "job_variables": {}, "parameters": {}, "state": None}
        run = SimpleNamespace(id=uuid4(), name=f"run {len(self.runs)}", **written)
        vars(run).update(fields)
        self.runs[run.id], self.states[run.id] = run, []
        self.put(run.id, State(type=StateType(type_), name=name or type_.title()), ago=ago)
        return run

    def put(self, run: UUID, state: State, *, ago: float = 0.0) -> None:
        timestamp = now() + self.ahead - datetime.timedelta(seconds=ago)
        kept = state.model_copy(update={"id": uuid4(), "timestamp": timestamp})
        self.states[run].append(kept)
        self.runs[run] = SimpleNamespace(**{**vars(self.runs[run]), "state": kept})

    def names(self, run: Any) -> list[str | None]:
        return [state.name for state in self.states[run.id]]

    def state(self, run: Any) -> State:
        return self.states[run.id][-1]

    async def hello(self) -> Any:
        return SimpleNamespace(headers={"Date": format_datetime(now() + self.ahead, usegmt=True)})

    async def read_flow_runs(self, *, flow_run_filter: Any, limit: int, offset: int, **_: Any) -> list[Any]:
        wanted = flow_run_filter.state.type.any_
        return [run for run in self.runs.values() if run.state.type in wanted][offset : offset + limit]

    async def read_flow_run(self, run: UUID) -> Any:
        if run not in self.runs:
            raise ObjectNotFound(Exception())
        return self.runs[run]

    async def read_flow_run_states(self, run: UUID) -> list[State]:
        return list(self.states[run])

    async def read_deployments(self, *, limit: int, offset: int, **_: Any) -> list[Any]:
        return self.deployments[offset : offset + limit]

    async def read_workers_for_work_pool(self, pool: str) -> list[Any]:
        return []

    async def update_flow_run(self, run: UUID, infrastructure_pid: str) -> None:
        self.runs[run] = SimpleNamespace(**{**vars(self.runs[run]), "infrastructure_pid": infrastructure_pid})

    async def set_flow_run_state(self, run: UUID, state: State, force: bool = False) -> Any:
        self.put(run, state)
        return OrchestrationResult(state=self.runs[run].state, status=SetStateStatus.ACCEPT, details=StateAcceptDetails())

    async def read_artifacts(self, *, artifact_filter: Any) -> list[Any]:
        return [each for each in self.artifacts if each.flow_run_id in artifact_filter.flow_run_id.any_]

    async def create_artifact(self, wanted: Any) -> Any:
        self.artifacts.append(SimpleNamespace(id=uuid4(), key=wanted.key, data=wanted.data, flow_run_id=wanted.flow_run_id))
        return self.artifacts[-1]

    async def update_artifact(self, artifact: UUID, wanted: Any) -> None:
        (found,) = [each for each in self.artifacts if each.id == artifact]
        found.data = wanted.data


class Clouds:
    """Cloud TPU: slices by name. errors: what a method raises for a name, or a place, while it is there."""

    def __init__(self) -> None:
        self.there: dict[str, CloudSlice] = {}
        self.errors: dict[tuple[str, str], Exception] = {}
        self.asked: list[str] = []
        self.deleted: list[str] = []
        self.before_create: Any = None

    def put(self, run: Any, state: str = "ACTIVE", *, attempt: int = 1, place: str = FIRST, age: float = 0.0, **fields: Any) -> str:
        name = f"{place}/queuedResources/{SliceName(run.id, attempt)}"
        created = now() - datetime.timedelta(seconds=age)
        self.there[name] = CloudSlice(name, state, labels(CONFIGURATION, run.id, "tpu"), created, **fields)
        return name

    def _raise(self, method: str, name: str) -> None:
        if (method, name) in self.errors:
            raise self.errors[method, name]

    async def slices(self, parent: str, wanted: Any) -> list[CloudSlice]:
        self.asked.append(parent)
        self._raise("slices", parent)
        return [each for each in self.there.values() if each.name.startswith(f"{parent}/") and wanted(each.labels)]

    async def with_hosts(self, each: CloudSlice) -> CloudSlice:
        self._raise("with_hosts", each.name)
        return each

    async def create(self, configuration: Any, zone: str, name: str, wanted: dict[str, str], metadata: dict[str, str]) -> str:
        if self.before_create is not None:
            self.before_create()
        parent = configuration.parent(zone)
        self._raise("create", parent)
        full = f"{parent}/queuedResources/{name}"
        self.there[full] = CloudSlice(full, "ACCEPTED", wanted, now())
        return full

    async def delete(self, name: str) -> None:
        self._raise("delete", name)
        self.deleted.append(name)
        self.there.pop(name, None)

    async def exists(self, name: str) -> bool:
        return name in self.there


def worker(server: Server, clouds: Clouds, name: str = "w", **defaults: Any) -> Any:
    """As much of a worker as the loop and a launch look at. defaults: of the pool's form."""

    async def cloud(of: str) -> Clouds:
        return clouds

    async def cancelled(run: Any, updates: dict[str, Any]) -> None:
        await server.set_flow_run_state(run.id, State(type=StateType.CANCELLED, name="Cancelled", **updates), force=True)

    properties = {field: {"default": value} for field, value in defaults.items()}
    pool = SimpleNamespace(name="tpu", base_job_template={"variables": {"properties": properties}})
    return SimpleNamespace(
        _work_pool=pool, work_pool=pool, client=server, name=name, backend_id=None, places=set(), cloud=cloud,
        _logger=logging.getLogger(f"worker.{name}"), get_flow_run_logger=lambda run: logging.getLogger("run"),
        _submitting_flow_run_ids=set(), _mark_flow_run_as_cancelled=cancelled,
    )  # fmt: skip
