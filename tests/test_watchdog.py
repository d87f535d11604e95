"""A hang ends the process with every thread's stack and one message; a stopped process is not a hang."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from model import child
from model.train_config import SimpleTrainConfig
from model.watchdog import LONGER, Deadline, Watchdog
from tasks.children import ChildFailed, run_child


@pytest.mark.parametrize(("what", "named", "limit"), [("step", "step 8", 0.5), ("evaluation", "the evaluation after step 7", 0.5 * LONGER)])
def test_a_hang_is_a_failure_that_says_where(tmp_path: Path, what: str, named: str, limit: float) -> None:
    events: list[dict[str, Any]] = []
    with pytest.raises(ChildFailed) as failed:
        run_child("tests.watched_run", [str(tmp_path), "0.5", what], events.append, stopped_status=child.STOPPED)
    stacks = tmp_path / "stacks-7.txt"
    assert str(failed.value) == events[-1]["message"]
    assert str(failed.value).startswith(f"{named} did not end within {limit:g} s, so the process ended itself.")
    assert f"{stacks}. Run the same command again" in str(failed.value)
    assert {key: events[-1][key] for key in ("event", "type", "step", "seconds", "stacks")} == {
        "event": "error",
        "type": "Hung",
        "step": 7,
        "seconds": limit,
        "stacks": str(stacks),
    }
    assert "in hang_here" in stacks.read_text()


def test_stacks_go_to_standard_error_where_the_directory_is_gone(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    with pytest.raises(ChildFailed, match="step 8 did not end within"):
        run_child("tests.watched_run", [str(tmp_path / "gone"), "0.5", "step"], events.append)


def test_a_status_of_its_own_without_the_event_is_named_too(tmp_path: Path) -> None:
    with pytest.raises(ChildFailed, match=r"watched_run hung and ended itself; what its threads were doing: Thread 1 in hang_here"):
        run_child("tests.watched_run", [str(tmp_path), "1", "mute"], lambda _: None)


def test_a_process_that_was_stopped_for_longer_than_the_limit_goes_on(tmp_path: Path) -> None:
    run_child("tests.watched_run", [str(tmp_path), "3", "stop"], lambda _: None)
    assert not list(tmp_path.iterdir())


def test_a_gap_between_two_looks_counts_as_two_intervals_at_most() -> None:
    deadline = Deadline(5.0, now=0.0)
    deadline.restart("step 1", 25.0)
    assert [deadline.passed(now) for now in (5.0, 10.0)] == [False, False]
    assert not deadline.passed(10_000.0)  # asleep for hours: 10 s
    assert deadline.awake == 20.0
    assert [deadline.passed(now) for now in (10_005.0, 10_006.0)] == [False, True]
    deadline.restart("step 2", 25.0)
    assert not deadline.passed(10_010.0)


def test_the_first_step_of_a_process_has_longer(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, minutes=15)
    limits = [watchdog._deadline.limit]
    with watchdog.longer("the evaluation"):
        limits.append(watchdog._deadline.limit)
    limits.append(watchdog._deadline.limit)
    watchdog.beat(3)
    limits.append(watchdog._deadline.limit)
    watchdog.close()
    assert limits == [3600, 3600, 3600, 900]
    assert watchdog._deadline.what == "step 4"


def test_none_watches_nothing_and_is_no_part_of_the_identity(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, minutes=None)
    watchdog.beat(1)
    watchdog.close()
    assert not watchdog._thread.is_alive()
    train = SimpleTrainConfig(train_batch_size=1, num_train_steps=1, learning_rate=1.0)
    assert train.identity().keys().isdisjoint({"watchdog_minutes", "profiler", "profiler_start_step", "profiler_num_steps"})
    with pytest.raises(ValueError, match="watchdog_minutes"):
        SimpleTrainConfig(train_batch_size=1, num_train_steps=1, learning_rate=1.0, watchdog_minutes=0)
