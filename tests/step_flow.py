"""A two-step flow for the tests of caching, and how to watch, start and attack it: `python -m tests.step_flow ROOT`."""

from __future__ import annotations

import base64
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from uuid import UUID

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

from model.config_base import Config, runtime
from tasks.artifacts import Artifact
from tasks.caching import StepOutput, step_task
from tasks.places import place_of, working_directory
from tasks.records import StepLeases
from tasks.steps import Step


class Text(Config):
    """What the steps of the tests depend on."""

    text: str = "alpha"
    workers: int = runtime(2)


def _ran(step: Step, directory: Path) -> None:
    with (directory.parent.parent / "runs.log").open("a") as log:
        log.write(f"{step.kind} {os.getpid()}\n")


def raw_body(step: Step, directory: Path, inputs: tuple[Artifact, ...]) -> dict[str, int]:
    """Writes the text; the first time takes SECONDS seconds, in which the process can be killed."""
    assert isinstance(step.config, Text)
    first = not (directory / "text.txt").exists()
    (directory / "text.txt").write_text(step.config.text)
    _ran(step, directory)
    if first:
        time.sleep(float(os.environ.get("SECONDS", "0")))
    return {"characters": len(step.config.text)}


def tokens_body(step: Step, directory: Path, inputs: tuple[Artifact, ...]) -> StepOutput:
    """Writes the text of its input in capitals."""
    _ran(step, directory)
    (directory / "scratch.txt").write_text("not part of the artifact")
    tokens = directory / "tokens.txt"
    tokens.write_text(Path(inputs[0].path, "text.txt").read_text().upper())
    return StepOutput(stats={}, files=[tokens])


leases = StepLeases(heartbeat_seconds=0.2, expiry_seconds=3.0, poll_seconds=0.05)
raw = step_task(description="Write the text", leases=leases)(raw_body)
tokens = step_task(description="Write it in capitals", leases=leases, tags=["data"])(tokens_body)


def steps(text: str = "alpha", workers: int = 2) -> tuple[Step, Step]:
    """The two steps for a text."""
    first = Step("raw", "x", Text(text=text, workers=workers))
    return first, Step("tokens", "x", Text(text="-"), upstream=(first,))


@flow(name="two-steps")
def two_steps(root: str, text: str = "alpha", workers: int = 2, force: bool = False) -> Artifact:
    """Runs both steps; the second gets the future of the first."""
    first, second = steps(text, workers)
    future = (raw.forced() if force else raw).submit(first, root, [])
    return tokens.submit(second, root, [future]).result()  # pyright: ignore[reportArgumentType]


def runs(root: str) -> list[str]:
    """The kinds of the bodies that ran, in order."""
    log = working_directory(place_of(root)) / "runs.log"
    return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []


def states(flow_run_id: UUID) -> dict[str, str]:
    """The names of the final states of a flow run's tasks."""
    found: dict[str, str] = {}
    with get_client(sync_client=True) as client:
        filters = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
        for _ in range(100):
            found = {run.name: run.state_name or "" for run in client.read_task_runs(flow_run_filter=filters)}
            if len(found) == 2 and all(name in ("Cached", "Completed", "Failed") for name in found.values()):
                return found
            time.sleep(0.1)  # task states reach the server a little after the flow has ended
    raise AssertionError(f"the task runs did not end: {found}")


def start(root: str, server: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PREFECT_API_URL": server, "SECONDS": "300", "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-m", "tests.step_flow", root]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_until(process: subprocess.Popen[str], words: str) -> None:
    """Reads the log of a process up to the line with `words`."""
    assert process.stderr is not None
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if words in line:
            return
    raise AssertionError(f"{words!r} was never logged: {''.join(lines)}")


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.file,)


def pickle_record(canary: Path) -> bytes:
    """A result record as Prefect would execute it: it names the pickle serializer itself."""
    payload = base64.b64encode(pickle.dumps(Canary(canary))).decode()
    return json.dumps({"metadata": {"serializer": {"type": "pickle"}}, "result": payload}).encode()


if __name__ == "__main__":
    print(two_steps(sys.argv[1]).path)
