"""Evaluations beside a run: which steps are owed, that none is forgotten or done twice, what fails, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model.inference_jobs import HarnessJob
from tasks.artifacts import Artifact, commit
from tasks.children import ChildFailed, ChildStopped
from tasks.config import CORE_TASKS, EvalHarnessConfig, ExportConfig, RunConfig
from tasks.eval_harness import RESULTS, check_eval_harness, due_steps
from tasks.experiment_record import read_record
from tasks.obligations import EVALS, OBLIGATIONS, Ledger
from tasks.owed_work import ObligationsLeft, OwedWork, Workers
from tasks.presets import preset
from tasks.steps import Step
from tests.lm_eval_tasks import write_tasks
from tests.main_job import MainJob, checkpoint_directory


def run_config(*tasks: str, steps: int = 40, **changes: Any) -> RunConfig:
    """The preset, 240 steps with a checkpoint every 40."""
    base = preset("debug")
    train = base.train.model_copy(update={"max_checkpoints": None, **changes})
    return base.model_copy(update={"train": train, "eval_harness": EvalHarnessConfig(tasks=tasks, steps=steps)})


class Harness:
    """Stands for lm-eval: remembers what it was asked, and fails where it is told to."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.jobs: list[HarnessJob] = []
        self.error: BaseException | None = None

    def __call__(self, job: HarnessJob) -> Artifact:
        self.jobs.append(job)
        if self.error is not None:
            raise self.error
        step = Step(kind="eval", name=f"mine-{len(self.jobs)}", config=EvalHarnessConfig())
        directory = Path(str(step.directory(self.place)))
        directory.mkdir(parents=True)
        metrics = {f"lm_eval/{task}/acc": 0.5 for task in job.tasks} | {"lm_eval/averages/macro_avg_acc": 0.5}
        (directory / RESULTS).write_text(json.dumps({"metrics": metrics}))
        return commit(directory, step, stats={})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints" / "debug-0123456789abcdef"


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    return Harness(tmp_path / "evals")


def reach(run: Path, *steps: int) -> None:
    for step in steps:
        (run / "checkpoints" / str(step)).mkdir(parents=True)


def evaluations(run: Path, config: RunConfig, harness: Harness, said: list[str] | None = None, *, beside: bool = True) -> OwedWork:
    workers = Workers(evaluate=harness, export=never, push=never, track=never)
    return OwedWork(run, config, ExportConfig(), workers, (said if said is not None else []).append, beside=beside)


def never(*asked: Any) -> Any:
    raise AssertionError(f"nobody asked for {asked}")


def test_checkpoints_are_evaluated_as_they_are_reached_and_once(run: Path, harness: Harness) -> None:
    made = evaluations(run, run_config("piqa:10", "copa:0", "mine", steps=80), harness)
    made.while_training()
    assert harness.jobs == []
    reach(run, 40, 80)
    made.while_training()
    made.while_training()
    asked = [(job.model.name, job.tasks, job.num_fewshot) for job in harness.jobs]
    assert asked == [("80", ("piqa",), 10), ("80", ("copa",), 0), ("80", ("mine",), None)]
    reach(run, 160, 240)
    rows = made.at_the_end()
    assert [row["step"] for row in rows] == [80, 160, 240]
    assert rows[0] == {"step": 80, "lm_eval/piqa_10shot/acc": 0.5, "lm_eval/copa_0shot/acc": 0.5, "lm_eval/mine/acc": 0.5}
    assert [json.loads(line) for line in (run / EVALS).read_text().splitlines()] == rows
    count = len(harness.jobs)
    assert evaluations(run, run_config("piqa:10", "copa:0", "mine", steps=80), harness).at_the_end() == rows
    assert len(harness.jobs) == count


def test_what_a_killed_run_owed_is_made_up_although_nobody_asks_for_it_now(run: Path, harness: Harness) -> None:
    reach(run, 40, 80)
    harness.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        evaluations(run, run_config("mine", steps=80), harness).while_training()
    assert [one.step for one in Ledger(run).due] == [80]
    harness.error = None
    reach(run, 240)
    rows = evaluations(run, run_config(steps=80), harness).at_the_end()
    assert rows == [{"step": 80, "lm_eval/mine/acc": 0.5, "lm_eval/averages/macro_avg_acc": 0.5}]


