"""The export step: the last checkpoint as a directory that `transformers` loads."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from model.durable import write_durably, write_json
from model.job import TrainingJob
from tasks.artifacts import Artifact, read_manifest
from tasks.bucket_runs import fetch_mixture
from tasks.caching import StepOutput, step_task
from tasks.chat import TEMPLATE_FILE
from tasks.children import run_child
from tasks.config import ExportConfig, TrainingStep
from tasks.data_steps import TfdsTask, Tokenization
from tasks.mixture_config import Chat
from tasks.model_card import CARD, model_card
from tasks.places import ObjectPath
from tasks.readers.chat_template import DEFAULT_TEMPLATE
from tasks.steps import Step
from tasks.training import training_job


def export_body(step: Step, directory: Path, inputs: tuple[Artifact, ...]) -> StepOutput:
    """Writes config.json, safetensors, the tokenizer and a card, from the checkpoint in `inputs[0]`, trained on the mixture `inputs[1]`.

    Raises:
        ChildFailed: the checkpoint is damaged, or the disk is full.
    """
    checkpoint, mixture = inputs
    training, config = step.upstream[0], step.config
    assert isinstance(training.config, TrainingStep)
    assert isinstance(config, ExportConfig)
    manifest = read_manifest(checkpoint.path)
    stats = {} if manifest is None else manifest.stats
    job = training_job(training, Path(checkpoint.path), mixture)
    write_export(job, training, directory, config, training.config.train.num_train_steps, stats)
    return StepOutput(stats={"dtype": config.dtype})


def write_export(job: TrainingJob, training: Step, directory: Path, config: ExportConfig, step: int, stats: dict[str, Any]) -> None:
    """Writes the checkpoint of `step` into `directory`, with the card. `stats`: of the training up to there, as its manifest has them.

    Raises:
        ChildFailed: the checkpoint is damaged, or the disk is full.
    """
    if job.mixture_bucket is not None:
        fetch_mixture(ObjectPath.parse(job.mixture_bucket), tokens=False)
    with tempfile.TemporaryDirectory() as place:  # the exported directory is for others: nothing of ours in it
        job_file = Path(place) / "job.json"
        train = job.train.model_copy(update={"hf_generation_eos_token_ids": config.generation_eos_token_ids})
        write_json(job_file, job.model_copy(update={"train": train}).model_dump(mode="json"))
        run_child("model.export", [str(job_file), str(directory.absolute()), config.dtype, str(step)], lambda event: None)
    if (template := chat_template_of(training)) is not None:
        write_durably(directory / TEMPLATE_FILE, template.encode())
    write_durably(directory / CARD, model_card(training, config, stats, directory, step).encode())


def chat_template_of(training: Step) -> str | None:
    """The template of the conversations that a model was trained on; None where it saw none, or of several templates."""
    tokens = (step.config for step in training.upstream[0].upstream if step.kind == "tokens")
    readings = (config.reading for config in tokens if isinstance(config, Tokenization | TfdsTask))
    templates = {reading.answers.template or DEFAULT_TEMPLATE for reading in readings if isinstance(reading.answers, Chat)}
    return templates.pop() if len(templates) == 1 else None


export_hf = step_task(description="Export to Hugging Face format")(export_body)
