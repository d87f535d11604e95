"""pretrain: the training of one job, on the machine that runs this flow: host 0 of a TPU slice, or any worker's.

The training step of `train-llama` asks for it (`--pool`); it is not meant to be filled in by hand. The other hosts of a slice run the
trainer alone (`deployments/tpu/host_agent.py`).
"""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.states import Crashed, State

import flows.prefect_settings  # noqa: F401  (no secrets in logs)
from model.job import TrainingJob
from tasks.bucket_runs import on_this_machine
from tasks.children import ChildFailed, allow_children
from tasks.trainer_child import run_trainer


@flow(name="pretrain", flow_run_name="pretrain-{job.name}")
def pretrain(job: TrainingJob) -> State[Any] | None:
    """Trains a job to its last step, from its newest verified checkpoint.

    Args:
        job: What the training step hands over: model, training, mixture and where checkpoints lie.

    A mistake in the job fails the run. A trainer that died crashes it, which the `tpu` worker answers with a new slice.
    """
    allow_children()
    try:
        run_trainer(on_this_machine(job))
    except ChildFailed as failed:
        if failed.named:
            raise
        return Crashed(message=str(failed))
    return None
