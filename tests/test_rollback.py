"""Data that breaks the training: the run goes back and over it, as often as it may, and ends as if that data had never been."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from model.beginning import SKIPPED_DATA, skip_data
from model.data_position import DataPosition
from model.job import TrainingJob
from model.metrics import read_json_lines
from model.trainer import NonFiniteLoss
from model.training_process import train
from tests.training_processes import QUICK, make_mixture, write_job


class NoSignals:
    def go_to(self, trainer: Any) -> None:
        """Nothing came."""


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mixture(tmp_path_factory.mktemp("data"))


def job(directory: Path, mixture: Path, **changes: Any) -> TrainingJob:
    path = write_job(
        directory,
        mixture,
        train_batch_size=8,
        num_train_steps=12,
        steps_per_export=4,
        steps_per_eval=100,
        compiler_options=QUICK,
        **changes,
    )
    return TrainingJob.model_validate_json(path.read_text())


def poison(monkeypatch: pytest.MonkeyPatch, *rows: int) -> None:
    """Batches that hold one of these rows of the order have no finite loss."""
    batch_of = DataPosition.batch

    def batch(self: DataPosition, step: int) -> dict[str, jax.Array]:
        batch, first = batch_of(self, step), self.first_row(step)
        poisoned = any(first <= row < first + self.loader.batch_sizes.size_at(step) for row in rows)
        return {**batch, "loss_weights": batch["loss_weights"] * np.float32("nan")} if poisoned else batch

    monkeypatch.setattr(DataPosition, "batch", batch)


def curve(directory: Path) -> dict[int, float]:
    return {row["step"]: row["train/loss"] for row in read_json_lines(directory / "metrics.jsonl")}


def test_it_goes_back_to_the_checkpoint_and_over_the_data_since(mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "expected").mkdir()
    skip_data(tmp_path / "expected", 4, 24, "rows 32 to 55")
    assert train(job(tmp_path / "expected", mixture), NoSignals(), 0.0).step == 12  # pyright: ignore[reportArgumentType]
    poison(monkeypatch, 50)
    assert train(job(tmp_path / "run", mixture, max_rollbacks=1), NoSignals(), 0.0).step == 12  # pyright: ignore[reportArgumentType]
    skipped = json.loads((tmp_path / "run" / SKIPPED_DATA).read_text())["skipped"]
    assert [(one["step"], one["rows"]) for one in skipped] == [(4, 24)]
    assert skipped[0]["why"].startswith("step 7, rows 48 to 55 (a ")
    assert curve(tmp_path / "run") == curve(tmp_path / "expected")


def test_before_its_first_checkpoint_it_goes_back_to_where_it_began(mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(job(tmp_path / "before", mixture, max_rollbacks=0), NoSignals(), 0.0)  # pyright: ignore[reportArgumentType]
    poison(monkeypatch, 83)
    begins = {"initialize_from_checkpoint_path": str(tmp_path / "before" / "checkpoints" / "8"), "reset_data_loader_on_init": False}
    here = job(tmp_path / "run", mixture, max_rollbacks=1, **begins).model_copy(update={"fingerprint": "c" * 64})
    later = here.model_copy(update={"train": here.train.model_copy(update={"steps_per_export": 100})})
    assert train(later, NoSignals(), 0.0).step == 12  # pyright: ignore[reportArgumentType]
    skipped = json.loads((tmp_path / "run" / SKIPPED_DATA).read_text())["skipped"]
    assert [(one["step"], one["rows"]) for one in skipped] == [(8, 24)]


@pytest.mark.slow
def test_it_goes_back_no_more_often_than_it_may(mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, 3, 50)
    with pytest.raises(NonFiniteLoss, match=r"step 6, rows 48 to 55 .*would go on from step 4; .*train\.max_rollbacks"):
        train(job(tmp_path / "run", mixture, max_rollbacks=1), NoSignals(), 0.0)  # pyright: ignore[reportArgumentType]
    assert max(curve(tmp_path / "run")) == 5
