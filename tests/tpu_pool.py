"""Training on a work pool of type tpu; all is real but the TPUs: server, worker, the API on loopback, hosts as processes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx

from deployments.tpu.worker import TPUWorker
from model.metrics import read_json_lines
from tests.main_job import MainJob, checkpoint_directory
from tests.prefect_server import Prefect

# Long enough for something to happen in the middle; a checkpoint about every two seconds.
STEPS = 400
LONG = (
    "--train.num-train-steps",
    str(STEPS),
    "--train.steps-per-export",
    "50",
    "--train.steps-per-eval",
    "200",
    "--train.steps-per-sample",
    "200",
)


def work_pools(place: Path, **defaults: Any) -> tuple[list[str], list[str]]:
    """The pools of prefect.yaml for `work-pool create`; that of type tpu with other defaults in its form."""
    template = TPUWorker.get_default_base_job_template()
    for name, value in {"devices_per_host": 1, "poll_seconds": 0.5, **defaults}.items():
        template["variables"]["properties"][name]["default"] = value
    path = place / "tpu-template.json"
    path.write_text(json.dumps(template))
    return ["local", "--type", "process"], ["tpu", "--type", "tpu", "--base-job-template", str(path)]


class Slices:
    """The emulator behind the worker, through the port that it gives to tests."""

    def __init__(self, home: Path) -> None:
        self.directory = home / "tpu-emulator"

    def _control(self) -> str:
        return json.loads((self.directory / "emulator.json").read_bytes())["control"]

    def states(self) -> dict[str, str]:
        """The state of every queued resource, by its full name."""
        try:
            return httpx.get(f"http://{self._control()}/", timeout=10).json()["queued_resources"]
        except (FileNotFoundError, httpx.HTTPError):
            return {}

    def order(self, verb: str, **fields: Any) -> None:
        """Carries out one order of `deployments.tpu.emulator.control`."""
        httpx.post(f"http://{self._control()}/{verb}", json=fields, timeout=120).raise_for_status()

    def one(self) -> str:
        """The one slice that there is, as soon as there is one."""
        return until(lambda: next(iter(self.states()), None), "a slice")

    def gone(self) -> None:
        """Waits until nothing is left."""
        until(lambda: not self.states(), "no slice", 60)

    def attempts(self, run: dict[str, Any]) -> list[int]:
        """The numbers of the slices that were ever made for a flow run."""
        name = f"pl-{UUID(run['id']).hex}-"
        return sorted({int(path.name.removeprefix(name).split("-")[0]) for path in self.directory.glob(f"{name}*.log")})

    def log(self) -> str:
        """What all hosts said."""
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(self.directory.glob("pl-*.log")))


def until(look: Callable[[], Any], what: str, seconds: float = 240.0) -> Any:
    """Waits for something that is true."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"there never was {what}"
        time.sleep(0.1)
    return found


def on_pool(
    prefect: Prefect, root: Path, logs: Path, *arguments: str, pool: str = "tpu", place: str | None = None, **variables: str
) -> MainJob:
    """`python flows/train.py --pool POOL` against the server; `variables` are of its environment, `place` is as `MainJob` has it."""
    environment = {
        name: value for name, value in prefect.environment.items() if name.startswith("PREFECT_") and name != "PREFECT_LLAMA_ROOT"
    }
    environment.pop("PREFECT_HOME")
    return MainJob(root, prefect.home, "--pool", pool, *arguments, logs=logs, place=place, **environment, **variables)


@contextmanager
def job_variables(prefect: Prefect, pool: str = "tpu", **variables: Any) -> Iterator[None]:
    """The job variables of the pool's deployment of `pretrain` within the block."""
    deployment = httpx.get(f"{prefect.api}/deployments/name/pretrain/{pool}", timeout=30).json()

    def patch(wanted: dict[str, Any]) -> bool:  # 503: the database is locked, as it may be for a moment
        answer = httpx.patch(f"{prefect.api}/deployments/{deployment['id']}", json={"job_variables": wanted}, timeout=30)
        return answer.status_code != 503 and bool(answer.raise_for_status())

    until(lambda: patch(variables), "an answer of the server")
    try:
        yield
    finally:
        until(lambda: patch(deployment["job_variables"]), "an answer of the server")


def states_of(prefect: Prefect, run: dict[str, Any]) -> list[dict[str, Any]]:
    """Every state that a run ever had, in order."""
    states = httpx.get(f"{prefect.api}/flow_run_states/", params={"flow_run_id": run["id"]}, timeout=30).json()
    return sorted(states, key=lambda state: state["timestamp"])


def state_names(prefect: Prefect, run: dict[str, Any]) -> list[str]:
    """The names of all those states."""
    return [state["name"] for state in states_of(prefect, run)]


def last_names(prefect: Prefect) -> list[str]:
    """The states of the newest run of `pretrain`."""
    return state_names(prefect, prefect.flow_runs("pretrain")[-1])


def reached(root: Path, steps: int, check: Callable[[], None] = lambda: None) -> None:
    """Waits until so many steps are in the curve of the run below `root`."""

    def far_enough() -> bool:
        check()
        found = [*root.glob("checkpoints/job-*/metrics.jsonl")]
        rows = read_json_lines(found[0]) if found else []
        return bool(rows) and rows[-1]["step"] >= steps

    until(far_enough, f"step {steps}")


def trained(job: MainJob, steps: int) -> None:
    """Waits until so many steps are in the curve; the job must not end before."""

    def lives() -> None:
        assert job.process.poll() is None, job.output

    reached(job.root, steps, lives)


def saved_step(root: Path) -> int:
    """The step of the newest checkpoint."""
    return max(int(path.name) for path in (checkpoint_directory(root) / "checkpoints").iterdir() if path.name.isdigit())


def start_worker(prefect: Prefect, name: str) -> None:
    """A worker of the pool."""
    prefect.start("worker", "start", "--pool", "tpu", "--name", name)


def end_worker(prefect: Prefect, name: str) -> None:
    """kill -9 of the newest worker of that name."""
    worker = next(process for process in reversed(prefect.processes) if name in process.args)
    worker.kill()
    worker.wait()
    prefect.processes.remove(worker)


def kill_worker(prefect: Prefect) -> None:
    """kill -9 of the worker; one of the same name starts."""
    end_worker(prefect, "first")
    start_worker(prefect, "first")


def node_of(name: str, slice_id: int | None = None) -> str:
    """The node of a queued resource, or that one of several."""
    return name.replace("/queuedResources/", "/nodes/") + ("" if slice_id is None else f"-{slice_id}")
