"""The training step: trains here or on a work pool, and commits the last checkpoint."""

from __future__ import annotations

from pathlib import Path

from model.job import TrainingJob
from model.mixture_store import MixtureTokenizer
from tasks.artifacts import Artifact
from tasks.bucket_runs import bucket_of, fetch_records, on_this_machine, stored_entries
from tasks.caching import StepOutput, run_logger, step_task
from tasks.config import TrainingStep, beside_fields
from tasks.pool_training import train_on_pool
from tasks.preflight import as_chosen, check_accelerator, preflight_lines
from tasks.steps import Step
from tasks.trainer_child import CURVES_COPY, JOB_FILE, RECORDS, read_outcome, run_trainer


def training_job(step: Step, directory: Path, mixture: Artifact) -> TrainingJob:
    """What the trainer is told for this step."""
    config = step.config
    assert isinstance(config, TrainingStep)
    return TrainingJob(
        name=step.name,
        fingerprint=step.fingerprint,
        directory=directory.absolute(),
        bucket=bucket_of(directory),
        mixture=Path(mixture.path).absolute(),
        mixture_bucket=bucket_of(Path(mixture.path)),
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
    """Trains from the newest verified checkpoint to the last step, here or on a work pool. The next call continues what a kill left.

    Raises:
        ChildFailed: the trainer named an error.
        ChildStopped: it saved and stopped; the message says how to continue.
        ValueError: the curve was lost together with its copy, or `train.accelerator_type` names a slice where the job does not fit,
            or which this machine is not; or the work pool cannot take it.
    """
    config = step.config
    assert isinstance(config, TrainingStep)
    job = as_preflight_chose(training_job(step, directory, inputs[0]), config.pool)
    if config.pool is None:
        run_trainer(on_this_machine(job))
    else:
        train_on_pool(job, config.pool)
        fetch_records(job, RECORDS)
    found = read_outcome(directory)
    assert found is not None
    stats = {**found, "beside": beside_fields(job.train)}
    if stats["step"] != job.train.num_train_steps:
        raise ValueError(
            f"{directory / 'metrics.jsonl'} lost rows (the last one is of step {stats['step']} of {job.train.num_train_steps}), and "
            f"{directory / CURVES_COPY} has them no more: put one of them back, or train again with --force checkpoints/{step.name}"
        )
    files = [directory / name for name in RECORDS if not name.startswith(".")]
    if job.bucket is None:
        files += [path for path in (job.checkpoints / str(job.train.num_train_steps)).rglob("*") if path.is_file()]
    stored = tuple(stored_entries(job, job.train.num_train_steps))
    return StepOutput(stats=stats, files=[path for path in files if path.exists()], stored=stored)


def as_preflight_chose(job: TrainingJob, pool: str | None = None) -> TrainingJob:
    """The job with the settings that preflight chose for its slice; as it is where it names none, or where there is no compiler.

    Raises:
        ValueError: it does not fit, or the slice is not here.
    """
    if job.train.accelerator_type is None:
        return job
    model = job.model.with_vocab(vocabulary_of(job.mixture))
    found = check_accelerator(job.name, model, job.train, tell=run_logger().info, pool=pool)
    if found is None:
        return job
    for line in preflight_lines(found):
        run_logger().info(line)
    model, train = as_chosen(found, job.model, job.train)
    return job.model_copy(update={"model": model, "train": train})


def vocabulary_of(mixture: Path) -> int:
    """Size of the vocabulary that a mixture's tokens are of."""
    return MixtureTokenizer.read(mixture).vocab_size


train = step_task(description="Train the model")(train_body)
