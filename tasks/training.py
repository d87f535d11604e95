"""The training step: starts `python -m model.training_process` as a child, shows how it goes, and commits its last checkpoint."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from model.child import STOPPED
from model.durable import write_durably, write_json
from model.job import TrainingJob
from model.metrics import read_json_lines, read_samples
from model.mixture_store import MixtureStore
from tasks.artifacts import Artifact
from tasks.caching import StepOutput, assert_still_owner, run_logger, step_task
from tasks.children import ChildStopped, run_child
from tasks.config import TrainingStep, beside_fields
from tasks.preflight import as_chosen, check_accelerator, preflight_lines
from tasks.steps import Step
from tasks.training_report import TrainingReport

OWNER_SECONDS = 5.0
CURVES = ("metrics.jsonl", "samples.jsonl")
CURVES_COPY = ".curves.json"
JOB_FILE = ".job.json"


def training_job(step: Step, directory: Path, mixture: Artifact) -> TrainingJob:
    """What the trainer is told for this step."""
    config = step.config
    assert isinstance(config, TrainingStep)
    return TrainingJob(
        name=step.name,
        fingerprint=step.fingerprint,
        directory=directory.absolute(),
        mixture=Path(mixture.path).absolute(),
        model=config.model,
        train=config.train,
        track=config.track,
        tags=config.tags,
        eval_tags=config.eval_tags,
    )


def read_job(directory: Path) -> TrainingJob:
    """What the trainer of a run was last told. Raises ValueError where it cannot be read."""
    try:
        return TrainingJob.model_validate_json((directory / JOB_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{directory / JOB_FILE} cannot be read ({str(error)[:200]}): run the training again, which writes it") from None


def train_body(step: Step, directory: Path, inputs: tuple[Artifact, ...]) -> StepOutput:
    """Trains from the newest verified checkpoint to the last step. What a kill leaves is continued by the next call.

    Raises:
        ChildFailed: the trainer named an error.
        ChildStopped: it saved and stopped; the message says how to continue.
        ValueError: the curve was lost together with its copy, or `train.accelerator_type` names a slice where the job does not fit,
            or which this machine is not.
    """
    job = as_preflight_chose(training_job(step, directory, inputs[0]))
    job_file = directory / JOB_FILE
    write_json(job_file, job.model_dump(mode="json"))
    report = TrainingReport(job)
    restore_curves(directory)

    checked = time.monotonic()

    def on_event(event: dict[str, Any]) -> None:
        nonlocal checked
        if time.monotonic() - checked > OWNER_SECONDS:
            # A paused machine may wake up when another one has taken over: then this trainer must stop writing.
            assert_still_owner()
            checked = time.monotonic()
        if event.get("event") == "saving":
            copy_curves(directory, int(event["step"]))
        report.on_event(event)

    try:
        with report:
            run_child("model.training_process", [str(job_file)], on_event, stopped_status=STOPPED)
    except ChildStopped:
        saved = f"saved at step {report.step} of {job.train.num_train_steps}"
        raise ChildStopped(f"training {job.name} was stopped and {saved}: run the same command again to continue") from None
    stats = {**training_stats(directory, report), "beside": beside_fields(job.train)}
    if stats["step"] != job.train.num_train_steps:
        raise ValueError(
            f"{directory / 'metrics.jsonl'} lost rows (the last one is of step {stats['step']} of {job.train.num_train_steps}), and "
            f"{directory / CURVES_COPY} has them no more: put one of them back, or train again with --force checkpoints/{step.name}"
        )
    last = directory / "checkpoints" / str(job.train.num_train_steps)
    files = [directory / name for name in ("metrics.jsonl", "samples.jsonl", "loss.png", "loss.html")]
    files += [path for path in last.rglob("*") if path.is_file()]
    return StepOutput(stats=stats, files=[path for path in files if path.exists()])


def as_preflight_chose(job: TrainingJob) -> TrainingJob:
    """The job with the settings that preflight chose for its slice; as it is where it names none, or where there is no compiler.

    Raises:
        ValueError: it does not fit, or the slice is not here.
    """
    if job.train.accelerator_type is None:
        return job
    model = job.model.with_vocab(vocabulary_of(job.mixture))
    found = check_accelerator(job.name, model, job.train, tell=run_logger().info)
    if found is None:
        return job
    for line in preflight_lines(found):
        run_logger().info(line)
    model, train = as_chosen(found, job.model, job.train)
    return job.model_copy(update={"model": model, "train": train})


def vocabulary_of(mixture: Path) -> int:
    """Size of the vocabulary that a mixture's tokens are of."""
    return MixtureStore.open(mixture).tokenizer.vocab_size


def copy_curves(directory: Path, step: int) -> None:
    """Keeps the rows up to `step`, which a checkpoint is about to cover: the weights can be trained again, the curve cannot."""
    curves: dict[str, str] = {}
    for name in CURVES:
        rows = (row for row in read_json_lines(directory / name) if row["step"] <= step)
        curves[name] = "".join(json.dumps(row) + "\n" for row in rows)
    write_json(directory / CURVES_COPY, {"curves": curves, "sha256": _digest(curves)})


def restore_curves(directory: Path) -> None:
    """Puts the rows of the copy back into the files that do not begin with them. The trainer cuts off those after its resume step."""
    try:
        copy = json.loads((directory / CURVES_COPY).read_text(encoding="utf-8"))
        curves = {name: str(copy["curves"][name]) for name in CURVES}
        intact = copy["sha256"] == _digest(curves)
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError):
        intact, curves = False, {}
    if not intact:
        run_logger().warning("%s is damaged, so it is not used", directory / CURVES_COPY)
        return
    for name, lines in curves.items():
        path = directory / name
        if not path.is_file() or not path.read_bytes().startswith(lines.encode()):
            run_logger().warning("%s lacks rows or has others than were written: restored from its copy", path)
            write_durably(path, lines.encode())


def _digest(curves: dict[str, str]) -> str:
    return hashlib.sha256("".join(curves[name] for name in CURVES).encode()).hexdigest()


def training_stats(directory: Path, report: TrainingReport) -> dict[str, Any]:
    """The last values of the curves and the last samples: what a summary shows without opening the files."""
    rows = read_json_lines(directory / "metrics.jsonl")
    final: dict[str, Any] = {}
    for row in rows:
        final.update({key: value for key, value in row.items() if key.startswith(("train/", "eval/")) and not key.endswith("time")})
    return {
        "step": rows[-1]["step"] if rows else 0,
        "final": final,
        "samples": read_samples(directory / "samples.jsonl"),
        "num_parameters": report.started.get("num_parameters"),
        "skipped_rows": report.started.get("skipped_rows", 0),
        "components": report.started.get("planned", {}),
    }


train = step_task(description="Train the model")(train_body)
