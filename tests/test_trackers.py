"""Real trackers, offline: the same keys arrive, and a tracker that breaks stops nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from model import trackers
from model.metrics import MetricsLog, read_json_lines


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


def open_all(names: tuple[trackers.TrackerName, ...], directory: Path) -> list[trackers.Tracker]:
    return trackers.open_trackers(names, directory, run_id="0123456789abcdef", name="run", tags=("a",), config={"x": 1})


def test_wandb_offline_without_an_account(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, open_all(("wandb",), tmp_path))
    for step in range(1, 4):
        log.log(step, {"train/loss": 1.0 / step})
    log.close()
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 1
    assert b"train/loss" in files[0].read_bytes()
    assert [row["step"] for row in read_json_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="in the extra [track]")
    (tracker,) = open_all(("tensorboard",), tmp_path)
    tracker.log(1, {"train/loss": 2.0, "text": "is no number"})
    tracker.close()
    (events,) = (tmp_path / "tensorboard").glob("events*")
    assert b"train/loss" in events.read_bytes()


class Broken:
    def __init__(self) -> None:
        self.calls = 0

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        self.calls += 1
        raise ConnectionError("the service is away")

    def close(self) -> None:
        raise ConnectionError("the service is away")


def test_a_broken_tracker_is_a_warning_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = Broken()
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, [trackers._Careful("broken", trackers._logger.warning, broken)])
    for step in (1, 2, 3):
        log.log(step, {"train/loss": 1.0})
    log.close()
    assert broken.calls == 1
    assert [record.getMessage() for record in caplog.records] == [
        "broken stopped working (the service is away): metrics go on to metrics.jsonl"
    ]
    assert len(read_json_lines(tmp_path / "metrics.jsonl")) == 3


def test_one_that_does_not_start_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(trackers, "_Wandb", fail)
    assert open_all(("wandb",), tmp_path) == []
    assert "wandb did not start (no)" in caplog.text


def test_a_missing_package_is_refused_before_work_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers.PACKAGES, "trackio", "no_such_package")
    with pytest.raises(ValueError, match=r"track='trackio' needs the package 'no_such_package'.*prefect-llama\[track\]"):
        trackers.check_trackers(("trackio",))
