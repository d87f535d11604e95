"""Sweeps as a person starts them: killed again and again they end as if nothing had happened, and a bad arm ends no other."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.main_job import CHECKOUT, MainJob

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
PATIENCE_SECONDS = 900.0  # six arms on a machine that others use too
GRID = ("--grid", "train.learning_rate=1e-3,3e-3,1e-2", "--grid", "train.weight_decay=0.1,0.01")
SHORT = ("--train.num-train-steps", "12", "--train.steps-per-export", "2")


def start(root: Path, home: Path, *arguments: str) -> MainJob:
    return MainJob(root, home, *SHORT, *arguments, script=CHECKOUT / "flows" / "sweep.py")


def table(root: Path) -> dict[str, Any]:
    """The one table below `root`, without the places, which differ with it."""
    (path,) = (root / "sweeps").glob("job-*/sweep.json")
    value = json.loads(path.read_text())
    for entry in (value, *value["rows"]):
        entry["place"] = Path(entry["place"]).relative_to(root).as_posix()
    return value


def states(root: Path) -> list[str]:
    return [row["state"] for row in table(root)["rows"]] if list((root / "sweeps").glob("job-*/sweep.json")) else []


def succeeded(job: MainJob) -> str:
    """Waits for a good end; all it said."""
    assert job.status(PATIENCE_SECONDS) == 0, job.output
    return job.output


def ended(output: str) -> str:
    """The table in the terminal at the end, and the line that names the best arm."""
    return output[output.rindex("\narm ") :].split("  best ")[0]


def test_killed_twice_it_ends_with_the_same_table(tmp_path: Path) -> None:
    home = tmp_path / "prefect"
    undisturbed = tmp_path / "undisturbed"
    shown = succeeded(start(undisturbed, home, *GRID))
    assert "6 of 6 arms finished" in shown
    assert states(undisturbed) == ["finished"] * 6

    root = tmp_path / "killed"
    for finished, tree in ((1, True), (3, False)):  # in the middle of an arm while others have finished and others wait
        job = start(root, home, *GRID)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while states(root).count("finished") < finished:
            assert job.process.poll() is None, job.output
            assert time.monotonic() < deadline, job.output
            time.sleep(0.05)
        job.kill(tree=tree)
        assert states(root).count("finished") < 6
    again = succeeded(start(root, home, *GRID))
    assert table(root) == table(undisturbed)
    assert ended(again) == ended(shown)
    kept = "Finished in state Cached"
    assert sum(kept in line and "checkpoints job" in line for line in again.splitlines()) >= 3  # what had finished is reused


def test_an_arm_that_breaks_ends_no_other(tmp_path: Path) -> None:
    job = start(tmp_path / "root", tmp_path / "prefect", "--grid", "train.learning_rate=1e30,1e-3", "--max-concurrent", "1")
    assert job.status(PATIENCE_SECONDS) == 1, job.output
    assert "Traceback" not in job.output
    rows = table(tmp_path / "root")["rows"]
    assert [row["state"] for row in rows] == ["failed", "finished"]
    assert "not finite" in rows[0]["why"]
    assert "best job-learning_rate-0.001" in job.output


def test_interrupted_it_saves_every_arm(tmp_path: Path) -> None:
    job = start(tmp_path / "root", tmp_path / "prefect", "--grid", "train.learning_rate=1e-3,3e-3", "--train.num-train-steps", "4000")
    job.until("learning_rate-0.001' - step ")
    job.until("checkpoints job' - step ")
    below = job.children()
    job.interrupt()
    assert job.status() == 130, job.output
    assert "Traceback" not in job.output
    assert "run the same command again to continue" in job.output
    assert below
    for directory in sorted((tmp_path / "root" / "checkpoints").glob("job*")):
        assert list((directory / "checkpoints").glob("[0-9]*")), job.output
