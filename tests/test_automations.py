"""Automations on a real server: made once however often, silent runs crash, crashed control flows start again, and somebody is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
import yaml

from deployments.automations import RULES, read_rules
from tests.prefect_server import CHECKOUT, Prefect, prefect_server
from tests.tpu_pool import state_names, until, work_pools

pytestmark = pytest.mark.slow

SILENT, AGAIN = (rule["name"] for rule in read_rules(RULES))


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    home = tmp_path_factory.mktemp("prefect")
    with prefect_server(home, *work_pools(home)) as prefect:
        yield prefect


def command(prefect: Prefect, *arguments: str, status: int = 0) -> str:
    """`python -m deployments.automations`, as it is documented."""
    line = [sys.executable, "-m", "deployments.automations", *arguments]
    done = subprocess.run(line, cwd=CHECKOUT, env=prefect.environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def impatient(place: Path, seconds: int) -> Path:
    """The rules, with so many seconds of silence allowed, and a restart soon after."""
    rules = yaml.safe_load(RULES.read_text())
    for rule, within in zip(rules["automations"], (seconds, 15), strict=True):
        rule["trigger"]["within"] = within
    path = place / "rules.yaml"
    path.write_text(yaml.safe_dump(rules))
    return path


def automations(prefect: Prefect) -> dict[str, list[dict[str, Any]]]:
    """Those that are there, by name."""
    found: dict[str, list[dict[str, Any]]] = {}
    for each in prefect.post("/automations/filter"):
        found.setdefault(each["name"], []).append(each)
    return found


def started_run(prefect: Prefect, deployment: str = "train-llama/tpu") -> str:
    """A run that says it is running, and of which nothing else is there; its id."""
    identity = httpx.get(f"{prefect.api}/deployments/name/{deployment}", timeout=30).json()["id"]
    name = f"{deployment.partition('/')[0]}-{uuid4().hex[:6]}"
    run = prefect.post(f"/deployments/{identity}/create_flow_run", name=name, parameters={"job": {}}, enforce_parameter_schema=False)
    become(prefect, run["id"], "PENDING")
    become(prefect, run["id"], "RUNNING")
    return run["id"]


def become(prefect: Prefect, run: str, state: str, **details: str) -> None:
    answer = prefect.post(f"/flow_runs/{run}/set_state", state={"type": state, **details}, force=True)
    assert answer["status"] == "ACCEPT", answer


def heartbeat(prefect: Prefect, run: str) -> None:
    """What a run that lives sends."""
    event = {
        "id": str(uuid4()),
        "occurred": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "event": "prefect.flow-run.heartbeat",
        "resource": {"prefect.resource.id": f"prefect.flow-run.{run}"},
    }
    httpx.post(f"{prefect.api}/events", json=[event], timeout=30).raise_for_status()


def state(prefect: Prefect, run: str) -> str:
    return httpx.get(f"{prefect.api}/flow_runs/{run}", timeout=30).json()["state"]["type"]


def test_made_once_however_often_and_brought_up_to_date(prefect: Prefect, tmp_path: Path) -> None:
    assert f"{SILENT}: made" in command(prefect)
    first = automations(prefect)
    assert {name: len(each) for name, each in first.items()} == {SILENT: 1, AGAIN: 1}
    prefect.run("automation", "pause", AGAIN)
    assert f"{SILENT}: up to date" in command(prefect, "--rules", str(impatient(tmp_path, 1200)))
    second = automations(prefect)
    assert {name: [each["id"] for each in found] for name, found in second.items()} == {
        name: [each["id"] for each in found] for name, found in first.items()
    }
    assert second[SILENT][0]["trigger"]["within"] == 1200
    assert not second[AGAIN][0]["enabled"], "who switched it off wants it off"

    # Prefect's own command makes them twice, and then each acts twice.
    prefect.run("automation", "create", "--from-file", str(RULES))
    assert len(automations(prefect)[SILENT]) == 2
    assert "1 more of that name deleted" in command(prefect)
    assert {len(each) for each in automations(prefect).values()} == {1}
    prefect.run("automation", "resume", AGAIN)


def test_a_silent_run_crashes_and_a_crashed_control_flow_starts_again(prefect: Prefect, tmp_path: Path) -> None:
    command(prefect, "--rules", str(impatient(tmp_path, 20)))
    control, other = started_run(prefect), started_run(prefect, "pretrain/tpu")
    ended, alive = started_run(prefect), started_run(prefect)
    for run in (control, other, ended, alive):
        heartbeat(prefect, run)
    become(prefect, ended, "COMPLETED")
    told = time.monotonic()

    def have_crashed() -> bool:
        nonlocal told
        if time.monotonic() - told > 2:
            heartbeat(prefect, alive)
            told = time.monotonic()
        return state(prefect, control) == "SCHEDULED" and state(prefect, other) == "CRASHED"

    until(have_crashed, "a crashed run that is scheduled again", 120)
    assert state_names(prefect, {"id": control})[-2:] == ["Crashed", "Scheduled"]
    assert state(prefect, ended) == "COMPLETED"
    assert state(prefect, alive) == "RUNNING"
    become(prefect, alive, "CANCELLED")


def test_a_run_that_crashes_each_time_is_left_alone(prefect: Prefect, tmp_path: Path) -> None:
    command(prefect, "--rules", str(impatient(tmp_path, 660)))
    hopeless = started_run(prefect)
    for _ in range(9):
        become(prefect, hopeless, "PENDING")
        become(prefect, hopeless, "RUNNING")
    become(prefect, hopeless, "CRASHED")
    unlucky = started_run(prefect)
    become(prefect, unlucky, "CRASHED")
    until(lambda: state(prefect, unlucky) == "SCHEDULED", "a restart of the run that crashed after it", 60)
    assert state(prefect, hopeless) == "CRASHED"


def test_a_control_flow_that_is_killed_goes_on_by_itself(prefect: Prefect) -> None:
    command(prefect)
    model = {"seq_len": 64, "hidden_dim": 32, "intermediate_dim": 64, "num_heads": 2, "num_kv_heads": 1, "num_layers": 2}
    parameters = {"num_train_steps": 300, "train_batch_size": 4, "model": json.dumps(model), "name": "killed"}
    flags = [flag for name, value in parameters.items() for flag in ("--param", f"{name}={value}")]
    worker = prefect.start("worker", "start", "--pool", "local")
    try:
        before = {run["id"] for run in prefect.flow_runs()}
        prefect.run("deployment", "run", "train-llama/train-llama", *flags)
        (run,) = [run for run in prefect.flow_runs() if run["id"] not in before]
        until(lambda: [*(prefect.home / "artifacts").glob("checkpoints/killed-*/metrics.jsonl")], "a curve")
        children = (Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text()).split()
        assert children, "the worker runs the flow in a process of its own"
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        until(lambda: "Crashed" in state_names(prefect, run), "a crashed run", 120)
        until(lambda: state(prefect, run["id"]) == "COMPLETED", "its good end")
        names = state_names(prefect, run)
        assert names.count("Running") == 2, names
        assert names.index("Scheduled", 1) > max(index for index, name in enumerate(names) if name == "Crashed"), names
    finally:
        worker.terminate()
        worker.wait(timeout=60)


class Received(ThreadingHTTPServer):
    """A web hook on loopback, and what it was told."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Hook)
        self.told: list[dict[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"


class _Hook(BaseHTTPRequestHandler):
    server: Received  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, *arguments: Any) -> None:
        """Says nothing."""

    def do_POST(self) -> None:
        self.server.told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def web_hook() -> Iterator[Received]:
    server = Received()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def save_block(prefect: Prefect, name: str, url: str) -> None:
    """What a person does in the UI: a custom web hook that is told subject and body."""
    code = (
        "from prefect.blocks.notifications import CustomWebhookNotificationBlock as Hook; import sys; "
        "Hook(name='hook', url=sys.argv[2], json_data={'subject': '{{subject}}', 'body': '{{body}}'}).save(sys.argv[1])"
    )
    environment = {**os.environ, **prefect.environment}
    subprocess.run([sys.executable, "-c", code, name, url], env=environment, check=True, timeout=120)


def test_somebody_is_told_when_training_ends_badly(prefect: Prefect) -> None:
    assert "no such block" in command(prefect, "--notify", "custom-webhook/nobody", status=2)
    with web_hook() as hook:
        save_block(prefect, "team", hook.url)
        for _ in range(2):
            command(prefect, "--notify", "custom-webhook/team")
        failed, gave_up, good, other = (
            started_run(prefect, name) for name in ("train-llama/tpu", "pretrain/tpu", "train-llama/tpu", "sweep-tpu/sweep-tpu")
        )
        become(prefect, good, "COMPLETED")
        become(prefect, other, "FAILED", message="of no interest")
        become(prefect, failed, "FAILED", message="the disk is full")
        become(prefect, gave_up, "CRASHED", name="GaveUp", message="max_preemptions=3 is used up")
        until(lambda: len(hook.told) >= 2, "two messages", 60)
        told = {message["body"].split("\n")[0]: message["subject"] for message in hook.told}
        assert told.keys() == {"the disk is full", "max_preemptions=3 is used up"}
        assert told["the disk is full"].startswith("train-llama-")
        assert told["the disk is full"].endswith(" is Failed")
        assert told["max_preemptions=3 is used up"].endswith(" gave up")
        assert len(hook.told) == 2
