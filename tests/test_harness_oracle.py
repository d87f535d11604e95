"""lm-eval on an export, by its own Hugging Face backend and by ours: the same requests, likelihoods and accuracies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from model.harness import run_harness
from model.inference_jobs import HarnessJob
from model.lm_eval_adapter import LmEvalModel
from model.trained_model import TrainedModel
from tests.lm_eval_tasks import write_tasks
from tests.trained_run import TrainedRun, trained_run

pytestmark = pytest.mark.oracle
for package in ("torch", "accelerate"):
    pytest.importorskip(package, reason=f"{package} is not installed: make oracle")


@pytest.fixture(scope="module")
def run() -> TrainedRun:
    return trained_run()


@pytest.fixture(scope="module")
def tasks(run: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "mine", run.lines)


@pytest.fixture(scope="module")
def outcomes(run: TrainedRun, tasks: Path) -> dict[str, dict[str, Any]]:
    """By backend, what lm-eval found, with every request and answer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tasks)
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("DISABLE_MULTIPROC", "1")
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tasks.parent / "cache")
        asked = {"tasks": ["choose", "whole", "go_on"], "limit": 60, "bootstrap_iters": 0, "log_samples": True}
        asked["num_fewshot"] = None
        manager = TaskManager(include_path=str(tasks))
        theirs = simple_evaluate(
            model="hf", model_args=f"pretrained={run.hf},dtype=float32", device="cpu", batch_size=8, task_manager=manager, **asked
        )
        ours = simple_evaluate(model=LmEvalModel(TrainedModel.open(run.hf), batch_size=8), task_manager=manager, **asked)
        native = simple_evaluate(model=LmEvalModel(TrainedModel.open(run.directory), batch_size=8), task_manager=manager, **asked)
    return {"theirs": dict(theirs or {}), "ours": dict(ours or {}), "native": dict(native or {})}


def answers(outcome: dict[str, Any], task: str) -> list[Any]:
    """The answers to the requests of a task, by document."""
    samples = sorted(outcome["samples"][task], key=lambda sample: sample["doc_id"])
    return [answer for sample in samples for answer in sample["resps"]]


@pytest.mark.parametrize("ours", ["ours", "native"])
def test_likelihoods(outcomes: dict[str, dict[str, Any]], ours: str) -> None:
    found, expected = answers(outcomes[ours], "choose"), answers(outcomes["theirs"], "choose")
    assert len(expected) == 120
    assert [answer[0][0] for answer in found] == pytest.approx([answer[0][0] for answer in expected], rel=1e-4)
    assert [answer[0][1] for answer in found] == [answer[0][1] for answer in expected]


@pytest.mark.parametrize("ours", ["ours", "native"])
def test_whole_texts(outcomes: dict[str, dict[str, Any]], ours: str) -> None:
    found, expected = answers(outcomes[ours], "whole"), answers(outcomes["theirs"], "whole")
    assert len(expected) == 60
    assert [answer[0] for answer in found] == pytest.approx([answer[0] for answer in expected], rel=1e-4)


@pytest.mark.parametrize("ours", ["ours", "native"])
def test_generation_and_metrics(outcomes: dict[str, dict[str, Any]], ours: str) -> None:
    assert answers(outcomes[ours], "go_on") == answers(outcomes["theirs"], "go_on")
    for task, numbers in outcomes["theirs"]["results"].items():
        for name, value in numbers.items():
            if isinstance(value, float):
                assert outcomes[ours]["results"][task][name] == pytest.approx(value, rel=1e-4), (task, name)
    accuracy = {name: outcomes[name]["results"]["choose"]["acc,none"] for name in ("theirs", ours)}
    assert accuracy["theirs"] == accuracy[ours]


def test_the_process_finds_the_same(outcomes: dict[str, dict[str, Any]], run: TrainedRun, tasks: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tasks)  # put back at the end: the job goes there
    found = run_harness(HarnessJob(model=run.hf, tasks=("choose",), task_dir=tasks, limit=60))
    assert found["metrics"]["lm_eval/choose/acc"] == outcomes["theirs"]["results"]["choose"]["acc,none"]
