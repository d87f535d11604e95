"""How a training run looks while it goes: a progress bar where there is a terminal, log lines where there is none,
and artifacts in the Prefect UI in both cases.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger
from rich.progress import Progress, TaskID, TextColumn

from model.job import TrainingJob
from tasks.formatting import duration, number
from tasks.progress import SharedDisplay, description_column, wide_bar

UI_SECONDS = 5.0
LOG_SECONDS = 1.0  # at most one log line in so much time

_display = SharedDisplay(
    description_column,
    wide_bar,
    lambda: TextColumn("step {task.completed:.0f}/{task.total:.0f}  loss {task.fields[loss]}"),
    lambda: TextColumn("{task.fields[speed]} tok/s  {task.fields[left]} left"),
)


class TrainingReport:
    """Follows the trainer's events. What it shows is a view: a Prefect API that is away never stops the training."""

    def __init__(self, job: TrainingJob) -> None:
        self.started: dict[str, Any] = {}
        self.step = 0
        self._job = job
        self._log = get_run_logger()
        self._bar: Progress | None = None
        self._bar_task = TaskID(0)
        self._progress_id: UUID | None = None
        self._shown_in_ui = self._shown_in_log = 0.0
        self._logged_step: int | None = None
        self._api_failed = False

    def __enter__(self) -> TrainingReport:
        self._progress_id = self._api(lambda: create_progress_artifact(0.0, key="train-progress", description=f"Training {self._job.name}"))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            _display.remove()

    def on_event(self, event: dict[str, Any]) -> None:
        """Shows one event of the trainer."""
        handler = {
            "start": self._on_start,
            "progress": self._on_progress,
            "eval": self._on_eval,
            "stopped": self._on_stopped,
            "message": self._on_message,
            "compiling": lambda _: self._log.info("compiling the training step"),
        }
        if (handle := handler.get(str(event.get("event")))) is not None:
            handle(event)

    def _on_start(self, event: dict[str, Any]) -> None:
        self.started = event
        self.step = event["start_step"]
        self._logged_step = None  # it may have gone back
        for skipped in event["skipped_checkpoints"]:
            self._log.warning(skipped)
        if self.step:
            self._log.info("resuming from the checkpoint of step %d, verified", self.step)
        for note in event["notes"]:
            self._log.warning(note)
        if event["skipped_rows"]:
            self._log.warning("%d rows of data that broke the training are left out", event["skipped_rows"])
        mesh = " x ".join(f"{axis} {size}" for axis, size in event["mesh"].items())
        self._log.info(
            "%s parameters on %s, mesh %s, %d microbatch(es); decayed: %s",
            number(event["num_parameters"]),
            event["device_kind"],
            mesh,
            event["microbatches"],
            ", ".join(event["decayed"]),
        )

        for name, planned in event["planned"].items():
            self._log.info("%s: %s tokens, %.3g epochs of it", name, number(planned["tokens"]), planned["epochs"])
        if not event["held_out"]:
            self._log.warning("no dataset has held-out documents, so there is no held-out loss: give one a holdout above 0")
        # Last, so that nothing of the above is written across the bar.
        self._start_bar()

    def _start_bar(self) -> None:
        if self._bar is not None:  # it went back to a checkpoint
            self._bar.update(self._bar_task, completed=self.step)
            return
        label, total = f"train {self._job.name}", self._job.train.num_train_steps
        shown = _display.add(label, total, self.step, loss="-", speed="-", left="?")
        if shown is not None:
            self._bar, self._bar_task = shown

    def _on_progress(self, event: dict[str, Any]) -> None:
        self.step = event["step"]
        speed = number(event["tokens_per_second"]) if event["tokens_per_second"] else "-"
        left = duration(event["seconds_left"]) if event["seconds_left"] is not None else "?"
        loss = f"{event['loss']:.4f}"
        if self._bar is not None:
            self._bar.update(self._bar_task, completed=self.step, loss=loss, speed=speed, left=left)
        now = time.monotonic()
        total = self._job.train.num_train_steps
        if self._bar is None and (self._log_due(now) or self.step == total):
            self._shown_in_log, self._logged_step = now, self.step
            self._log.info("step %d/%d  loss %s  %s tok/s  %s left", self.step, total, loss, speed, left)
        if self._progress_id is not None and (now - self._shown_in_ui > UI_SECONDS or self.step == total):
            self._shown_in_ui = now
            progress_id, percent = self._progress_id, 100.0 * self.step / total
            self._api(lambda: update_progress_artifact(progress_id, progress=percent))

    def _log_due(self, now: float) -> bool:
        """One line every `steps_per_log` steps, and for the first; of fast steps fewer."""
        every = self._job.train.steps_per_log
        new = self._logged_step is None or self.step // every > self._logged_step // every
        return new and now - self._shown_in_log >= LOG_SECONDS

    def _on_eval(self, event: dict[str, Any]) -> None:
        text = f"step {event['step']} held-out: {held_out_line(event['metrics'])}"
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            self._log.info(text)

    def _on_message(self, event: dict[str, Any]) -> None:
        self._log.warning(str(event["text"]))

    def _on_stopped(self, event: dict[str, Any]) -> None:
        self.step = event["step"]

    def _api(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            if not self._api_failed:
                self._api_failed = True
                logging.getLogger(__name__).warning("the Prefect API does not take artifacts (%s); training goes on", error)
            return None


def held_out_line(metrics: dict[str, float]) -> str:
    """`5.1769 nats per token, 2.5562 bits per byte (plays 5.1739 2.5622, sonnets 5.2156 2.4968)`."""
    parts = []
    for key in (key for key in metrics if key.endswith("/loss") and key.count("/") == 2):
        name = key.split("/")[1]
        bits = metrics.get(f"eval/{name}/bpb")
        parts.append(f"{name} {metrics[key]:.4f}" + ("" if bits is None else f" {bits:.4f}"))
    bits = metrics.get("eval/bpb")
    together = f"{metrics['eval/loss']:.4f} nats per token" + ("" if bits is None else f", {bits:.4f} bits per byte")
    return f"{together} ({', '.join(parts)})"
