"""The training loop: a step is started, the one before it is read, and what is due is done.

    trainer = Trainer(job)
    finished = trainer.run()

Everything periodic is a hook (`model.hooks`); what others may ask meanwhile, a request (`model.requests`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from model import partitioning
from model.bad_steps import TooManySkippedSteps, check_skipped_steps
from model.batch_arithmetic import BatchArithmetic
from model.batches import BatchLoader
from model.beginning import begin
from model.checkpoint import Checkpoints
from model.child import emit
from model.curves import curves_until, put_curves_back
from model.data_position import DataPosition
from model.distributed import is_leader, leaders_word, records_directory
from model.feed import BatchFeed
from model.hooks import Hook, make_hooks
from model.job import TrainingJob
from model.learning_rate import learning_rate_schedule
from model.memory import memory_metrics
from model.metrics import JsonLines, MetricsLog
from model.mixture_store import MixtureStore
from model.norms import named_norms
from model.profiler import Profiler
from model.requests import Request, Requests
from model.speed import Speedometer, run_constants
from model.trackers import CLOSE_SECONDS, open_trackers
from model.train_step import TrainState, compile_train_step
from model.watchdog import Watchdog

HURRIED_CLOSE_SECONDS = 5.0  # for trackers, where a preempted machine is about to vanish; the next attempt sends the rest


class NonFiniteLoss(ArithmeticError):
    """The loss or the gradient of `step` became NaN or infinite; the weights were not updated with it."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


