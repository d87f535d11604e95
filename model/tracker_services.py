"""The services behind `model.trackers`: W&B, TensorBoard, trackio. Each is opened, used and closed in one thread, its own."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from model.deliveries import ROW_BLOCK
from model.secret_text import without_secrets

ONLINE_SECONDS = 60  # an answer that W&B does not give by then is not waited for: the run is kept offline


def tracker_name(name: str, most: int = 64) -> str:
    """A run's name as a tracker takes it: at most `most` characters, cut in the middle, for arms of a sweep differ in their last ones."""
    return name if len(name) <= most else f"{name[: most // 2 - 2]}..{name[-(most // 2) :]}"


def _no_numbers(at_least: int) -> int:
    raise RuntimeError("the session has not begun")


@dataclass(frozen=True)
class Session:
    """What a service is opened with."""

    directory: Path
    run_id: str
    name: str
    tags: tuple[str, ...]
    config: Any
    tell: Callable[[str], None]
    first_step: int = 1  # rows from this step on will come, some perhaps for the second time
    reserve_rows: Callable[[int], int] = _no_numbers  # `Deliveries.reserve_rows` of this tracker

    def to_start_at(self, first_step: int, reserve_rows: Callable[[int], int]) -> Session:
        """The same with where it begins."""
        return dataclasses.replace(self, first_step=first_step, reserve_rows=reserve_rows)


class Service(Protocol):
    """One tracker. Its methods may raise, wait, or never return."""

    settle_seconds: float  # how long it may keep a row in memory, where a kill loses it

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Records the metrics of one step."""
        ...

    def flush(self) -> None:
        """Writes what it keeps in memory, where it can be made to."""
        ...

    def close(self) -> None:
        """Delivers everything."""
        ...


class Wandb:
    """Weights & Biases; without an API key, or an answer, everything is kept offline below the run's directory.

    The run's id is the fingerprint's, so every attempt continues the same run. W&B numbers rows itself and drops one whose number
    is not above the last; numbers come in reserved blocks, so that those of a new attempt are above those of a killed one.
    """

    settle_seconds = 30.0  # W&B's own process writes its file every 15 s, and ends unwritten when ours is killed

    def __init__(self, session: Session) -> None:
        import wandb

        self._wandb, self._reserve = wandb, session.reserve_rows
        self._row = self._end = 0
        online = bool(os.environ.get("WANDB_API_KEY")) and os.environ.get("WANDB_MODE") != "offline"
        options: Any = {
            "project": os.environ.get("WANDB_PROJECT", "prefect-llama"),
            "id": session.run_id,
            "name": tracker_name(session.name),
            "tags": list(session.tags),
            "config": session.config,
            "dir": str(session.directory),
            # Standard output is our events, one a step: W&B need not copy them.
            "settings": wandb.Settings(init_timeout=ONLINE_SECONDS, console="off"),
        }
        try:
            self._run = wandb.init(**options, mode="online" if online else "offline", resume="allow" if online else None)
        except Exception as error:
            if not online:
                raise
            where = session.directory / "wandb"
            session.tell(without_secrets(f"wandb does not answer ({error}): this run is kept offline below {where}; `wandb sync` sends it"))
            wandb.teardown()
            self._run = wandb.init(**options, mode="offline")
        # A custom x axis: W&B's own counts rows.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """One row."""
        if self._row == self._end:
            self._row = self._reserve(max(self._end, self._run.step))
            self._end = self._row + ROW_BLOCK
        self._run.log({"step": step, **metrics}, step=self._row, commit=True)
        self._row += 1

    def flush(self) -> None:
        """W&B cannot be asked to."""

    def close(self) -> None:
        """Waits until all is written, and sent where there is an account."""
        self._run.finish()
        # finish() may return while W&B's own process still writes its file; that process ends only when all is written.
        self._wandb.teardown()


class TensorBoard:
    """Event files in `tensorboard/`, one an attempt, written as they come.

    A file begins with the session start of its first step: TensorBoard then shows no older event of that step or a later one.
    """

    settle_seconds = 0.0

    def __init__(self, session: Session) -> None:
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        # Made at run time from the schema, so their classes are not known to a type checker.
        self._events: Any = event_pb2
        self._summaries: Any = summary_pb2
        directory = session.directory / "tensorboard"
        directory.mkdir(parents=True, exist_ok=True)
        # SummaryWriter would hand events to a thread of its own, whose flush does not wait for them. Files are read in order of
        # their names, which count seconds only.
        self._writer = EventsWriter(str(directory / "events"), filename_suffix=f".{time.time_ns()}")
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._write(session.first_step, session_log=start)
        config = json.dumps(session.config, indent=1, default=str)
        self._write(session.first_step, summary=summary.text("config", f"```\n{config}\n```"))

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """One event, with every number of the row."""
        summary, numbers = self._summaries.Summary, {key: value for key, value in metrics.items() if isinstance(value, int | float)}
        self._write(step, summary=summary(value=[summary.Value(tag=key, simple_value=number) for key, number in numbers.items()]))

    def _write(self, step: int, **what: Any) -> None:
        self._writer.write_event(self._events.Event(step=step, wall_time=time.time(), **what))

    def flush(self) -> None:
        """Everything is in the file when this returns."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        self._writer.close()


class Trackio:
    """trackio's local database, or the server that its environment variables name. It has no way to take rows back, so steps that
    are computed again after a resume are there twice, with equal values.
    """

    settle_seconds = 5.0  # a thread of its own writes every half second

    def __init__(self, session: Session) -> None:
        import trackio

        name = f"{tracker_name(session.name, 40)}-{session.run_id[:8]}"
        options: Any = {"auto_log_cpu": False, "auto_log_gpu": False, "embed": False}
        self._run = trackio.init(project="prefect-llama", name=name, config=session.config, resume="allow", **options)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """One row."""
        self._run.log(metrics, step=step)

    def flush(self) -> None:
        """trackio cannot be asked to."""

    def close(self) -> None:
        """Waits until all is written."""
        self._run.finish()


SERVICES: dict[str, Callable[[Session], Service]] = {"wandb": Wandb, "tensorboard": TensorBoard, "trackio": Trackio}
