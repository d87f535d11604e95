"""A batch size that changes with the step: arithmetic, data, devices, plans, and a run that is stopped at the border of two stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from pydantic import ValidationError

from model.batch_arithmetic import BatchArithmetic
from model.batch_schedule import BatchSchedule, BatchSizeStep
from model.batch_size_flag import parse_batch_size
from model.batches import BatchLoader
from model.job import TrainingJob
from model.metrics import read_json_lines
from model.preflight.search import Search
from model.preflight.settings import Fixed, Setting, divisors, replace_train, settings_of
from model.presets import JOBS
from model.requests import Request
from model.slices import slice_named
from model.train_config import SimpleTrainConfig
from model.trainer import Trainer
from tests.synthetic_stores import write_mixture
from tests.training_processes import make_mixture, write_job


def stages(*pairs: tuple[int, int]) -> tuple[BatchSizeStep, ...]:
    return tuple(BatchSizeStep(start=start, value=value) for start, value in pairs)


RAMP = stages((0, 4), (3, 8), (5, 2))
SIZES = [4, 4, 4, 8, 8, 2, 2, 2]  # by hand
ROWS_BEFORE = [0, 4, 8, 12, 20, 28, 30, 32, 34]


def train_config(**changes: Any) -> SimpleTrainConfig:
    return SimpleTrainConfig(**{"train_batch_size": RAMP, "num_train_steps": 8, "learning_rate": 1e-2, **changes})


def test_sizes_and_sums_are_those_of_the_table() -> None:
    schedule = BatchSchedule.of(RAMP)
    assert [schedule.size_at(step) for step in range(8)] == SIZES
    assert [schedule.rows_before(step) for step in range(9)] == ROWS_BEFORE
    assert schedule.rows_before(10**15) == 28 + (10**15 - 5) * 2
    for rows in range(35):
        assert schedule.steps_within(rows) == max(step for step in range(9) if ROWS_BEFORE[step] <= rows)
    assert schedule.largest == 8
    assert str(schedule) == "4, from step 3 on 8, from step 5 on 2"
    assert schedule.sizes_from(0, 8) == (4, 8, 2)
    assert schedule.sizes_from(3, 8) == schedule.sizes_from(4, 6) == (8, 2)
    assert schedule.sizes_from(4, 5) == (8,)
    assert schedule.sizes_from(8, 8) == ()
    with pytest.raises(ValueError, match="step=-1"):
        schedule.rows_before(-1)
    plain = BatchSchedule.of(32)
    assert (plain.size_at(7), plain.rows_before(7), plain.steps_within(95), str(plain), plain.as_json) == (32, 224, 2, "32", 32)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (0, "train.train_batch_size=0: a batch has at least one sequence"),
        ((), "the first one starts at step 0"),
        (stages((1, 4)), r"start at steps \[1\]: the first one starts at step 0"),
        (stages((0, 4), (0, 8)), r"start at steps \[0, 0\]: give them in order"),
        (stages((0, 4), (5, 8), (3, 2)), r"start at steps \[0, 5, 3\]: give them in order"),
        (stages((0, 4), (8, 8)), r"a stage that starts at step 8, and train.num_train_steps=8 ends before it"),
    ],
)
def test_what_is_no_schedule_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        train_config(train_batch_size=given)


def test_a_number_is_identified_as_before_and_stages_come_back_from_json() -> None:
    assert train_config(train_batch_size=4).identity()["train_batch_size"] == 4
    assert train_config().identity()["train_batch_size"] == [{"start": 0, "value": 4}, {"start": 3, "value": 8}, {"start": 5, "value": 2}]
    assert SimpleTrainConfig.model_validate_json(train_config().model_dump_json()) == train_config()
    assert (train_config().num_train_rows, train_config(train_batch_size=4).num_train_rows) == (34, 32)


def test_flags() -> None:
    assert parse_batch_size(["64"]) == 64
    assert parse_batch_size(["0:4", "3:8", "5:2"]) == RAMP
    for wrong in ([], ["x"], ["4", "8"], ["0:4:1"], ["0:0"]):
        with pytest.raises(ValueError, match="give a number, or STEP:SIZE for each stage"):
            parse_batch_size(wrong)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_batches_follow_each_other_on_any_number_of_processes(processes: int, tmp_path: Path) -> None:
    mixture = write_mixture(tmp_path, {"plays": 0.9, "sonnets": 0.1})
    sizes = stages((0, 4), (3, 16), (5, 8))
    row = BatchLoader(mixture, seq_len=32, global_batch_size=1, seed=3)
    parts = [
        BatchLoader(mixture, seq_len=32, global_batch_size=sizes, seed=3, process_index=index, process_count=processes)
        for index in range(processes)
    ]
    first = 0
    for step, size in enumerate([4, 4, 4, 16, 16, 8, 8]):
        found = [part.batch(step) for part in parts]
        for key, expected in row.rows(first, first + size).items():
            np.testing.assert_array_equal(np.concatenate([part[key] for part in found]), expected)
        first += size
    assert parts[0].planned(7)["plays"]["rows"] == row.planned(first)["plays"]["rows"]
    assert parts[0].state(7)["global_batch_size"] == [stage.model_dump() for stage in sizes]


def test_rates_by_step_change_at_the_step_and_the_data_ends_after_whole_batches(tmp_path: Path) -> None:
    rates = write_mixture(tmp_path / "rates", {"a": 1.0, "b": 0.0}, later={4: {"b": 1.0}})
    loader = BatchLoader(rates, seq_len=32, global_batch_size=RAMP, seed=3)
    assert {name: part["rows"] for name, part in loader.planned(4).items()} == {"a": 20, "b": 0}
    assert {name: part["rows"] for name, part in loader.planned(8).items()} == {"a": 20, "b": 14}
    ending = BatchLoader(write_mixture(tmp_path / "ending", {"a": 1.0}, max_epochs={"a": 1.0}), seq_len=32, global_batch_size=RAMP, seed=3)
    rows = ending.order.num_rows
    assert rows is not None
    last = 4 + (rows - 28) // 2
    assert ending.num_steps == last + 1
    ending.batch(last)
    with pytest.raises(ValueError, match=f"steps of 4, from step 3 on 8, from step 5 on 2 rows .* ends after {last + 1}:"):
        ending.batch(last + 1)


@pytest.mark.parametrize(
    ("changes", "devices", "message"),
    [
        ({}, 4, r"train.train_batch_size=2 \(from step 5 on\) does not divide over 4 devices .*use a multiple of 4, such as 4"),
        ({"train_batch_size": stages((0, 4), (3, 6)), "per_device_parallelism": 4}, 1,
         r"train.per_device_parallelism=4 does not divide the 6 .* train.train_batch_size=6 \(from step 3 on\): use a divisor of 6"),
        ({"per_device_parallelism": 16}, 1, r"train.per_device_parallelism=16 does not divide the 4 .*\(from step 0 on\)"),
    ],
)  # fmt: skip
def test_a_stage_that_does_not_divide_is_named(changes: dict[str, Any], devices: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchArithmetic.of(train_config(**changes), devices)


def test_a_stage_that_does_not_divide_over_the_processes_is_named(tmp_path: Path) -> None:
    mixture = write_mixture(tmp_path, {"plays": 1.0})
    with pytest.raises(ValueError, match=r"global_batch_size=2 \(from step 5 on\) does not divide over 4 processes; use a multiple of 4"):
        BatchLoader(mixture, seq_len=32, global_batch_size=RAMP, seed=3, process_count=4)


def test_rows_at_once_stay_and_microbatches_differ() -> None:
    divided = BatchArithmetic.by_size(train_config(per_device_parallelism=4), 1)
    assert {size: (one.per_device, one.num_microbatches) for size, one in divided.items()} == {4: (4, 1), 8: (4, 2), 2: (2, 1)}
    assert BatchArithmetic.of(train_config(per_device_parallelism=4), 1) == divided[8]
    whole = BatchArithmetic.by_size(train_config(), 2)
    assert {size: (one.per_device, one.num_microbatches) for size, one in whole.items()} == {4: (2, 1), 8: (4, 1), 2: (1, 1)}


def test_preflight_looks_at_the_largest_batch_and_counts_all_sequences() -> None:
    sizes = stages((0, 64), (1000, 192), (2000, 256))
    job = replace_train(JOBS["dclm-1b"], train_batch_size=sizes, num_train_steps=3000, warmup=10)
    assert (job.batch_size, job.tokens_per_step) == (256, 256 * job.seq_len)
    assert job.hours_per_step_second == (64_000 + 192_000 + 256_000) / 256 / 3600
    found = settings_of(job, slice_named("v4-128"), Fixed())
    assert {one.microbatches for one in found if one.context == one.tensor == 1} == {1, 4}  # with 2, 2 sequences at once do not divide 3
    for one in found:
        one.applied(job, 64)
    with pytest.raises(ValueError, match=r"train.train_batch_size=192 \(from step 1000 on\)"):
        Setting("full", 2, 1, 1, 1).applied(job, 64)
    plain = settings_of(JOBS["dclm-1b"], slice_named("v4-128"), Fixed())
    assert {one.microbatches for one in plain if one.context == one.tensor == 1} == set(divisors(4))
    asked: list[Any] = []

    def compiler(_: str, order: Any) -> Any:
        asked.append(order.train.train_batch_size)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Search(job, slice_named("v4-128"), compiler).run(Fixed())
    assert asked == [256]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mixture(tmp_path_factory.mktemp("data"))


def trainer_of(directory: Path, mixture: Path, **changes: Any) -> Trainer:
    quick = {"steps_per_export": 100, "steps_per_eval": 100, "num_train_steps": 6, "sample_prompts": (), "minutes_per_checkpoint": None}
    path = write_job(directory, mixture, **{**quick, "watch_norms": False, **changes})
    return Trainer(TrainingJob.model_validate_json(path.read_text()))


def curve(directory: Path) -> dict[int, tuple[float, float, float]]:
    rows = [row for row in read_json_lines(directory / "metrics.jsonl") if "train/loss" in row]
    return {row["step"]: (row["train/loss"], row["train/tokens"], row["throughput/total_tokens"]) for row in rows}


def leaves(trainer: Trainer) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(trainer.state))]


@pytest.mark.slow
def test_equal_stages_are_the_plain_number_bit_for_bit(mixture: Path, tmp_path: Path) -> None:
    plain = trainer_of(tmp_path / "plain", mixture, train_batch_size=8)
    staged = trainer_of(tmp_path / "staged", mixture, train_batch_size=stages((0, 8), (2, 8)))
    assert plain.run()
    assert staged.run()
    assert curve(tmp_path / "staged") == curve(tmp_path / "plain")
    for ours, theirs in zip(leaves(staged), leaves(plain), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_stopped_at_a_border_it_continues_as_if_undisturbed(mixture: Path, tmp_path: Path) -> None:
    sizes = {"train_batch_size": stages((0, 8), (3, 24), (5, 16)), "per_device_parallelism": 1}
    whole = trainer_of(tmp_path / "whole", mixture, **sizes)
    assert list(whole._compiled) == [8, 24, 16]
    assert whole.run()
    assert [tokens for _, _, tokens in curve(tmp_path / "whole").values()] == [rows * 32 for rows in (8, 16, 24, 48, 72, 88)]

    stopped = trainer_of(tmp_path / "run", mixture, **sizes)
    record = stopped._record

    def stop_before_the_border(step: int, metrics: Any) -> None:
        record(step, metrics)
        if step == 2:  # read while step 3 runs
            stopped.requests.agreed = Request.STOP

    stopped._record = stop_before_the_border
    assert not stopped.run()
    assert stopped.step == 3
    continued = trainer_of(tmp_path / "run", mixture, **sizes)
    assert continued.step == 3
    assert list(continued._compiled) == [24, 16]
    assert continued.run()
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    for ours, theirs in zip(leaves(continued), leaves(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)
