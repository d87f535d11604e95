"""Training on a work pool of type tpu; all is real but the TPUs: server, worker, the API on loopback, hosts as processes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from deployments.tpu.worker import TPUWorker
from tests.main_job import MainJob
from tests.prefect_server import Prefect

HOSTS = 2


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


def on_pool(prefect: Prefect, root: Path, logs: Path, *arguments: str, place: str | None = None, **variables: str) -> MainJob:
    """`python flows/train.py --pool tpu` against the server; `variables` are of its environment, `place` is as `MainJob` has it."""
    environment = {
        name: value for name, value in prefect.environment.items() if name.startswith("PREFECT_") and name != "PREFECT_LLAMA_ROOT"
    }
    environment.pop("PREFECT_HOME")
    return MainJob(root, prefect.home, "--pool", "tpu", *arguments, logs=logs, place=place, **environment, **variables)


def state_names(prefect: Prefect, run: dict[str, Any]) -> list[str]:
    """Every state that a run ever had, in order."""
    states = httpx.get(f"{prefect.api}/flow_run_states/", params={"flow_run_id": run["id"]}, timeout=30).json()
    return [state["name"] for state in sorted(states, key=lambda state: state["timestamp"])]
