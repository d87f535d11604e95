"""Evaluating checkpoints of a run by lm-eval: which of them, what is refused before it starts, and the numbers of one."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from model.inference_jobs import HarnessJob
from tasks.artifacts import Artifact, brought_here
from tasks.config import EvalHarnessConfig, RunConfig

RESULTS = "results.json"


def check_eval_harness(config: RunConfig) -> None:
    """Refuses evaluations that could not be made. Raises ValueError with the remedy."""
    harness, train = config.eval_harness, config.train
    if not harness.tasks:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(f"eval_harness.tasks={harness.tasks} need lm-eval, which is not installed: pip install 'prefect-llama[eval]'")
    if harness.task_dir is not None and not harness.task_dir.is_dir():
        raise ValueError(f"eval_harness.task_dir={harness.task_dir} is no directory: give the one that your task files (YAML) are in")
    if harness.steps >= train.num_train_steps:
        return
    if harness.steps % train.steps_per_export:
        raise ValueError(
            f"eval_harness.steps={harness.steps} is no multiple of train.steps_per_export={train.steps_per_export}, so there would be no "
            "checkpoint to evaluate: make it one"
        )
    if train.max_checkpoints is not None:
        raise ValueError(
            f"train.max_checkpoints={train.max_checkpoints} may remove checkpoints before they are evaluated every "
            f"eval_harness.steps={harness.steps}: leave it out, or set eval_harness.steps to train.num_train_steps or more"
        )


def due_steps(harness: EvalHarnessConfig, num_train_steps: int) -> list[int]:
    """The steps whose checkpoints are evaluated: multiples of `steps`, and the last; none where there are no tasks."""
    if not harness.tasks:
        return []
    return [*range(harness.steps, num_train_steps, harness.steps), num_train_steps]


def evaluated(harness: EvalHarnessConfig, model: Path, evaluate: Callable[[HarnessJob], Artifact]) -> dict[str, float]:
    """The numbers of one model, each group of tasks with as many examples as it asks for. `evaluate` runs one job of lm-eval."""
    metrics: dict[str, float] = {}
    groups = harness.by_num_fewshot()
    for shots, names in groups.items():
        job = HarnessJob(model=model, tasks=names, task_dir=harness.task_dir, num_fewshot=shots, limit=harness.limit)
        results = Path(brought_here(evaluate(job)).path) / RESULTS
        found = json.loads(results.read_text(encoding="utf-8"))["metrics"]
        metrics |= dict(_named(found, shots, alone=len(groups) == 1))
    return metrics


def _named(found: dict[str, float], shots: int | None, *, alone: bool) -> Iterator[tuple[str, float]]:
    """The metrics with the number of examples in the task's name, where it was asked for; averages only where they are of all tasks."""
    for name, value in found.items():
        lm_eval, task, metric = name.split("/", 2)
        if task == "averages":
            if alone:
                yield name, value
        else:
            yield (name if shots is None else f"{lm_eval}/{task}_{shots}shot/{metric}"), value
