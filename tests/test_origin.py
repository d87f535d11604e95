"""A run that goes on from a checkpoint counts its own steps, and knows what its weights have seen before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model.batch_schedule import BatchSchedule
from model.origin import ANEW, Origin, after, origin_of
from model.train_config import SimpleTrainConfig


def train(**changes: Any) -> SimpleTrainConfig:
    return SimpleTrainConfig(**{"train_batch_size": 4, "num_train_steps": 20, "learning_rate": 1e-3, **changes})


def checkpoint(directory: Path, **changes: Any) -> str:
    """The record that lies beside the arrays of step 12, of batches of 8 sequences of 64."""
    data = {"global_batch_size": [{"start": 0, "value": 8}, {"start": 10, "value": 2}], "seq_len": 64, "next_row": 84}
    (directory / "progress").mkdir(parents=True)
    (directory / "progress" / "metadata").write_text(json.dumps({"step": 12, "data": data, **changes}))
    return str(directory)


def test_where_a_run_goes_on_is_in_the_checkpoints_record(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "kept", tokens=99_000)
    assert origin_of(train(initialize_from_checkpoint_path=path)) == Origin(12, 0, 99_000)
    assert origin_of(train(initialize_from_checkpoint_path=path, reset_data_loader_on_init=False)) == Origin(12, 84, 99_000)
    older = checkpoint(tmp_path / "12")
    assert origin_of(train(initialize_from_checkpoint_path=older)) == Origin(12, 0, (10 * 8 + 2 * 2) * 64)
    assert origin_of(train(initialize_from_checkpoint_path=path, initialize_weights_only=True)) == ANEW
    assert origin_of(train()) == ANEW
    assert origin_of(train(initialize_from_checkpoint_path=str(tmp_path / "7"))) == Origin(7)


def test_its_own_steps_are_those_since() -> None:
    stages = ({"start": 0, "value": 4}, {"start": 8, "value": 6}, {"start": 15, "value": 2})
    own = Origin(12).own(train(train_batch_size=stages, warmup=0.9))
    assert (own.num_train_steps, own.num_train_rows) == (8, 3 * 6 + 5 * 2)
    assert own.batch_schedule.as_json == [{"start": 0, "value": 6}, {"start": 3, "value": 2}]
    assert Origin(12).rows_until(BatchSchedule.of(4), 20) == 32
    assert ANEW.own(train()) == train()


def test_a_base_that_is_not_trained_yet_is_counted_by_its_configuration() -> None:
    going_on = train(initialize_from_checkpoint_path="base/checkpoints/20")
    assert after(train(), going_on, 64) == Origin(20, 0, 20 * 4 * 64)
    assert after(train(), going_on.model_copy(update={"reset_data_loader_on_init": False}), 64).row == 80


@pytest.mark.parametrize("row", [0, 12])
def test_batches_are_planned_from_there(row: int, tmp_path: Path) -> None:
    from tests.test_batches import loader, write_mixture

    batches = loader(write_mixture(tmp_path, {"plays": 0.25, "sonnets": 0.75}))
    planned = batches.planned(30, Origin(10, row))
    first, last = batches.order.planned_rows(row), batches.order.planned_rows(row + 20 * 8)
    assert {name: part["rows"] for name, part in planned.items()} == {name: last[name] - first[name] for name in last}
    assert sum(part["tokens"] for part in planned.values()) == 20 * 8 * 32
