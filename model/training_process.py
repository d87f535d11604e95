"""The training process: `python -m model.training_process JOB.json`, one on every host.

Reads a TrainingJob, continues from its newest verified checkpoint, and speaks in JSON lines on standard output.
Exit status: 0 the last checkpoint is committed, 75 stopped by a signal after saving, 1 an error that was named.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import jax

from model.buckets import remove_tree
from model.child import STOPPED, die_with_parent, emit, emit_error
from model.distributed import is_leader, join_processes, wait_for_all
from model.flops import CHIPS, chip_of, num_parameters
from model.job import TrainingJob
from model.jumps import num_rollbacks, read_skipped_data, skip_data
from model.optimizer import decayed_names
from model.requests import Request
from model.slices import slice_named
from model.train_config import SimpleTrainConfig
from model.trainer import NonFiniteLoss, Trainer, tell

COMPILED = "compiled"
_RUNTIME_STATUS = re.compile(r"(CANCELLED|UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|DATA_LOSS|FAILED_PRECONDITION): ")
SIMULATED = "PREFECT_LLAMA_SIMULATED_SLICE"  # set on hosts that are processes with virtual CPU devices


def main(job_file: Path) -> int:
    """Runs one job; returns the exit status."""
    die_with_parent()
    began = time.perf_counter()
    signals = Signals()
    try:
        job = TrainingJob.model_validate_json(job_file.read_text(encoding="utf-8"))
        join_processes(job.train)
        check_devices(job.train)
        keep_compiled_programs(job.shared)
        trainer = train(job, signals, began)
        done = trainer.step == trainer.last_step
        if done and is_leader():
            remove_tree(job.shared / COMPILED)  # nobody continues a finished run
        emit("done" if done else "stopped", step=trainer.step)
        status = 0 if done else STOPPED
        if trainer.trackers_hang:
            os._exit(status)  # their libraries would wait at exit for what does not answer
        return status
    except Exception as error:
        # JAX hands on what broke below it, a peer that is gone say, as a ValueError with the runtime's status before it
        foreseen = isinstance(error, ValueError | ArithmeticError | OSError) and not _RUNTIME_STATUS.match(str(error))
        if not foreseen:
            traceback.print_exc()  # the log needs the place
        emit_error(error, foreseen=foreseen)
        return 1


def train(job: TrainingJob, signals: Signals, began: float) -> Trainer:
    """Runs the job to its end or to a stop, over data that breaks it as often as the job allows."""
    while True:
        trainer = Trainer(job)
        signals.go_to(trainer)
        emit("start", **describe(trainer, time.perf_counter() - began))
        try:
            trainer.run()
            return trainer
        except NonFiniteLoss as error:
            trainer.close()
            go_back(trainer, error)
            trainer.state = None  # or the devices would hold it beside the one that is restored


def go_back(trainer: Trainer, error: NonFiniteLoss) -> None:
    """Writes down that the run goes on where it last was good, with other data: what came between is skipped (PaLM, section 5.1).

    Raises:
        NonFiniteLoss: that was done as often as `train.max_rollbacks` allows.
    """
    done, allowed = num_rollbacks(trainer.job.shared), trainer.job.train.max_rollbacks
    if done >= allowed:
        raise error
    step = trainer.last_good_step()
    rows = trainer.data.first_row(error.step) - trainer.data.first_row(step)
    try:
        trainer.data.loader.check_rows(trainer.data.first_row(trainer.last_step) + rows)
    except ValueError as over:
        tell(f"not going back over the {rows:,} rows since step {step}: {over}")
        raise error from None
    wait_for_all("all know how often it went back")
    if is_leader():
        skip_data(trainer.job.shared, step, rows, str(error))
    wait_for_all("what to skip is written")
    tell(f"{error}. Going back to step {step} and over the {rows:,} rows since then ({done + 1} of train.max_rollbacks={allowed})")


class Signals:
    """SIGTERM and SIGUSR1 as requests to the trainer; one that comes while it is being made waits for it."""

    def __init__(self) -> None:
        self._early: list[Request] = []  # appended to, never calculated with: a handler may interrupt anything
        self._trainer: Trainer | None = None
        signal.signal(signal.SIGTERM, lambda *_: self._ask(Request.STOP))
        signal.signal(signal.SIGUSR1, lambda *_: self._ask(Request.SAVE))
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which asks us to stop once

    def go_to(self, trainer: Trainer) -> None:
        """Hands on what came and what will come."""
        self._trainer = trainer
        for request in self._early:
            trainer.requests.ask(request)

    def _ask(self, request: Request) -> None:
        self._early.append(request)
        if self._trainer is not None:
            self._trainer.requests.ask(request)


def keep_compiled_programs(directory: Path) -> None:
    """Lets a run that is continued find the programs that it compiled before, unless JAX is told another place."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(directory / COMPILED))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def check_devices(train: SimpleTrainConfig) -> None:
    """Refuses to train on other devices than the slice that the job was planned for.

    Raises:
        ValueError: naming both.
    """
    if train.accelerator_type is None or os.environ.get(SIMULATED):
        return
    wanted, kind = slice_named(train.accelerator_type), jax.devices()[0].device_kind
    count = wanted.num_chips * train.slice_count
    if chip_of(kind) != CHIPS[wanted.generation] or jax.device_count() != count:
        raise ValueError(
            f"train.accelerator_type={train.accelerator_type!r} is {count} chips of TPU {wanted.generation}, and JAX sees "
            f"{jax.device_count()} device(s) of kind {kind!r} here: train there, or leave it unset to use what is here"
        )


def describe(trainer: Trainer, seconds: float) -> dict[str, Any]:
    """What the run decided, for the start-up report."""
    return {
        "start_step": trainer.step,
        "num_train_steps": trainer.last_step,
        "notes": trainer.notes,
        "skipped_checkpoints": trainer.checkpoints.skipped,
        "num_parameters": num_parameters(trainer.config),
        "mesh": dict(trainer.mesh.shape),
        "processes": jax.process_count(),
        "device_kind": jax.local_devices()[0].device_kind,
        "microbatches": trainer.batch.num_microbatches,
        "decayed": decayed_names(trainer.state.params),
        "held_out": list(trainer.mixture.validation_names()),
        "skipped_rows": sum(jump.rows for jump in read_skipped_data(trainer.job.shared)),
        "planned": trainer.data.loader.planned(trainer.last_step, trainer.origin),
        "origin": dataclasses.asdict(trainer.origin),
        "start_up_seconds": seconds,
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m model.training_process JOB.json")
    sys.exit(main(Path(sys.argv[1])))