def test_a_failure_stops_nothing_is_told_once_and_is_tried_again_by_the_next_start(run: Path, harness: Harness) -> None:
    reach(run, 40)
    harness.error, said = ChildFailed("no task 'mine'"), list[str]()
    made = evaluations(run, run_config("mine"), harness, said)
    made.while_training()
    made.while_training()
    assert said == ["the evaluation of step 40 failed: no task 'mine'"]
    with pytest.raises(ObligationsLeft, match=r"this failed: the evaluation of step 40: no task 'mine'\. The same command tries it again"):
        made.at_the_end()
    harness.error = None
    assert [row["step"] for row in evaluations(run, run_config("mine"), harness).at_the_end()] == [40]
    harness.error = ChildStopped("stopped")
    reach(run, 80)
    with pytest.raises(ChildStopped):
        evaluations(run, run_config("mine"), harness).while_training()


def test_a_checkpoint_that_is_gone_stays_owed(run: Path, harness: Harness) -> None:
    reach(run, 240)
    with pytest.raises(ObligationsLeft, match=r"step 40: its checkpoint .* is gone: train again"):
        evaluations(run, run_config("mine"), harness).at_the_end()
    assert {one.step for one in Ledger(run).due} == {40, 80, 120, 160, 200}


def test_where_the_training_has_the_devices_it_comes_first(run: Path, harness: Harness) -> None:
    reach(run, 40, 240)
    made = evaluations(run, run_config("mine", steps=240), harness, beside=False)
    made.while_training()
    assert harness.jobs == []
    assert [row["step"] for row in made.at_the_end()] == [240]


def test_nothing_is_owed_or_written_where_there_are_no_tasks(run: Path, harness: Harness) -> None:
    reach(run, 240)
    assert evaluations(run, run_config(), harness).at_the_end() == []
    assert not (run / OBLIGATIONS).exists()
    assert due_steps(EvalHarnessConfig(tasks=("a",), steps=1000), 240) == [240]


def test_a_damaged_ledger_is_named(run: Path, harness: Harness) -> None:
    run.mkdir(parents=True)
    (run / OBLIGATIONS).write_text("[]")
    with pytest.raises(ValueError, match=r"obligations.json is damaged"):
        evaluations(run, run_config("mine"), harness).at_the_end()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (run_config("mine", steps=50), r"eval_harness.steps=50 is no multiple of train.steps_per_export=40"),
        (run_config("mine", max_checkpoints=1), "train.max_checkpoints=1 may remove checkpoints"),
    ],
)
def test_what_could_not_be_evaluated_is_refused_before_work_starts(config: RunConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_eval_harness(config)
    check_eval_harness(run_config("mine", steps=240, max_checkpoints=1))


def test_tasks_are_names_with_their_number_of_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core = EvalHarnessConfig(tasks=("core", "mine"))
    assert core.tasks == (*CORE_TASKS, "mine")
    assert core.by_num_fewshot()[None] == ("mine",)
    assert sum(map(len, core.by_num_fewshot().values())) == len(CORE_TASKS) + 1
    with pytest.raises(ValueError, match="write NAME or NAME:EXAMPLES"):
        EvalHarnessConfig(tasks=("piqa:many",))
    config = run_config("mine")
    lost = config.model_copy(update={"eval_harness": EvalHarnessConfig(tasks=("mine",), task_dir=tmp_path / "none")})
    with pytest.raises(ValueError, match=r"task_dir=.*none is no directory"):
        check_eval_harness(lost)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'prefect-llama\[eval\]'"):
        check_eval_harness(config)


@pytest.mark.slow
def test_the_main_job_evaluates_beside_training_and_makes_up_what_a_kill_left(tmp_path: Path) -> None:
    lines = [f"to be, or not to be, that is question {number}" for number in range(8)]
    tasks = write_tasks(tmp_path / "tasks", lines)
    flags = (
        "--eval-harness.tasks",
        "choose",
        "--eval-harness.steps",
        "15",
        "--eval-harness.task-dir",
        str(tasks),
        "--train.max-checkpoints",
        "None",
    )
    job = MainJob(tmp_path / "root", tmp_path / "home", *flags, HF_DATASETS_OFFLINE="1", HF_HOME=str(tmp_path / "hf"))
    job.until("hf job")
    job.kill(tree=True)
    MainJob(tmp_path / "root", tmp_path / "home", *flags, HF_DATASETS_OFFLINE="1", HF_HOME=str(tmp_path / "hf")).succeed()
    directory = checkpoint_directory(tmp_path / "root")
    rows = [json.loads(line) for line in (directory / EVALS).read_text().splitlines()]
    assert [row["step"] for row in rows] == [15, 30]
    assert all(0 <= row["lm_eval/choose/acc"] <= 1 for row in rows)
    assert Ledger(directory).due == []
    assert (directory / "hf" / "README.md").read_text().startswith("---\n")
    assert "lm_eval/choose/acc" in (directory / "report.html").read_text()
    record = read_record(directory)
    assert record is not None
    assert len(record["launches"]) == 1, "the second start found the training done"
