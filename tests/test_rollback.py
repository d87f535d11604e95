"""Data that breaks the training: the run goes back and over it, as often as it may, and ends as if that data had never been."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from model.batches import BatchLoader
from model.checkpoint_files import steps_in, write_hashes
from model.data_position import DataPosition
from model.job import TrainingJob
from model.jumps import SKIPPED_DATA, Jump, num_rollbacks, read_skipped_data, skip_data
from model.metrics import read_json_lines
from model.trainer import NonFiniteLoss
from model.training_process import train
from tasks.config import EvalHarnessConfig, ExportConfig
from tasks.leases import LeaseLockManager
from tasks.obligations import EVALS, Evaluation, Export, Ledger
from tasks.rollback import roll_back
from tasks.trainer_child import copy_curves, restore_curves
from tests.training_processes import make_mixture, write_job


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
        **changes,
    )
    return TrainingJob.model_validate_json(path.read_text())


def mixture_that_ends(place: Path) -> tuple[Path, int]:
    """A mixture of one epoch, and how many steps of 8 rows it has."""
    ends = make_mixture(place)
    content = json.loads((ends / "mixture.json").read_text())
    for component in content["components"]:
        component["max_epochs"] = 1
    (ends / "mixture.json").write_text(json.dumps(content))
    last = BatchLoader(ends, seq_len=32, global_batch_size=8, seed=0).num_steps
    assert last is not None
    return ends, last


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


@pytest.mark.slow
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
def test_twice_over_as_many_rows_from_one_checkpoint(mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "expected").mkdir()
    skip_data(tmp_path / "expected", 4, 48, "both")
    train(job(tmp_path / "expected", mixture), NoSignals(), 0.0)  # pyright: ignore[reportArgumentType]
    poison(monkeypatch, 50, 74)
    train(job(tmp_path / "run", mixture, max_rollbacks=2), NoSignals(), 0.0)  # pyright: ignore[reportArgumentType]
    assert read_skipped_data(tmp_path / "run") == (Jump(4, 24), Jump(4, 24))
    assert curve(tmp_path / "run") == curve(tmp_path / "expected")


@pytest.mark.slow
def test_it_goes_back_no_more_often_than_it_may(mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, 3, 50)
    with pytest.raises(NonFiniteLoss, match=r"step 6, rows 48 to 55 .*would go on from step 4; .*train\.max_rollbacks"):
        train(job(tmp_path / "run", mixture, max_rollbacks=1), NoSignals(), 0.0)  # pyright: ignore[reportArgumentType]
    assert max(curve(tmp_path / "run")) == 5


def test_a_person_takes_it_back_and_past_the_data_that_spoiled_it(mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "expected").mkdir()
    skip_data(tmp_path / "expected", 4, 16, "rows 32 to 47")
    train(job(tmp_path / "expected", mixture), NoSignals(), 0.0)  # pyright: ignore[reportArgumentType]

    run = tmp_path / "run"
    train(job(run, mixture), NoSignals(), 0.0)  # pyright: ignore[reportArgumentType]
    copy_curves(run, 12)
    ledger = Ledger(run)
    ledger.owe([Export(step=step, export=ExportConfig(), place="here") for step in (4, 8)])
    ledger.owe([Evaluation(step=8, harness=EvalHarnessConfig(tasks=("mine",)), metrics={"lm_eval/mine/acc": 0.5})])
    for step in (4, 8):
        (run / f"hf-step-{step}").mkdir()
    said = roll_back(run, to_step=4, skip_steps=2)
    assert [one.step for one in Ledger(run).all] == [4]
    assert (run / EVALS).read_text() == ""
    assert [path.name.partition("-step-")[0] for path in sorted(run.glob("*hf-step-*"))] == ["hf", "rolled-back-hf"]
    restore_curves(run)  # nothing brings the curve back that was given up
    assert max(row["step"] for row in read_json_lines(run / "metrics.jsonl") if row["step"] <= 4) == 4
    copied = json.loads((run / ".curves.json").read_text())["curves"]["metrics.jsonl"]
    assert max(json.loads(line)["step"] for line in copied.splitlines()) == 4
    assert said == "run goes on from step 4 and over the next 16 rows when it is run again; set aside as checkpoints/rolled-back-*: 12, 8"
    assert steps_in(run / "checkpoints") == [4]
    assert num_rollbacks(run) == 0  # none of those that the run may do itself
    train(job(run, mixture), NoSignals(), 0.0)  # pyright: ignore[reportArgumentType]
    assert curve(run) == curve(tmp_path / "expected")


def test_what_cannot_be_taken_back_is_refused(mixture: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    told = job(run, mixture)
    with pytest.raises(ValueError, match=r"is no training run: give its directory"):
        roll_back(run, to_step=4, skip_steps=2)
    for step in (4, 8):
        (run / "checkpoints" / str(step)).mkdir(parents=True)
        (run / "checkpoints" / str(step) / "state").write_text("weights")
        write_hashes(run / "checkpoints" / str(step))
    with pytest.raises(ValueError, match=r"--to=5 is no checkpoint of run: it has those of the steps 4, 8"):
        roll_back(run, to_step=5, skip_steps=2)
    with pytest.raises(ValueError, match=r"--skip=0: without data left out the same would follow"):
        roll_back(run, to_step=4, skip_steps=0)
    (run / "checkpoints" / "4" / "state").write_text("weightt")
    with pytest.raises(ValueError, match=r"--to=4 cannot be used: .*/4/state has another content .* Choose an earlier one"):
        roll_back(run, to_step=4, skip_steps=2)
    skip_data(run, 8, 24, "bad")
    (run / "checkpoints" / "4" / "state").write_text("weights")
    with pytest.raises(ValueError, match=r"before step 8, where data was left out already"):
        roll_back(run, to_step=4, skip_steps=2)
    leases, key = LeaseLockManager(), f"artifact:{run}@{told.fingerprint}"
    with ThreadPoolExecutor(1) as flow:
        assert flow.submit(leases.acquire_lock, key, "a trainer").result()
        with pytest.raises(ValueError, match=r"is being trained at this moment: stop it first"):
            roll_back(run, to_step=8, skip_steps=2)
        flow.submit(leases.release_lock, key, "a trainer").result()
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "checkpoints").symlink_to(tmp_path, target_is_directory=True)
    linked = tmp_path / "root" / "checkpoints" / "run"
    with ThreadPoolExecutor(1) as flow:  # which names the run as the root and what it writes below it
        assert flow.submit(leases.acquire_lock, f"artifact:{linked}@{told.fingerprint}", "a trainer").result()
        with pytest.raises(ValueError, match=r"is being trained at this moment"):
            roll_back(linked, to_step=8, skip_steps=2)
        flow.submit(leases.release_lock, f"artifact:{linked}@{told.fingerprint}", "a trainer").result()
    (run / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is finished: start another run from one of its checkpoints"):
        roll_back(run, to_step=8, skip_steps=2)
    assert steps_in(run / "checkpoints") == [8, 4]


def test_going_back_past_the_end_of_the_data_is_refused_before_anything_changes(tmp_path: Path) -> None:
    ends, last = mixture_that_ends(tmp_path / "data")
    run = tmp_path / "run"
    path = write_job(run, ends, train_batch_size=8, num_train_steps=last, steps_per_export=4)
    told = TrainingJob.model_validate_json(path.read_text())
    (run / "checkpoints" / "4").mkdir(parents=True)
    (run / "checkpoints" / "4" / "state").write_text("weights")
    (run / "checkpoints" / "8").mkdir()
    write_hashes(run / "checkpoints" / "4")
    with pytest.raises(ValueError, match=r"--skip leaves out 16 rows, and then rows up to \d+ were asked for, but the mixture"):
        roll_back(run, to_step=4, skip_steps=2)
    assert (run / "checkpoints" / "8").is_dir()
    assert read_skipped_data(run) == ()
    assert told.train.num_train_steps == last


def test_skipped_steps_are_counted_in_rows_of_their_own_sizes(mixture: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_job(run, mixture, train_batch_size=[{"start": 0, "value": 4}, {"start": 5, "value": 8}], num_train_steps=20)
    (run / "checkpoints" / "4").mkdir(parents=True)
    (run / "checkpoints" / "4" / "state").write_text("weights")
    write_hashes(run / "checkpoints" / "4")
    roll_back(run, to_step=4, skip_steps=3)
    assert read_skipped_data(run) == (Jump(4, 4 + 8 + 8),)


def test_a_file_of_skipped_data_that_was_edited_is_refused(mixture: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(job(run, mixture), NoSignals(), 0.0)  # pyright: ignore[reportArgumentType]
    skip_data(run, 4, 8, "by hand")  # of steps that were trained already
    with pytest.raises(ValueError, match=r"skipped-data\.json"):
        train(job(run, mixture), NoSignals(), 0.0)  # pyright: ignore[reportArgumentType]


def test_it_does_not_go_back_past_the_end_of_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends, last = mixture_that_ends(tmp_path / "data")
    path = write_job(tmp_path / "run", ends, train_batch_size=8, num_train_steps=last, steps_per_export=1000, max_rollbacks=3)
    poison(monkeypatch, 20)
    with pytest.raises(NonFiniteLoss, match="step 3"):
        train(TrainingJob.model_validate_json(path.read_text()), NoSignals(), 0.0)  # pyright: ignore[reportArgumentType]
    assert read_skipped_data(tmp_path / "run") == ()


def test_arrays_of_another_version_are_told(mixture: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(job(run, mixture, optimizer="lion"), NoSignals(), 0.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"checkpoints/12 has other arrays than this run, \d+ of them, such as opt_state/\S+ \(there"):
        train(job(run, mixture), NoSignals(), 0.0)  # pyright: ignore[reportArgumentType]
