"""The training process: `python -m model.trainer JOB.json`.

Reads a TrainingJob, continues from its newest verified checkpoint, and speaks in JSON lines on standard output.
Exit status: 0 the last checkpoint is committed, 75 stopped by a signal after saving, 1 an error that was named.
"""

from __future__ import annotations

import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import jax
import numpy as np

from model import partitioning
from model.batch_arithmetic import BatchArithmetic
from model.batches import BatchLoader, EvalBatches
from model.checkpoint import Checkpoints
from model.child import STOPPED, die_with_parent, emit
from model.feed import BatchFeed
from model.flops import CHIPS, chip_of, num_parameters
from model.hooks import CheckpointHook, EvaluateHook, Hook, SampleHook
from model.job import TrainingJob
from model.metrics import JsonLines, MetricsLog
from model.mixture_store import MixtureStore
from model.optimizer import decayed_names, learning_rate_schedule
from model.plots import write_loss_plots
from model.slices import slice_named
from model.speed import Speedometer
from model.trackers import open_trackers
from model.train_config import SimpleTrainConfig
from model.train_step import TrainState, abstract_state, compile_train_step, init_state


class NonFiniteLoss(ArithmeticError):
    """The loss or the gradient became NaN or infinite; the weights were not updated with it."""


class Trainer:
    """One run: its state, where it stands, and what it does besides stepping."""

    def __init__(self, job: TrainingJob) -> None:
        self.job = job
        check_devices(job.train)
        self.mixture = MixtureStore.open(job.mixture)
        self.mixture.tokenizer.check()
        self.config = job.model.with_vocab(self.mixture.tokenizer.vocab_size)
        self.mesh = partitioning.make_mesh(**job.train.mesh_sizes)
        self.seq_len = job.train.seq_len_for(job.model)
        self.last_step = job.train.num_train_steps
        self.stop_requested = False

        self.loader = BatchLoader(
            self.mixture,
            seq_len=self.seq_len,
            global_batch_size=job.train.train_batch_size,
            seed=job.train.loader_seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        self.checkpoints = Checkpoints(job.directory / "checkpoints", max_to_keep=job.train.max_checkpoints)
        self.state = self._restore_or_init()
        self.step = self._dispatched = int(self.state.step)
        self._pending: tuple[int, Any] | None = None
        self._loading_seconds: dict[int, float] = {}

        trackers = open_trackers(
            job.track,
            job.directory,
            tell=_tell,
            run_id=job.fingerprint[:16],
            name=job.name,
            tags=job.tags,
            config=job.model_dump(mode="json"),
        )
        self.metrics = MetricsLog(job.directory / "metrics.jsonl", self.step, trackers)
        self._samples = JsonLines(job.directory / "samples.jsonl", self.step)
        self.feed = BatchFeed(self.loader, partitioning.batch_sharding(self.mesh), first_step=self.step, end_step=self.last_step)
        self.microbatches = BatchArithmetic.of(job.train, jax.device_count()).num_microbatches
        self.hooks = self._make_hooks()
        self.speed = Speedometer(
            self.config, self.seq_len, self.seq_len * job.train.train_batch_size, first_step=self.step, last_step=self.last_step
        )
        emit("compiling")  # last: what can be refused is refused by now
        self.train_step = compile_train_step(self.config, job.train, self.mesh, self.microbatches, tell=_tell)

    def _restore_or_init(self) -> TrainState:
        if self.checkpoints.latest_step() is None:
            return init_state(self.config, self.job.train, self.mesh)
        state, progress = self.checkpoints.restore(abstract_state(self.config, self.job.train, self.mesh))
        if progress["run"] != self.job.fingerprint:
            raise ValueError(
                f"the checkpoint of step {progress['step']} in {self.checkpoints.directory} belongs to run {progress['run'][:16]}, "
                f"not to this run {self.job.fingerprint[:16]}: move it away"
            )
        self.loader.check_state(progress.get("data", {}), progress["step"])
        return TrainState(*state)

    def _make_hooks(self) -> list[Hook]:
        train = self.job.train
        held_out = [
            EvalBatches(
                self.mixture,
                name,
                seq_len=self.seq_len,
                # What fits the devices in training fits them in evaluation.
                batch_size=train.train_batch_size // self.microbatches,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
            for name in self.mixture.validation_names()
        ]
        evaluation = [EvaluateHook(train.steps_per_eval, held_out, train.max_eval_batches, self)] if held_out else []
        return [
            *evaluation,
            SampleHook(train.steps_per_sample, self._samples, self.mixture.tokenizer.path, self),
            CheckpointHook(train.steps_per_export, self.checkpoints, self._samples),
        ]

    def progress(self) -> dict[str, Any]:
        """What a checkpoint records beside the arrays: the data position is the step itself."""
        return {"step": self.step, "run": self.job.fingerprint, "data": self.loader.state(self.step)}

    def run(self) -> bool:
        """Trains to the last step. False when a signal stopped it, after saving."""
        self.speed.pause()
        while self._dispatched < self.last_step and not self.stop_requested:
            self._dispatch_step()
            due = [hook for hook in self.hooks if hook.due(self._dispatched, self.last_step)]
            if due:
                self._settle()
                for hook in due:
                    hook.run(self)
                self.speed.pause()
        self._settle()
        return self._finish()

    def _dispatch_step(self) -> None:
        """Starts one step, then reads the one before it: the devices never wait for the log."""
        batch = self.feed.take()
        self._loading_seconds[self._dispatched + 1] = self.feed.waited_seconds
        self.state, metrics = self.train_step(self.state, batch)
        self._dispatched += 1
        self._settle()
        self._pending = self._dispatched, metrics

    def _settle(self) -> None:
        """Waits for the metrics of the step that was started last, if they were not read yet."""
        if self._pending is not None:
            self._record(*self._pending)
            self._pending = None

    def _record(self, step: int, metrics: dict[str, jax.Array]) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        if not values.pop("finite"):
            self.metrics.sync()
            raise NonFiniteLoss(
                f"step {step}: loss {values['train/loss']}, gradient norm {values['grad/norm/total']}: not finite, so the weights were not "
                f"updated. The last good checkpoint is step {self.checkpoints.latest_step()}; lower train.learning_rate "
                f"(now {self.job.train.learning_rate:g}), lengthen train.warmup, or set train.z_loss_weight"
            )
        self.step = step
        speed = self.speed.step_done(step, self._loading_seconds.pop(step))
        if step % self.job.train.steps_per_log == 0 or step in (1, self.last_step):
            rate = float(np.asarray(learning_rate_schedule(self.job.train)(step - 1)))
            loader = {"throughput/loader_occupancy": self.feed.occupancy()}
            self.metrics.log(step, {**values, "optim/learning_rate": rate, **speed, **loader})
        emit(
            "progress",
            step=step,
            loss=values["train/loss"],
            tokens_per_second=self.speed.tokens_per_second,
            seconds_left=self.speed.seconds_left(step),
        )

    def _finish(self) -> bool:
        done = self.step == self.last_step
        if not done:
            CheckpointHook(1, self.checkpoints, self._samples).run(self)
        self.metrics.close()
        self._samples.close()
        write_loss_plots(self.job.directory, title=self.job.name, unigram_entropy=self.mixture.unigram_entropy)
        self.checkpoints.close()
        self.feed.close()
        return done


def _tell(message: str) -> None:
    emit("message", text=message)


def check_devices(train: SimpleTrainConfig) -> None:
    """Refuses to train on other devices than the slice that the job was planned for.

    Raises:
        ValueError: naming both.
    """
    if train.accelerator_type is None:
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
        "skipped_checkpoints": trainer.checkpoints.skipped,
        "num_parameters": num_parameters(trainer.config),
        "mesh": dict(trainer.mesh.shape),
        "device_kind": jax.local_devices()[0].device_kind,
        "microbatches": trainer.microbatches,
        "decayed": decayed_names(trainer.state.params),
        "held_out": list(trainer.mixture.validation_names()),
        "planned": trainer.loader.planned(trainer.last_step),
        "start_up_seconds": seconds,
    }


def main(job_file: Path) -> int:
    """Runs one job; returns the exit status."""
    die_with_parent()
    began = time.perf_counter()
    stop: list[Trainer] = []
    early = {"requested": False}

    def request_stop(number: int, _frame: Any) -> None:
        early["requested"] = True
        for trainer in stop:
            trainer.stop_requested = True

    signal.signal(signal.SIGTERM, request_stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which asks us to stop once
    try:
        trainer = Trainer(TrainingJob.model_validate_json(job_file.read_text(encoding="utf-8")))
        stop.append(trainer)
        trainer.stop_requested = early["requested"]
        emit("start", **describe(trainer, time.perf_counter() - began))
        done = trainer.run()
        emit("done" if done else "stopped", step=trainer.step)
        return 0 if done else STOPPED
    except Exception as error:
        if not isinstance(error, ValueError | ArithmeticError | OSError):
            traceback.print_exc()  # nothing we foresaw: the log needs the place
        emit("error", message=str(error), type=type(error).__name__)
        return 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m model.trainer JOB.json")
    sys.exit(main(Path(sys.argv[1])))
