"""A real Prefect server on loopback for tests, with commands, workers and the API."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.cpu_compiler import xla_flags

CHECKOUT = Path(__file__).resolve().parent.parent
PREFECT = [sys.executable, "-m", "prefect"]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class Prefect:
    """A server, and commands that talk to it."""

    def __init__(self, home: Path, port: int) -> None:
        self.home = home
        self.processes: list[subprocess.Popen[bytes]] = []
        self.api = f"http://127.0.0.1:{port}/api"
        self.environment = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"}
        self.environment |= {
            "XLA_FLAGS": xla_flags(),
            "PREFECT_HOME": str(home),
            "PREFECT_API_URL": self.api,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_LLAMA_ROOT": str(home / "artifacts"),
            "NO_COLOR": "1",
        }

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """A command that stays, with these variables besides the usual ones."""
        variables = self.environment | environment
        with (self.home / f"{arguments[0]}.log").open("ab") as log:
            process = subprocess.Popen([*PREFECT, *arguments], cwd=CHECKOUT, env=variables, stdout=log, stderr=subprocess.STDOUT)
        self.processes.append(process)
        return process

    def run(self, *arguments: str, good: bool = True) -> str:
        done = subprocess.run([*PREFECT, *arguments], cwd=CHECKOUT, env=self.environment, capture_output=True, text=True, timeout=180)
        assert (done.returncode == 0) == good, done.stdout + done.stderr
        return done.stdout + done.stderr

    def post(self, path: str, **body: Any) -> Any:
        for attempt in range(20):
            answer = httpx.post(f"{self.api}{path}", json=body, timeout=30)
            if answer.status_code != 503:  # the database is locked for a moment: Prefect's own client asks again too
                break
            time.sleep(0.1 * attempt)
        answer.raise_for_status()
        return answer.json()

    def flow_runs(self, flow: str = "train-llama") -> list[dict[str, Any]]:
        """The runs of a flow, the newest last."""
        return self.post("/flow_runs/filter", flows={"name": {"any_": [flow]}}, sort="EXPECTED_START_TIME_ASC")

    def wait_for_last_run(self, count: int, flow: str = "train-llama") -> dict[str, Any]:
        """The last of so many runs of a flow, when it has ended."""
        deadline = time.monotonic() + 400
        while time.monotonic() < deadline:
            runs = self.flow_runs(flow)
            if len(runs) == count and runs[-1]["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
                return runs[-1]
            time.sleep(1)
        raise AssertionError((self.home / "worker.log").read_text()[-5000:])


@contextmanager
def prefect_server(home: Path, *pools: list[str]) -> Iterator[Prefect]:
    """A server with work pools, by the arguments of `prefect work-pool create`, and the deployments of prefect.yaml on them."""
    port = free_port()
    prefect = Prefect(home, port)
    server = prefect.start("server", "start", "--host", "127.0.0.1", "--port", str(port))
    try:
        wait_until_healthy(prefect.api, server)
        for pool in pools:
            prefect.run("work-pool", "create", *pool)
        prefect.run("--no-prompt", "deploy", "--all")
        yield prefect
    finally:
        for process in [*reversed(prefect.processes[1:]), server]:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=3)
            except subprocess.TimeoutExpired:
                process.kill()
        end_simulated_slices(home)


def end_simulated_slices(home: Path) -> None:
    """Ends the emulator that a worker started, with its hosts: it outlives its workers, and stays until nobody needed it for a while."""
    written = home / "tpu-emulator" / "emulator.json"
    try:
        os.kill(int(json.loads(written.read_bytes())["pid"]), signal.SIGTERM)
    except (FileNotFoundError, ProcessLookupError):
        return
    deadline = time.monotonic() + 60
    while written.exists():
        assert time.monotonic() < deadline, "the emulator did not end"
        time.sleep(0.1)


def wait_until_healthy(api: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert server.poll() is None, "the server ended"
        try:
            if httpx.get(f"{api}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.5)
    raise AssertionError("the server did not start")
