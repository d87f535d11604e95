"""What train-llama does besides the steps of a run, each as something of its own in the UI: exports, evaluations, pushes, trackers."""

from __future__ import annotations

import flows.prefect_settings  # noqa: F401  (before Prefect reads its settings)

# isort: split

import tempfile
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task

from flows.harness_flow import evaluate_model
from model.durable import write_json
from model.inference_jobs import HarnessJob
from model.track_rows import RowsJob
from tasks.artifacts import Artifact, open_artifact
from tasks.checkpoint_exports import checkpoint_export, export_checkpoint
from tasks.children import ChildFailed, run_child
from tasks.config import ExportConfig
from tasks.experiment_record import training_step
from tasks.hub_push import check_push, push_export
from tasks.obligations import Ledger, Push
from tasks.owed_work import OwedWork, Workers
from tasks.places import working_directory
from tasks.planning import Plan, local_device_count
from tasks.steps import Step
from tasks.training import training_job


def owed_work_of(plan: Plan) -> OwedWork | None:
    """The obligations of the plan's training, of this start and earlier ones; None where the plan trains nothing."""
    training = training_step(plan)
    if training is None:
        return None

    def _evaluate(job: HarnessJob) -> Artifact:
        return evaluate_model(job, root=str(plan.root))

    def _export(step: int, how: ExportConfig) -> Artifact:
        return export_checkpoint(checkpoint_export(training, step, how), str(plan.root), [_mixture(training, plan)])

    def _push(repo_id: str) -> str:
        return push_to_hub(str(training.directory(plan.root)), repo_id)

    def _track(rows: list[dict[str, Any]]) -> bool:
        return send_to_trackers(plan, training, rows)

    return OwedWork(
        training.directory(plan.root),
        plan.config,
        _export_config(plan),
        Workers(_evaluate, _export, _push, _track),
        get_run_logger().warning,
        # where a TPU or GPU is attached, the training has it
        beside=plan.config.pool is not None or local_device_count() is not None,
        exports_last=any(step.kind == "hf" for step in plan.wanted),
    )


def check_hub(plan: Plan) -> None:
    """Refuses a run whose export could not be pushed, before it trains. Raises ValueError with the remedy."""
    training, repo_id = training_step(plan), plan.config.export.hub_repo_id
    if training is None or repo_id is None:
        return
    pushed = [one for one in Ledger(training.directory(plan.root)).all if isinstance(one, Push) and one.is_met]
    if repo_id not in (one.export.hub_repo_id for one in pushed):
        try:
            check_push(repo_id)
        except ValueError as error:
            raise ValueError(f"export.hub_repo_id={repo_id!r} could not be pushed to at the end: {error}") from None


@task(name="push_to_hub", task_run_name="push to {repo_id}")
def push_to_hub(run: str, repo_id: str) -> str:
    """Sends the last export of a run to the Hugging Face hub; where the commit can be seen."""
    commit, notes = push_export(run, repo_id)
    get_run_logger().info("pushed: %s", commit)
    for note in notes:
        get_run_logger().info(note)
    return commit


def send_to_trackers(plan: Plan, training: Step, rows: list[dict[str, Any]]) -> bool:
    """Hands rows to the trackers of a run that has ended; whether all of them have the rows. What fails is told, and no more."""
    mixture = _mixture(training, plan)
    log = get_run_logger()
    sent: list[str] = []

    def _on_event(event: dict[str, Any]) -> None:
        if event.get("event") == "message":
            log.warning(event["text"])
        sent.extend(event["trackers"] if event.get("event") == "sent" else ())

    job = RowsJob(training=training_job(training, working_directory(training.directory(plan.root)), mixture), rows=tuple(rows))
    with tempfile.TemporaryDirectory() as place:
        write_json(Path(place) / "job.json", job.model_dump(mode="json"))
        try:
            run_child("model.track_rows", [str(Path(place) / "job.json")], _on_event)
        except (ChildFailed, OSError) as error:
            log.warning("the trackers did not get the numbers of lm-eval: %s", error)
    return {*sent} == {*plan.config.track}


def _export_config(plan: Plan) -> ExportConfig:
    """How the run's exports are made, with what `train` says of it."""
    config = next(planned.step.config for planned in plan.steps if planned.step.kind == "hf")
    assert isinstance(config, ExportConfig)
    return config


def _mixture(training: Step, plan: Plan) -> Artifact:
    mixture = training.upstream[0]
    return open_artifact(mixture.directory(plan.root), mixture.fingerprint)
