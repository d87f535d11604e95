"""Numbers that are found beside a training reach the run's trackers after it, with what they lack of the training itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from model import track_rows, trackers
from model.config import LlamaConfig
from model.job import TrainingJob
from model.metrics import MetricsLog
from model.track_rows import RowsJob
from model.train_config import SimpleTrainConfig
from tests.tracker_files import tensorboard_points

pytest.importorskip("tensorboardX", reason="in the extra [track]")


def late_rows(directory: Path, track: tuple[trackers.TrackerName, ...]) -> RowsJob:
    """Evaluations of two steps of a run of four."""
    train = SimpleTrainConfig(train_batch_size=8, num_train_steps=4, learning_rate=1e-3)
    place: dict[str, Any] = {"directory": directory, "mixture": directory}
    job = TrainingJob(name="run", fingerprint="f" * 64, **place, model=LlamaConfig(), train=train, track=track)
    return RowsJob(training=job, rows=({"step": 2, "lm_eval/mine/acc": 0.5}, {"step": 4, "lm_eval/mine/acc": 0.75}))


def test_rows_found_beside_a_run_come_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[str]()
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(track_rows, "tell", said.append)
    late = late_rows(tmp_path, ("tensorboard", "wandb"))
    assert track_rows.send(late) == ["tensorboard"], "W&B's files are elsewhere, and there is no account"
    assert [message.partition(":")[0] for message in said] == ["wandb"]


def test_rows_of_the_training_that_a_tracker_lacks_go_before_them(tmp_path: Path) -> None:
    said = list[str]()
    opened = trackers.open_trackers(("tensorboard",), tmp_path, run_id="f" * 16, name="run", tags=(), config={}, tell=said.append)
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, opened)
    for step in range(1, 4):
        log.log(step, {"train/loss": 1.0})
    assert log.close() is True
    with (tmp_path / "metrics.jsonl").open("a") as rows:
        rows.write('{"step": 4, "train/loss": 1.0}\n')
    late = late_rows(tmp_path, ("tensorboard",))
    assert track_rows.send(late) == ["tensorboard"]
    points = tensorboard_points(tmp_path / "tensorboard")
    assert [step for step, _ in points["train/loss"]] == [1, 2, 3, 4]
    assert points["lm_eval/mine/acc"] == [(2, 0.5), (4, 0.75)]
    assert said == []
