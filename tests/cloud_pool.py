"""A pool of provider `cloud` whose Google Cloud is here: the API with faults by order, two zones, Secret Manager, and a docker that runs
what an image would."""

from __future__ import annotations

import base64
import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import httpx

from deployments.tpu.emulator.cloud import Cloud
from deployments.tpu.emulator.fulfilment import Supply
from deployments.tpu.emulator.refusal import Refusal
from deployments.tpu.emulator.service import Service
from tests.main_job import MainJob, checkpoint_directory
from tests.prefect_server import CHECKOUT, Prefect
from tests.tpu_pool import reached, states_of, until, work_pools

POOL = "cloud"
FIRST, SECOND = (f"projects/p/locations/{zone}" for zone in ("us-central2-b", "us-central1-a"))
FORM = {
    "provider": "cloud",
    "project": "p",
    "zones": ["us-central2-b", "us-central1-a"],
    "image": "host/image@sha256:1",
    "valid_until": 15 / 3600,
}
# Of the worker's own machine.
WORKER_SECRETS = {
    "WANDB_API_KEY": "canary-of-the-worker-wandb",
    "HF_TOKEN": "canary-of-the-worker-hub",
    "PREFECT_API_KEY": "canary-of-the-worker-prefect",
}

# What `docker run … --env-file FILE -v … IMAGE COMMAND` does on a host, with this checkout for the image.
DOCKER = f"""#!{sys.executable} -IS
import os, sys
if sys.argv[1] == "run":
    environment = dict(line.rstrip("\\n").split("=", 1) for line in open(sys.argv[sys.argv.index("--env-file") + 1]))
    command = [{sys.executable!r}, *sys.argv[sys.argv.index({FORM["image"]!r}) + 2 :]]
    os.chdir({str(CHECKOUT)!r})
    simulated = {{name: os.environ[name] for name in ("JAX_PLATFORMS", "XLA_FLAGS")}}  # in place of chips
    os.execve(command[0], command, {{**os.environ, **environment, **simulated}})
"""


