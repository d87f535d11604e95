"""The export process: `python -m model.export JOB.json DIRECTORY DTYPE STEP` writes a checkpoint as a Hugging Face directory."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Literal, cast

import jax

from model import partitioning
from model.checkpoint import restore_params
from model.child import die_with_parent, emit_error
from model.hf import save_hf
from model.job import TrainingJob
from model.mixture_store import MixtureTokenizer
from model.parameters import param_shapes


def export(job: TrainingJob, directory: Path, dtype: Literal["float32", "bfloat16"], step: int | None = None) -> None:
    """Restores the weights of one step, or their average, onto this machine and writes them with their tokenizer.

    Args:
        job: the run; its checkpoint may lie in a bucket.
        directory: where to write, on this machine.
        dtype: number format of the written weights.
        step: of the checkpoint; None: the job's last.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    tokenizer = MixtureTokenizer.read(job.mixture)
    config = job.model.with_vocab(tokenizer.vocab_size)
    shardings = partitioning.param_shardings(config, partitioning.make_mesh())
    abstract = jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding), param_shapes(config), shardings
    )
    field = "params" if job.train.ema_beta is None else "ema_params"
    params = restore_params(job.checkpoints / str(step or job.train.num_train_steps), abstract, field=field)
    save_hf(directory, config, params, tokenizer.path, dtype=dtype, generation_eos_token_ids=job.train.hf_generation_eos_token_ids)


def main(arguments: list[str]) -> int:
    """Runs one export; returns the exit status."""
    die_with_parent()
    job_file, directory, dtype, step = arguments
    try:
        export(
            TrainingJob.model_validate_json(Path(job_file).read_text(encoding="utf-8")),
            Path(directory),
            cast('Literal["float32", "bfloat16"]', dtype),
            int(step),
        )
    except Exception as error:
        foreseen = isinstance(error, ValueError | OSError)
        if not foreseen:
            traceback.print_exc()
        emit_error(error, foreseen=foreseen)
        return 1
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit("usage: python -m model.export JOB.json DIRECTORY DTYPE STEP")
    sys.exit(main(sys.argv[1:]))
