"""Experiment trackers on request: Weights & Biases, TensorBoard, trackio. None can stop or fail a training run."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

TrackerName = Literal["wandb", "tensorboard", "trackio"]
PACKAGES: dict[str, str] = {"wandb": "wandb", "tensorboard": "tensorboardX", "trackio": "trackio"}

# A training run does not wait longer for a service that only watches it.
ONLINE_SECONDS = 20

_logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Where metrics go besides metrics.jsonl."""

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Records the metrics of one step."""
        ...

    def close(self) -> None:
        """Flushes what is pending."""
        ...


def check_trackers(names: tuple[TrackerName, ...]) -> None:
    """Refuses a tracker whose package is missing, before any work starts.

    Raises:
        ValueError: naming the package and the extra that installs it.
    """
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ValueError(
                f"track={name!r} needs the package {PACKAGES[name]!r}, which is not installed: pip install 'prefect-llama[track]'"
            )


def open_trackers(
    names: tuple[TrackerName, ...],
    directory: Path,
    *,
    run_id: str,
    name: str,
    tags: tuple[str, ...],
    config: Any,
    tell: Callable[[str], None] = _logger.warning,
) -> list[Tracker]:
    """The trackers asked for, each wrapped so that its failure is one message to `tell`, not the end of the run."""
    openers = {"wandb": _Wandb, "tensorboard": _TensorBoard, "trackio": _Trackio}
    opened: list[Tracker] = []
    for tracker in names:
        try:
            inner = openers[tracker](directory, run_id=run_id, name=name, tags=tags, config=config, tell=tell)
            opened.append(_Careful(tracker, tell, inner))
        except Exception as error:
            tell(f"{tracker} did not start ({error}): metrics go on to metrics.jsonl")
    return opened


class _Careful:
    """Passes calls on until one fails, then says so once and stays quiet."""

    def __init__(self, name: str, tell: Callable[[str], None], inner: Tracker) -> None:
        self._name, self._tell, self._inner = name, tell, inner
        self._broken = False

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        self._call("log", step, metrics)

    def close(self) -> None:
        self._call("close")

    def _call(self, method: str, *args: Any) -> None:
        if self._broken:
            return
        try:
            getattr(self._inner, method)(*args)
        except Exception as error:
            self._broken = True
            self._tell(f"{self._name} stopped working ({error}): metrics go on to metrics.jsonl")


class _Wandb:
    """Weights & Biases; without an API key, or an answer, everything is kept offline below the run's directory."""

    def __init__(self, directory: Path, *, run_id: str, name: str, tags: tuple[str, ...], config: Any, tell: Callable[[str], None]) -> None:
        import wandb

        self._wandb = wandb
        online = bool(os.environ.get("WANDB_API_KEY")) and os.environ.get("WANDB_MODE") != "offline"
        options: Any = {
            "project": os.environ.get("WANDB_PROJECT", "prefect-llama"),
            "id": run_id,
            "name": name[:64],
            "tags": list(tags),
            "config": config,
            "dir": str(directory),
            "settings": wandb.Settings(init_timeout=ONLINE_SECONDS),
        }
        try:
            self._run = wandb.init(**options, mode="online" if online else "offline", resume="allow" if online else None)
        except Exception as error:
            if not online:
                raise
            tell(f"wandb does not answer ({error}): this run is kept offline below {directory / 'wandb'}; `wandb sync` sends it")
            wandb.teardown()
            self._run = wandb.init(**options, mode="offline")
        # A custom x axis: W&B drops rows whose own step went backwards, as after a resume.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish()
        # finish() may return while W&B's own process still writes its file; that process ends only when all is written.
        self._wandb.teardown()


class _TensorBoard:
    def __init__(self, directory: Path, *, run_id: str, name: str, tags: tuple[str, ...], config: Any, tell: Callable[[str], None]) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(directory / "tensorboard"))

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        for key, value in metrics.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _Trackio:
    def __init__(self, directory: Path, *, run_id: str, name: str, tags: tuple[str, ...], config: Any, tell: Callable[[str], None]) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(project="prefect-llama", name=f"{name[:40]}-{run_id[:8]}", config=config, resume="allow")

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        self._trackio.log(metrics, step=step)

    def close(self) -> None:
        self._trackio.finish()
