"""Hosts that stop without a word, more hosts, more slices: the numbers of the run do not change."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from model.metrics import read_json_lines
from tests.main_job import MainJob, assert_same_outcome, checkpoint_directory
from tests.prefect_server import Prefect
from tests.tpu_pool import LONG, Slices, job_variables, last_names, node_of, states_of, trained

pytest_plugins = ["tests.tpu_pool_fixtures"]
pytestmark = pytest.mark.slow

SHORT = (
    "--train.num-train-steps",
    "60",
    "--train.steps-per-export",
    "30",
    "--train.steps-per-eval",
    "60",
    "--train.steps-per-sample",
    "60",
)


def trainer_of(host: str) -> int:
    """Process id of the trainer on a follower: its job lies on the host's own disk."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_text().split("\0")
            except OSError:
                continue  # it ended since it was listed
            if "model.training_process" in words and any(f"/{host}-" in word for word in words):
                return int(entry.name)
    raise AssertionError(f"no trainer on {host}")


def test_a_follower_that_stands_still(prefect: Prefect, slices: Slices, finished: MainJob, start: Callable[..., MainJob]) -> None:
    """Its process lives, so nobody is told; the leader's step does not return. A step may take 12 s, the first one 48."""
    job = start(*LONG, "--train.watchdog-minutes", "0.2")
    trained(job, 120)
    os.kill(trainer_of(f"{slices.one().rpartition('/')[2]}-w1"), signal.SIGSTOP)
    job.succeed()
    run = prefect.flow_runs("pretrain")[-1]
    (failed,) = [state["message"] for state in states_of(prefect, run) if state["name"] == "HostFailed"]
    assert re.match(r"the run crashed: step \d+ did not end within 12 s", failed)
    assert last_names(prefect)[-1] == "Completed"
    assert slices.attempts(run) == [1, 2]
    assert [*checkpoint_directory(job.root).glob("stacks-*.txt")], "what its threads were doing is kept"
    assert_same_outcome(job.root, finished.root)
    slices.gone()


def test_one_of_two_slices_is_lost(prefect: Prefect, slices: Slices, finished: MainJob, start: Callable[..., MainJob]) -> None:
    """The queued resource stays ACTIVE; all of it is given back and asked for again. Two slices of a host are two hosts."""
    with job_variables(prefect, accelerator_type="v4-8", num_slices=2):
        job = start(*LONG)
        trained(job, 120)
        name = slices.one()
        slices.order("preempt", name=name, node=node_of(name, 1), grace=0)
        job.succeed()
    names = last_names(prefect)
    assert names.count("Preempted") == 1, names
    assert "HostFailed" not in names
    assert slices.attempts(prefect.flow_runs("pretrain")[-1]) == [1, 2]
    assert_same_outcome(job.root, finished.root)
    slices.gone()


def test_four_hosts_find_what_two_do(prefect: Prefect, slices: Slices, root: Path, start: Callable[..., MainJob]) -> None:
    """Four devices on two hosts, and on four."""
    losses: list[list[float]] = []
    for number, variables in enumerate(({"accelerator_type": "v4-16", "devices_per_host": 2}, {"accelerator_type": "v4-32"})):
        with job_variables(prefect, **variables):
            job = start(*SHORT, "--name", f"job-{number}")
            job.succeed()
        (directory,) = (root / "checkpoints").glob(f"job-{number}-*")
        losses.append([row["train/loss"] for row in read_json_lines(directory / "metrics.jsonl") if "train/loss" in row])
        slices.gone()
    leader = max(slices.directory.glob("pl-*-w0.log"), key=lambda path: path.stat().st_mtime)
    hosts = sorted(path.name for path in slices.directory.glob(leader.name.replace("-w0", "-w*")))
    assert len(hosts) == 4, hosts
    assert '"processes": 4' in leader.with_name(hosts[1]).read_text()
    assert len(losses[0]) == 60
    assert losses[0] == losses[1]