class Faults:
    """Refuses calls of the API by order, in place of carrying them out, or after, when only the answer is lost. Counts calls."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self._orders: list[tuple[str, grpc.StatusCode, bool]] = []
        self._lock = threading.Lock()

    def order(self, method: str, code: grpc.StatusCode, *, times: int = 1, after: bool = False) -> None:
        """The next calls of `method` that no earlier order is for."""
        with self._lock:
            self._orders += [(method, code, after)] * times

    @property
    def left(self) -> int:
        """Orders that no call came for yet."""
        with self._lock:
            return len(self._orders)

    def __call__(self, method: str, request: Any, call: Callable[[], Any]) -> Any:
        with self._lock:
            self.calls[method] += 1
            mine = next((order for order in self._orders if order[0] == method), None)
            if mine is not None:
                self._orders.remove(mine)
        if mine is None:
            return call()
        if mine[2]:
            call()
        raise Refusal(mine[1], "injected")


@dataclass
class SimulatedCloud:
    """The cloud behind the pool. `secrets` are what Secret Manager has, by the name of the secret in project p."""

    api: Cloud
    supply: Supply
    directory: Path
    faults: Faults = field(default_factory=Faults)
    secrets: dict[str, str] = field(default_factory=dict)

    def states(self) -> dict[str, str]:
        """The state of every queued resource, by its full name."""
        return {one.name: one.state.state.name for one in self.api.list("")}

    def one(self) -> str:
        """The one slice that there is, as soon as there is one."""
        return until(lambda: next(iter(self.states()), None), "a slice")

    def gone(self) -> None:
        """Waits until nothing is left."""
        until(lambda: not self.states(), "no slice", 60)


class CloudRun:
    """One run of `pretrain` on the pool: the job of a finished run, which trains it anew below `place`."""

    def __init__(self, prefect: Prefect, finished: MainJob, place: Path, **changes: Any) -> None:
        before = checkpoint_directory(finished.root)
        self.directory = place / "checkpoints" / before.name
        self.directory.mkdir(parents=True)
        job = json.loads((before / ".job.json").read_text())
        (mixture,) = (finished.root / "mixtures").glob("*-*")
        self._job = job | {"directory": str(self.directory), "mixture": str(mixture)} | changes
        self._prefect = prefect
        self._id = ""

    def submit(self) -> None:
        """Asks for the run."""
        deployment = httpx.get(f"{self._prefect.api}/deployments/name/pretrain/{POOL}", timeout=30).json()
        made = self._prefect.post(f"/deployments/{deployment['id']}/create_flow_run", parameters={"job": self._job})
        self._id = made["id"]

    @property
    def run(self) -> dict[str, Any]:
        """The run as it is."""
        return httpx.get(f"{self._prefect.api}/flow_runs/{self._id}", timeout=30).json()

    @property
    def states(self) -> list[dict[str, Any]]:
        """Every state that it ever had, in order."""
        return states_of(self._prefect, {"id": self._id})

    @property
    def names(self) -> list[str]:
        """The names of these."""
        return [state["name"] for state in self.states]

    def until_named(self, name: str) -> None:
        """Waits for a state of that name."""
        until(lambda: name in self.names, name)

    def until_final(self, name: str) -> dict[str, Any]:
        """Waits until it ended and the worker has said its last word; the state, which must have that name."""
        until(lambda: self.states[-1]["name"] in (name, "GaveUp", "Completed", "Cancelled"), name, 400)
        assert self.states[-1]["name"] == name, self.states
        return self.states[-1]

    def trained(self, steps: int) -> None:
        """Waits until so many steps are in the curve."""
        reached(self.directory.parent.parent, steps)


def _secret_manager(cloud: SimulatedCloud) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = self.path.split("/")  # /v1/projects/p/secrets/NAME/versions/latest:access
            value = cloud.secrets.get(parts[5]) if self.headers["Authorization"] == "Bearer emulated" else None
            self.send_response(403 if value is None else 200)
            self.end_headers()
            if value is not None:
                self.wfile.write(json.dumps({"payload": {"data": base64.b64encode(value.encode()).decode()}}).encode())

        def log_message(self, format: str, *args: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@contextmanager
def simulated_cloud(prefect: Prefect, directory: Path, **environment: str) -> Iterator[SimulatedCloud]:
    """The pool `cloud`, its deployment of `pretrain`, and a worker with these variables; all of it ends with the block."""
    (directory / "bin").mkdir()
    docker = directory / "bin" / "docker"
    docker.write_text(DOCKER)
    docker.chmod(0o755)
    supply = Supply()
    cloud = SimulatedCloud(Cloud(directory, supply, grace_seconds=20.0), supply, directory)
    service = Service(cloud.api, around=cloud.faults)
    secrets = _secret_manager(cloud)
    before = dict(os.environ)
    os.environ["PATH"] = f"{docker.parent}{os.pathsep}{os.environ['PATH']}"
    os.environ["SECRET_MANAGER_ADDRESS"] = f"http://127.0.0.1:{secrets.server_port}"
    worker = None
    try:
        _, (_, *arguments) = work_pools(directory, **FORM)
        prefect.run("work-pool", "create", POOL, *arguments)
        prefect.run("--no-prompt", "deploy", "flows/pretrain.py:pretrain", "--name", POOL, "--pool", POOL)
        variables = {"PREFECT_LLAMA_TPU_API": service.start(), **environment}
        worker = prefect.start("worker", "start", "--pool", POOL, "--name", POOL, **variables)
        yield cloud
    finally:
        os.environ.clear()
        os.environ.update(before)
        if worker is not None:
            worker.kill()
            worker.wait()
            prefect.processes.remove(worker)
        service.stop()
        cloud.api.close(grace=0.0)
        secrets.shutdown()