class Trainer:
    """One run: its state, where it stands, and what it does besides stepping."""

    def __init__(self, job: TrainingJob) -> None:
        self.job = job
        self.watchdog = Watchdog(job.directory, minutes=job.train.watchdog_minutes, process_index=jax.process_index())
        self.mixture = MixtureStore.open(job.mixture)
        self.mixture.tokenizer.check()
        self.config = job.model.with_vocab(self.mixture.tokenizer.vocab_size)
        self.mesh = partitioning.make_mesh(**job.train.mesh_sizes)
        self.seq_len = job.train.seq_len_for(job.model)
        self.last_step = job.train.num_train_steps
        self.batch = BatchArithmetic.of(job.train, jax.device_count())  # of the largest batch
        self.requests = Requests(job.directory, self.mesh, minutes_between_saves=job.train.minutes_per_checkpoint)

        loader = BatchLoader(self.mixture, seq_len=self.seq_len, global_batch_size=job.train.train_batch_size, seed=job.train.loader_seed)
        self.checkpoints = Checkpoints(job.checkpoints, keep_every=job.train.steps_per_export, max_to_keep=job.train.max_checkpoints)
        self.state: Any
        self.state, jumps, where, self.notes, self.origin = begin(job, self.config, self.mesh, self.checkpoints, loader)
        self.first_step = self.step = self._dispatched = int(self.state.step)
        self.data = DataPosition(loader, partitioning.batch_sharding(self.mesh), jumps)
        self.data.check(where, self.step, self.last_step)
        self._pending: tuple[int, Any, Any] | None = None
        self._loading_seconds: dict[int, float] = {}

        self._open_records()
        self.feed = BatchFeed(self.data, first_step=self.step, end_step=self.last_step)
        self.hooks = make_hooks(self)
        self.speed = Speedometer(
            self.config, self.seq_len, loader.batch_sizes, first_step=self.step, last_step=self.last_step, origin=self.origin
        )
        emit("compiling")  # last: what can be refused is refused by now
        self._compiled = self._compile_steps()

    def _compile_steps(self) -> dict[int, jax.stages.Compiled]:
        """The step of every batch size that is still to come, by size, so that none compiles while the run goes."""
        train, divided = self.job.train, BatchArithmetic.by_size(self.job.train, jax.device_count())
        sizes = train.batch_schedule.sizes_from(self.step, self.last_step)
        if len(sizes) > 1:
            tell(f"train.train_batch_size is {train.batch_schedule}: the steps of all {len(sizes)} sizes are compiled before the first one")
        compiled: dict[int, jax.stages.Compiled] = {}
        for size in sizes:
            with self.watchdog.longer(f"compiling the step of {size} sequences"):
                count = divided[size].num_microbatches
                compiled[size] = compile_train_step(self.config, train, self.mesh, count, tell=tell, batch_size=size)
        return compiled

    def train_step(self, state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        """One step on a batch of any of the run's sizes; the state is donated."""
        return self._compiled[len(batch["tokens"])](state, batch)

    def _open_records(self) -> None:
        """The curves, the samples and the trackers, cut back to the step where the run goes on."""
        self.records = records_directory(self.job.directory)
        saved = self.checkpoints.curves() if self.job.bucket is not None else {}
        for name in put_curves_back(self.records, saved) if is_leader() else ():
            tell(f"{name} is restored from the checkpoint of step {self.step}")
        trackers = open_trackers(
            self.job.track if is_leader() else (),
            self.records,
            tell=tell,
            run_id=self.job.fingerprint[:16],
            name=self.job.name,
            tags=self.job.tags,
            config={**self.job.model_dump(mode="json"), **run_constants(self.config, self.seq_len)},
        )
        self.metrics = MetricsLog(self.records / "metrics.jsonl", self.step, trackers)
        self.samples = JsonLines(self.records / "samples.jsonl", self.step)
        train = self.job.train
        self.profiler = Profiler(
            self.records / "profile",
            enabled=train.profiler,
            start_step=train.profiler_start_step,
            num_steps=train.profiler_num_steps,
            tell=tell,
        )

    def progress(self) -> dict[str, Any]:
        """What a checkpoint records beside the arrays."""
        return {
            "step": self.step,
            "run": self.job.fingerprint,
            "config": self.job.identity_fields(),
            "data": self.data.state(self.step),
            "jumps": self.data.jumps,
            "origin": dataclasses.asdict(self.origin),
            "tokens": self.speed.tokens_until(self.step),
        }

    def curves(self) -> dict[str, str] | None:
        """The curves so far, where a checkpoint has to keep them: a slice's hosts and their disks are gone when it is preempted."""
        if self.job.bucket is None:
            return None
        return curves_until(self.job.directory, self.step) if is_leader() else {}

    def run(self) -> bool:
        """Trains to the last step. False when it was asked to stop, after saving."""
        self._make_up()
        while self._dispatched < self.last_step and self.requests.agreed != Request.STOP:
            self._dispatch_step()
            if self._due() or self._dispatched == self.first_step + 1:  # who waits for the first step need not wait for the second
                self._settle()
            self._run_hooks(self._due())  # once more: with the step's metrics came what others ask for
        self._settle()
        self.close()
        return self.step == self.last_step

    def _make_up(self) -> None:
        """Does what was due at the step of the checkpoint and is not in the records: a kill came between, or a cadence changed."""
        missed = [self.step > 0 and hook.due(self.step) and not hook.done(self.step) for hook in self.hooks]
        self._run_hooks([hook for hook, due in zip(self.hooks, missed, strict=True) if leaders_word(due)])
        self.speed.pause()

    def _dispatch_step(self) -> None:
        """Starts one step, then reads the one before it: the devices never wait for the log."""
        batch = self.feed.take()
        self._loading_seconds[self._dispatched + 1] = self.feed.waited_seconds
        self.state, metrics = self.train_step(self.state, batch)
        said = self.requests.say()
        self._dispatched += 1
        self._settle()
        self._pending = self._dispatched, metrics, said

    def _settle(self) -> None:
        """Waits for the metrics of the step that was started last, if they were not read yet."""
        if self._pending is not None:
            step, metrics, said = self._pending
            self._pending = None
            self._record(step, metrics)
            self.requests.hear(said)

    def _due(self) -> list[Hook]:
        return [hook for hook in self.hooks if hook.due(self._dispatched)]

    def _run_hooks(self, due: list[Hook]) -> None:
        for hook in due:
            with self.watchdog.longer(type(hook).__name__):
                hook.run(self)
        if due:
            self.speed.pause()

    def _record(self, step: int, metrics: dict[str, jax.Array]) -> None:
        logged = step % self.job.train.steps_per_log == 0 or step in (1, self.last_step)
        # The norms of single layers are arrays, fetched when they are written; all others are numbers.
        values = named_norms(jax.device_get({name: value for name, value in metrics.items() if logged or value.ndim == 0}))
        self.watchdog.beat(step)
        self.profiler.step_done()
        if not values.pop("finite"):
            self.metrics.sync()
            raise NonFiniteLoss(step, self._what_broke(step, values))
        try:
            check_skipped_steps(step, values, self.job.train)
        except TooManySkippedSteps:
            self.metrics.sync()
            raise
        self.step = step
        speed = self.speed.step_done(step, self._loading_seconds.pop(step))
        if logged:
            rate = {"optim/learning_rate": float(np.asarray(learning_rate_schedule(self.job.train)(step - 1)))}
            loader = {"throughput/loader_occupancy": self.feed.occupancy()}
            self.metrics.log(step, {**values, **rate, **speed, **self.speed.hook_time(), **loader, **memory_metrics()})
        emit(
            "progress",
            step=step,
            loss=values["train/loss"],
            tokens_per_second=self.speed.tokens_per_second,
            seconds_left=self.speed.seconds_left(step),
        )

    def _what_broke(self, step: int, values: dict[str, float]) -> str:
        if not values["train/tokens"]:
            return (
                f"step {step}, {self.data.describe(step - 1)}: no token of this batch counts for the loss, so there is nothing to learn "
                f"from: raise train.train_batch_size (now {self.job.train.batch_schedule}), or mix in data of which more counts"
            )
        return (
            f"step {step}, {self.data.describe(step - 1)}: loss {values['train/loss']}, gradient norm {values['grad/norm/total']}: not "
            f"finite, so the weights were not updated. It would go on from step {self.last_good_step()}; lower "
            f"train.learning_rate (now {self.job.train.learning_rate:g}), lengthen train.warmup, set train.z_loss_weight, or let it go on "
            f"without this data: train.max_rollbacks"
        )

    def last_good_step(self) -> int:
        """The step that the run would go back to: of its newest checkpoint, else the one it began at."""
        newest = self.checkpoints.latest_step()
        return self.first_step if newest is None else newest

    def close(self) -> None:
        """Closes what is open. The last checkpoint is committed first: who was asked to stop may soon be killed."""
        with self.watchdog.longer("the last save"):
            self.checkpoints.close()
            self.feed.close()
            self.samples.close()
            self.profiler.close()
            stopped = self.requests.agreed == Request.STOP
            self.trackers_hang = not self.metrics.close(HURRIED_CLOSE_SECONDS if stopped else CLOSE_SECONDS)
        self.watchdog.close()


def tell(message: str) -> None:
    """A message for the log of the run."""
    emit("message", text=message)
