"""A real Prefect server and a real process worker on loopback: deploy, run, read the artifacts back through the API."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.bare_name import choose
from tests.cpu_compiler import xla_flags

CHECKOUT = Path(__file__).resolve().parent.parent
PREFECT = [sys.executable, "-m", "prefect"]
PARAMETERS = {"num_train_steps": 6, "train_batch_size": 4, "seed": 7}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class Prefect:
    """A server, and commands that talk to it."""

    def __init__(self, home: Path, port: int) -> None:
        self.home = home
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

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        log = (self.home / f"{arguments[0]}.log").open("wb")
        return subprocess.Popen([*PREFECT, *arguments], cwd=CHECKOUT, env=self.environment, stdout=log, stderr=subprocess.STDOUT)

    def run(self, *arguments: str, good: bool = True) -> str:
        done = subprocess.run([*PREFECT, *arguments], cwd=CHECKOUT, env=self.environment, capture_output=True, text=True, timeout=180)
        assert (done.returncode == 0) == good, done.stdout + done.stderr
        return done.stdout + done.stderr

    def post(self, path: str, **body: Any) -> Any:
        answer = httpx.post(f"{self.api}{path}", json=body, timeout=30)
        answer.raise_for_status()
        return answer.json()

    def flow_runs(self) -> list[dict[str, Any]]:
        return self.post("/flow_runs/filter", sort="EXPECTED_START_TIME_ASC")

    def wait_for_last_run(self, count: int) -> dict[str, Any]:
        deadline = time.monotonic() + 400
        while time.monotonic() < deadline:
            runs = self.flow_runs()
            if len(runs) == count and runs[-1]["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
                return runs[-1]
            time.sleep(1)
        raise AssertionError((self.home / "worker.log").read_text()[-5000:])


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    home, port = tmp_path_factory.mktemp("prefect"), free_port()
    prefect = Prefect(home, port)
    processes = [prefect.start("server", "start", "--host", "127.0.0.1", "--port", str(port))]
    try:
        wait_until_healthy(prefect.api, processes[0])
        prefect.run("work-pool", "create", "local", "--type", "process")
        prefect.run("--no-prompt", "deploy", "--all")
        processes.append(prefect.start("worker", "start", "--pool", "local"))
        yield prefect
    finally:
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=3)
            except subprocess.TimeoutExpired:
                process.kill()


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


def as_flags(parameters: dict[str, Any]) -> list[str]:
    return [flag for name, value in parameters.items() for flag in ("--param", f"{name}={value}")]


def test_deployed_runs_and_their_artifacts(prefect: Prefect) -> None:
    prefect.run("deployment", "run", "train-llama/train-llama", *as_flags(PARAMETERS))
    first = prefect.wait_for_last_run(1)
    assert first["state"]["type"] == "COMPLETED", (prefect.home / "worker.log").read_text()[-5000:]
    artifacts = {artifact["key"]: artifact for artifact in prefect.post("/artifacts/filter") if artifact["key"]}
    assert {"plan", "train-progress", "train-metrics", "loss-curve", "samples", "checkpoint", "run-summary"} <= artifacts.keys()
    assert float(artifacts["train-progress"]["data"]) == 100.0
    assert '"train/loss"' in artifacts["train-metrics"]["data"]
    assert artifacts["loss-curve"]["data"].startswith("data:image/png;base64,")
    assert "tokens/plays | run | first run of this step" in artifacts["plan"]["data"]
    assert "unigram entropy" in artifacts["run-summary"]["data"]

    # The bare name is the same deployment; nothing changed, so nothing runs.
    prefect.run("deployment", "run", "train-llama", *as_flags(PARAMETERS))
    second = prefect.wait_for_last_run(2)
    assert second["state"]["type"] == "COMPLETED"
    assert second["deployment_id"] == first["deployment_id"]
    tasks = prefect.post("/task_runs/filter", task_runs={"flow_run_id": {"any_": [second["id"]]}})
    assert len(tasks) == 8
    assert {task["state"]["name"] for task in tasks} == {"Cached"}


def test_the_form_in_the_ui(prefect: Prefect) -> None:
    deployment = httpx.get(f"{prefect.api}/deployments/name/train-llama/train-llama", timeout=30).json()
    schema = deployment["parameter_openapi_schema"]
    properties = schema["properties"]
    assert all(field.get("description") for field in properties.values())
    assert schema["definitions"]["Preset"]["enum"] == ["debug", "tiny"]
    assert properties["num_train_steps"]["anyOf"][0] == {"type": "integer", "minimum": 1}
    assert schema["definitions"]["LlamaConfig"]["properties"]["num_kv_heads"]["description"]
    schedules = deployment["schedules"]
    assert [schedule["active"] for schedule in schedules] == [False]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("num_train_steps=0", "num_train_steps"),
        ("preset=debgu", "preset"),
        ("learning_rate=-1", "learning_rate"),
        ("nonsense=1", "nonsense"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_starts(prefect: Prefect, flag: str, message: str) -> None:
    before = len(prefect.flow_runs())
    output = prefect.run("deployment", "run", "train-llama/train-llama", "--param", flag, good=False)
    assert message in output
    assert len(prefect.flow_runs()) == before


def test_a_bare_name_that_is_no_flow(prefect: Prefect) -> None:
    assert "no flow 'train-lama' with a deployment" in prefect.run("deployment", "run", "train-lama", good=False)


def test_which_deployment_a_bare_name_is() -> None:
    assert choose("f", {"f/only": []}) == "f/only"
    assert choose("f", {"f/a": [], "f/f": []}) == "f/f"
    assert choose("f", {"f/a": [], "f/b": ["default"]}) == "f/b"
    with pytest.raises(ValueError, match=r"several deployments: f/a, f/b"):
        choose("f", {"f/a": [], "f/b": []})
