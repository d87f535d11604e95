"""Several processes that `jax.distributed` joins are one run: the same tokens, the same losses, one checkpoint for any number."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.child import HUNG
from tests.training_processes import STEPS, finish, losses, make_mixture, read_until, start, start_together, write_job

EVERY_STEP = {"steps_per_export": STEPS, "minutes_per_checkpoint": None}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mixture(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def alone(mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("alone")
    status, _, err = finish(start(write_job(directory, mixture, **EVERY_STEP)))
    assert status == 0, err
    return directory


def assert_same_curve(directory: Path, expected: Path) -> None:
    """Float32 rounding apart: sums over devices are in another order."""
    ours, theirs = losses(directory), losses(expected)
    assert ours.keys() == theirs.keys()
    for step, values in theirs.items():
        for value, other in zip(values, ours[step], strict=True):
            assert (value is None) == (other is None)
            if value is not None:
                np.testing.assert_allclose(other, value, rtol=2e-5, err_msg=f"step {step}")


def test_stopped_as_two_and_continued_as_one_is_the_same_run(mixture: Path, alone: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "run", mixture, **EVERY_STEP)
    leader, follower = start_together(job, 2)
    read_until(leader, 5)
    follower.send_signal(signal.SIGTERM)  # not the one that speaks for the run
    ended = [finish(process) for process in (leader, follower)]
    assert [status for status, _, _ in ended] == [75, 75], ended[0][2]
    steps = {events[-1]["step"] for _, events, _ in ended}
    assert len(steps) == 1
    stopped = steps.pop()
    assert 5 <= stopped < STEPS
    status, events, err = finish(start(job))
    assert status == 0, err
    began = next(event for event in events if event["event"] == "start")
    assert (began["start_step"], began["processes"]) == (stopped, 1)
    assert_same_curve(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("mesh", [{}, {"data_parallel_size": 2}, {"context_parallel_size": 2}])
def test_any_number_of_processes_and_any_mesh_over_them(
    mixture: Path, alone: Path, tmp_path: Path, count: int, mesh: dict[str, Any]
) -> None:
    processes = start_together(write_job(tmp_path / "run", mixture, **EVERY_STEP, **mesh), count)
    ended = [finish(process) for process in processes]
    assert [status for status, _, _ in ended] == [0] * count, ended[0][2]
    assert_same_curve(tmp_path / "run", alone)


@pytest.mark.slow
def test_when_one_dies_all_end_and_the_run_goes_on_from_its_checkpoint(mixture: Path, alone: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "run", mixture, steps_per_export=4, minutes_per_checkpoint=None)
    leader, follower = start_together(job, 2)
    read_until(leader, 9)
    follower.kill()
    assert finish(leader)[0] not in (0, 75)
    ended = [finish(process) for process in start_together(job, 2)]
    assert [status for status, _, _ in ended] == [0, 0], ended[0][2]
    assert next(event for event in ended[0][1] if event["event"] == "start")["start_step"] >= 4
    assert_same_curve(tmp_path / "run", alone)


@pytest.mark.slow
def test_when_one_hangs_the_others_end_with_their_stacks_and_the_run_goes_on(mixture: Path, alone: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "run", mixture, steps_per_export=4, minutes_per_checkpoint=None, watchdog_minutes=0.2)
    leader, follower = start_together(job, 2)
    read_until(leader, 9)
    follower.send_signal(signal.SIGSTOP)  # it is there, and takes part in nothing
    status, events, _ = finish(leader)
    follower.kill()
    assert status == HUNG
    last = events[-1]
    assert (last["event"], last["type"], last["seconds"]) == ("error", "Hung", pytest.approx(12.0))
    assert last["step"] >= 9
    assert "Run the same command again to go on from the last checkpoint" in last["message"]
    assert "trainer.py" in Path(last["stacks"]).read_text()  # where the loop waits
    status, _, err = finish(start(write_job(tmp_path / "run", mixture, steps_per_export=4, minutes_per_checkpoint=None)))
    assert status == 0, err
    assert_same_curve(tmp_path / "run", alone)


def test_half_a_set_of_variables_is_refused(mixture: Path, tmp_path: Path) -> None:
    status, events, _ = finish(start(write_job(tmp_path / "run", mixture), JAX_NUM_PROCESSES="2"))
    assert status == 1
    assert json.dumps(events[-1]["message"]).startswith("\"JAX_COORDINATOR_ADDRESS='', JAX_NUM_PROCESSES='2', JAX_PROCESS_ID=''")
