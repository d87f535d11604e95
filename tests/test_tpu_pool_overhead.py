"""What the way to a slice and back costs beside training, from `prefect deployment run` to the deleted slice."""

from __future__ import annotations

import datetime
import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.prefect_server import Prefect
from tests.tpu_pool import Slices, kill_worker, state_names, until

pytest_plugins = ["tests.tpu_pool_fixtures"]
pytestmark = pytest.mark.slow

MODEL = {"seq_len": 128, "hidden_dim": 32, "intermediate_dim": 64, "num_heads": 2, "num_kv_heads": 1, "num_layers": 2}
STEPS = 60
MOST_SECONDS = 20.0
MOST_BUSY = 0.4  # of all cores, by others; the idle server and its workers are a part of that
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


def moment(text: str) -> float:
    return datetime.datetime.fromisoformat(text).timestamp()


def said(prefect: Prefect, run: dict[str, Any], words: str) -> float:
    """When a run first said something."""
    logs = prefect.post("/logs/filter", logs={"flow_run_id": {"any_": [run["id"]]}}, sort="TIMESTAMP_ASC")
    return next(moment(log["timestamp"]) for log in logs if words in log["message"])


def busy_share(seconds: float = 3.0) -> float:
    """How much of all cores is in use, over some seconds."""

    def spent() -> tuple[int, int]:
        ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
        return sum(ticks), ticks[3] + ticks[4]  # idle, and waiting for disks

    total, idle = spent()
    time.sleep(seconds)
    total_now, idle_now = spent()
    return 1 - (idle_now - idle) / (total_now - total)


def test_little_time_goes_by_beside_training(prefect: Prefect, slices: Slices) -> None:
    """With the settings of the checkout for both workers. Steps before training are work of their own, told and not counted."""
    queries = prefect.environment.pop("PREFECT_WORKER_QUERY_SECONDS")
    try:
        prefect.start("worker", "start", "--pool", "local")
        kill_worker(prefect)
    finally:
        prefect.environment["PREFECT_WORKER_QUERY_SECONDS"] = queries
    for _ in range(20):  # until the workers have started
        if (busy := busy_share()) < MOST_BUSY:
            break
    flags = {"num_train_steps": STEPS, "train_batch_size": 4, "model": json.dumps(MODEL), "name": "overhead"}
    prefect.run("deployment", "run", "train-llama/tpu", *(word for name, value in flags.items() for word in ("--param", f"{name}={value}")))
    until(lambda: prefect.flow_runs()[-1]["state"]["type"] in FINAL and not slices.states(), "the end of the run and its slice")
    ended = datetime.datetime.now(datetime.UTC).timestamp()
    run, child = prefect.flow_runs()[-1], prefect.flow_runs("pretrain")[-1]
    assert run["state"]["name"] == "Completed", run["state"]
    assert state_names(prefect, child)[-1] == "Completed"

    tasks = sorted(prefect.post("/task_runs/filter", task_runs={"flow_run_id": {"any_": [run["id"]]}}), key=lambda task: task["start_time"])
    training = next(task for task in tasks if task["name"].startswith("checkpoints"))
    export = next(task for task in tasks if task["name"].startswith("hf"))
    compiling = said(prefect, child, "compiling the training step")
    parts = {
        "the flow starts": (run["created"], run["start_time"]),
        "data": (run["start_time"], training["start_time"]),
        "a slice": (training["start_time"], child["start_time"]),
        "the trainer starts": (child["start_time"], compiling),
        "training": (compiling, child["end_time"]),
        "its end is noticed": (child["end_time"], export["start_time"]),
        "export": (export["start_time"], run["end_time"]),
        "the slice is gone": (run["end_time"], ended),
    }
    spent = {name: _at(end) - _at(start) for name, (start, end) in parts.items()}
    assert sum(spent.values()) == pytest.approx(ended - moment(run["created"]))
    overhead = sum(spent.values()) - spent["training"] - spent["data"]
    print(f"\n{overhead:.1f} s beside the work: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in spent.items()))
    if busy > MOST_BUSY:
        pytest.skip(f"{busy:.0%} of this machine were in use by others: {overhead:.1f} s say nothing")
    assert overhead < MOST_SECONDS, spent


def _at(time: str | float) -> float:
    return moment(time) if isinstance(time, str) else time
