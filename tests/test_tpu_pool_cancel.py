"""Cancelled by whoever looks at the UI, while it trains: a checkpoint is saved, the slice is gone, and soon."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from model.metrics import read_json_lines
from tasks.presets import preset
from tests.main_job import MainJob, assert_same_outcome, checkpoint_directory
from tests.prefect_server import Prefect
from tests.tpu_pool import LONG, STEPS, Slices, last_names, on_pool, reached, saved_step, trained, until

pytest_plugins = ["tests.tpu_pool_fixtures"]
pytestmark = pytest.mark.slow

MOST_SECONDS = 30.0


def cancel(prefect: Prefect, run: dict[str, Any]) -> None:
    prefect.post(f"/flow_runs/{run['id']}/set_state", state={"type": "CANCELLING"})


def within_the_limit(prefect: Prefect, slices: Slices, began: float) -> None:
    """Waits until the run is Cancelled and its slice is gone, which must not take longer than is promised."""
    until(lambda: last_names(prefect)[-1] == "Cancelled" and not slices.states(), "the end of the slice", 120)
    seconds = time.monotonic() - began
    print(f"\ncancelled within {seconds:.1f} s")
    assert seconds < MOST_SECONDS


def test_the_training_is_cancelled(prefect: Prefect, slices: Slices, finished: MainJob, job: MainJob, tmp_path: Path) -> None:
    trained(job, 120)
    began = time.monotonic()
    cancel(prefect, prefect.flow_runs("pretrain")[-1])
    within_the_limit(prefect, slices, began)
    assert job.status() == 130, job.output
    assert "run the same command again" in job.output
    assert saved_step(job.root) % 50, "it saved where it was, not only where it would have anyway"
    again = on_pool(prefect, job.root, tmp_path, *LONG)
    again.succeed()
    assert_same_outcome(job.root, finished.root)
    slices.gone()


def test_the_flow_that_asked_for_it_is_cancelled(prefect: Prefect, slices: Slices, tmp_path: Path) -> None:
    """The flow runs below a worker, which ends its process as soon as somebody cancels it in the UI."""
    prefect.start("worker", "start", "--pool", "local")
    model = {"seq_len": 64, "hidden_dim": 32, "intermediate_dim": 64, "num_heads": 2, "num_kv_heads": 1, "num_layers": 2}
    parameters = {
        "name": "job",
        "root": str(tmp_path / "root"),
        "num_train_steps": STEPS,
        "train_batch_size": 4,
        "model": json.dumps(model),
    }
    flags = [word for name, value in parameters.items() for word in ("--param", f"{name}={value}")]
    prefect.run("deployment", "run", "train-llama/tpu", *flags)
    control = prefect.flow_runs()[-1]
    reached(tmp_path / "root", 120)
    began = time.monotonic()
    cancel(prefect, control)
    within_the_limit(prefect, slices, began)
    until(lambda: prefect.flow_runs()[-1]["state"]["type"] == "CANCELLED", "the end of the flow", 60)
    saved = saved_step(tmp_path / "root")
    assert 120 <= saved < STEPS
    last_row = read_json_lines(checkpoint_directory(tmp_path / "root") / "metrics.jsonl")[-1]["step"]
    assert last_row == saved - saved % preset("debug").train.steps_per_log

    prefect.run("deployment", "run", "train-llama/tpu", *flags)
    assert prefect.flow_runs()[-1]["id"] != control["id"]
    until(lambda: prefect.flow_runs()[-1]["state"]["type"] == "COMPLETED", "the end of the second run")
    rows = read_json_lines(checkpoint_directory(tmp_path / "root") / "metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" in row][-1] == STEPS
    assert len({row["step"] for row in rows}) == len(rows)
    slices.gone()
