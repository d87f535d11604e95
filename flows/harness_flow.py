"""The flow evaluate-llama: tasks of lm-eval on one trained model, as a cached step."""

from __future__ import annotations

import flows.prefect_settings  # noqa: F401  (before Prefect reads its settings)

# isort: split
from typing import Any

from prefect import flow

from model.inference_jobs import HarnessJob
from tasks.artifacts import Artifact
from tasks.children import allow_children
from tasks.harness import evaluate_tasks, harness_step


@flow(name="evaluate-llama")
def evaluate_model(job: HarnessJob, root: str, force: bool = False) -> Artifact:
    """Runs tasks of lm-eval on a model, or takes the results that are there.

    Args:
        job: The model, the tasks, and how they are asked.
        root: Where the results lie.
        force: Run although they are there.
    """
    allow_children()
    task: Any = evaluate_tasks.forced() if force else evaluate_tasks
    return task(harness_step(job), root, [])
