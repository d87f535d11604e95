"""What a child process names as its error reaches its parent as what it is: a full disk as one, a mistake as one."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from model.job import TrainingJob
from tasks.children import ChildFailed, ChildStopped, run_child
from tests.training_processes import write_job

MODULE = """
import sys
from model.child import emit_error
emit_error({error})
sys.exit(1)
"""


def child_that_says(error: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a child that ends with `error`, an expression."""
    (place / "naming_child.py").write_text(MODULE.format(error=error), encoding="utf-8")
    monkeypatch.syspath_prepend(str(place))
    run_child("naming_child", [], lambda _: None)


@pytest.mark.parametrize(
    ("error", "number", "words"),
    [
        ("OSError(28, 'No space left on device')", errno.ENOSPC, "No space left on device"),
        ("OSError(28, 'No space left on device', '/a/b')", errno.ENOSPC, "No space left on device: /a/b"),
        ("OSError(30, 'Read-only file system', '/a/b')", errno.EROFS, "Read-only file system: /a/b"),
        # what TensorStore raises
        (
            "ValueError('RESOURCE_EXHAUSTED: Failed to write [OS error 28: ENOSPC No space left on device]')",
            errno.ENOSPC,
            "RESOURCE_EXHAUSTED",
        ),
    ],
)
def test_a_disk_that_is_full_or_closed_is_an_error_of_the_system(
    error: str, number: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OSError, match=words) as raised:
        child_that_says(error, tmp_path, monkeypatch)
    assert raised.value.errno == number
    assert not str(raised.value.strerror).startswith("[Errno")


@pytest.mark.parametrize(
    "error", ["ValueError('train.x=1: choose 2')", "FileNotFoundError(2, 'No such file', 'x')", "OSError('checkpoint 5 is gone')"]
)
def test_any_other_error_is_named_by_the_child(error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ChildFailed) as raised:
        child_that_says(error, tmp_path, monkeypatch)
    assert raised.value.named
    assert str(raised.value) in ("train.x=1: choose 2", "No such file: x", "checkpoint 5 is gone")


def test_an_error_that_nobody_foresaw_is_told_and_is_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ChildFailed, match="connection reset") as raised:
        child_that_says("RuntimeError('connection reset'), foreseen=False", tmp_path, monkeypatch)
    assert not raised.value.named


@pytest.mark.parametrize(
    ("saved", "steps", "words"),
    [
        (True, [5], "was stopped and saved at step 7 of 30: run the same"),
        (False, [4, 6], "was stopped before it could save; its newest checkpoint is of step 6: run the same"),
        (False, [], "was stopped before it could save a first checkpoint: run the same"),
    ],
)
def test_what_a_stop_left_is_said_as_it_is(
    saved: bool, steps: list[int], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks import trainer_child

    job = TrainingJob.model_validate_json(write_job(tmp_path, tmp_path, num_train_steps=30).read_text())
    for step in steps:
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)

    def stopped(module: str, arguments: list[str], on_event: Any, **_: Any) -> None:
        on_event({"event": "progress", "step": 7, "loss": 1.0, "tokens_per_second": 1.0, "seconds_left": 1.0})
        raise ChildStopped("", saved=saved)

    monkeypatch.setattr(trainer_child, "run_child", stopped)
    monkeypatch.setattr(trainer_child, "TrainingReport", Report)
    with pytest.raises(ChildStopped, match=words):
        trainer_child.run_trainer(job)


class Report:
    """Knows the last step alone."""

    def __init__(self, job: TrainingJob) -> None:
        self.step = 0

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing was shown."""

    def on_event(self, event: dict[str, Any]) -> None:
        self.step = event["step"]
