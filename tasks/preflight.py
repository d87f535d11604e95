"""Preflight as a run sees it: before money is spent on a slice, its train step is compiled for it. No JAX here: a child does that.

found = preflight(name, model, train, tell=print)           # None where this machine has no TPU compiler
found = check_accelerator(name, model, train, tell=print)   # raises where the job cannot run
model, train = as_chosen(found, model, train)               # what the trainer is told
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from model.child import child_environment
from model.config import LlamaConfig
from model.durable import write_json
from model.train_config import SimpleTrainConfig

if TYPE_CHECKING:
    from model.preflight.result import Preflight

FITS, DOES_NOT_FIT = 0, 3  # exit statuses of the command


class DoesNotFit(ValueError):
    """The job needs more memory than the slice has; the message says what would fit."""


def preflight(name: str, model: LlamaConfig, train: SimpleTrainConfig, *, tell: Callable[[str], None]) -> Preflight | None:
    """What the compiler says of this job on `train.accelerator_type`; None, after telling why, where there is no compiler.

    model: with its vocabulary. What was compiled before is read from disk, in about a second; else a compilation takes minutes.

    Raises:
        ValueError: the job cannot be compiled for this slice, with the reason.
    """
    from model.preflight.result import Preflight
    from model.preflight.topology import check_compiler
    from model.slices import slice_named

    assert train.accelerator_type is not None
    slice_named(train.accelerator_type)
    try:
        check_compiler()
    except ValueError as error:
        tell(f"preflight not done: {error}")
        return None
    with tempfile.TemporaryDirectory(prefix="preflight-") as directory:
        job_file = Path(directory) / "job.json"
        write_json(job_file, {"name": name, "model": model.model_dump(mode="json"), "train": train.model_dump(mode="json")})
        output = _run(["--job", str(job_file), "--json"], tell)
    return Preflight.model_validate_json(output)


def _run(arguments: list[str], tell: Callable[[str], None]) -> str:
    """Standard output of the command; its other lines are told as they come.

    Raises:
        ValueError: it named an error.
    """
    environment = child_environment() | {"COLUMNS": "500"}
    command = [sys.executable, "-m", "model.preflight", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        said: list[str] = []
        assert process.stderr is not None
        assert process.stdout is not None
        listener = threading.Thread(target=_listen, args=(process.stderr, said, tell), daemon=True)
        listener.start()
        try:
            output = process.stdout.read()
            process.wait()
        except BaseException:
            process.terminate()
            raise
        listener.join()
    if process.returncode not in (FITS, DOES_NOT_FIT):
        errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
        raise ValueError("preflight: " + (" ".join(errors) or "\n".join(said[-15:]) or f"exit status {process.returncode}"))
    return output


def _listen(stream: Iterable[str], said: list[str], tell: Callable[[str], None]) -> None:
    for line in stream:
        said.append(line.rstrip("\n"))
        if not line.startswith("error: "):
            tell(said[-1])


def preflight_lines(found: Preflight) -> list[str]:
    """`name: value` lines for a plan."""
    from model.preflight.report import summary_lines

    return summary_lines(found)


def refuse_what_does_not_fit(found: Preflight) -> None:
    """Raises DoesNotFit, with what would fit, where the job does not."""
    if not found.fits:
        from model.preflight.report import headline

        raise DoesNotFit("; ".join([headline(found), *found.advice]))


def check_accelerator(
    name: str, model: LlamaConfig, train: SimpleTrainConfig, *, tell: Callable[[str], None], pool: str | None = None
) -> Preflight | None:
    """Before anything is started: refuses a job that cannot fit its slice, or, without a work pool, whose slice this machine is not.

    Returns what preflight found; None where no slice is named or there is no compiler.

    Raises:
        ValueError: naming the slice and what to do.
    """
    from model.local_chips import is_this_machine
    from model.slices import slice_named

    if train.accelerator_type is None:
        return None
    found = preflight(name, model, train, tell=tell)
    if found is not None:
        refuse_what_does_not_fit(found)
    if pool is None and (train.slice_count > 1 or not is_this_machine(slice_named(train.accelerator_type))):
        raise ValueError(
            f"train.accelerator_type={train.accelerator_type!r} can be planned (--plan) but not run: training runs on this "
            "machine's devices, which are not that slice; leave it unset, or name a work pool of type tpu with --pool"
        )
    return found


def as_chosen(found: Preflight, model: LlamaConfig, train: SimpleTrainConfig) -> tuple[LlamaConfig, SimpleTrainConfig]:
    """Model and training with the remat policy, microbatches, mesh and compiler options that preflight chose."""
    mesh = found.mesh
    ways = found.num_chips // (mesh["context"] * mesh["tensor"])
    chosen = {
        "data_parallel_size": mesh["data"],
        "context_parallel_size": mesh["context"],
        "tensor_parallel_size": mesh["tensor"],
        "per_device_parallelism": train.batch_schedule.largest // ways // found.microbatches,
        "compiler_options": found.compiler_options,
    }
    return model.model_copy(update={"gradient_checkpointing": found.remat}), SimpleTrainConfig(**{**dict(train), **chosen})


def without_chosen_options(train: SimpleTrainConfig) -> SimpleTrainConfig:
    """The training without compiler options that preflight wrote into it: as it was compiled before, so that this is found on disk."""
    from model.preflight.compiler_flags import FLAG_SETS

    chosen = any(train.compiler_options == flag_set.options for flag_set in FLAG_SETS)
    return SimpleTrainConfig(**{**dict(train), "compiler_options": {}}) if chosen else train
