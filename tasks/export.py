"""The export step: the last checkpoint as a directory that `transformers` loads."""

from __future__ import annotations

import tempfile
from pathlib import Path

from model.durable import write_durably, write_json
from tasks.artifacts import Artifact
from tasks.bucket_runs import fetch_mixture
from tasks.caching import StepOutput, step_task
from tasks.children import run_child
from tasks.config import ExportConfig
from tasks.model_card import CARD, model_card
from tasks.places import ObjectPath
from tasks.steps import Step
from tasks.training import training_job


def export_body(step: Step, directory: Path, inputs: tuple[Artifact, ...]) -> StepOutput:
    """Writes config.json, safetensors, the tokenizer and a card, from the checkpoint in `inputs[0]`, trained on the mixture `inputs[1]`.

    Raises:
        ChildFailed: the checkpoint is damaged, or the disk is full.
    """
    checkpoint, mixture = inputs
    config = step.config
    assert isinstance(config, ExportConfig)
    job = training_job(step.upstream[0], Path(checkpoint.path), mixture)
    if job.mixture_bucket is not None:
        fetch_mixture(ObjectPath.parse(job.mixture_bucket), tokens=False)
    with tempfile.TemporaryDirectory() as place:  # the exported directory is for others: nothing of ours in it
        job_file = Path(place) / "job.json"
        write_json(job_file, job.model_dump(mode="json"))
        run_child("model.export", [str(job_file), str(directory.absolute()), config.dtype], lambda event: None)
    write_durably(directory / CARD, model_card(step, checkpoint, directory).encode())
    return StepOutput(stats={"dtype": config.dtype})


export_hf = step_task(description="Export to Hugging Face format")(export_body)
