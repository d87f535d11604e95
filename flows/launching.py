"""Starting runs of the flow train-llama in this process: Prefect's server, signals, and errors that need no traceback."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tasks.config import RunConfig
from tasks.presets import Preset

if TYPE_CHECKING:
    from tasks.artifacts import Artifact


def prepare_prefect() -> None:
    """Loads Prefect with a temporary server where there is no other, and makes SIGTERM what Ctrl-C is."""
    import flows.train_flow  # noqa: F401  (Prefect reads its settings here)
    from flows.temporary_server import use_temporary_server

    one_line_errors()
    use_temporary_server()
    # Prefect turns SIGTERM into an exception and, when the flow has ended, sends it again for the handler from before.
    signal.signal(signal.SIGTERM, interrupt)


def launch(
    config: RunConfig,
    root: str,
    only: str | None = None,
    force: Sequence[str] = (),
    *,
    preset_name: str | None = None,
    description: str = "",
) -> list[Artifact]:
    """Runs the flow with every part of a run; returns the artifacts of its steps, inputs first. Raises what the flow raises."""
    from flows.train_flow import train_llama

    parts = {field: getattr(config, field) for field in RunConfig.model_fields}
    lists = {field: list(parts[field]) for field in ("track", "tags")}
    chosen = {"root": root, "only": only, "force": list(force), "description": description}
    artifacts = train_llama(preset=Preset(preset_name or Preset.DEBUG), **{**parts, **lists, **chosen})
    assert isinstance(artifacts, list)  # Prefect's annotation covers flows that return states too
    return artifacts


def interrupt(number: int, _frame: Any) -> None:
    """A request to stop is answered like Ctrl-C."""
    raise KeyboardInterrupt


class _OneLine(logging.Filter):
    """Errors that explain themselves need no traceback in the terminal; the message says all."""

    def __init__(self, explained: tuple[type[BaseException], ...]) -> None:
        super().__init__()
        self._explained = explained

    def filter(self, record: logging.LogRecord) -> bool:
        """Cuts the traceback off."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, self._explained):
            record.exc_info = record.exc_text = None
        return True


def one_line_errors() -> None:
    """Makes Prefect log errors that explain themselves without a traceback."""
    from tasks.children import ChildFailed, ChildStopped
    from tasks.pipeline import StepsFailed

    explained = _OneLine((ValueError, OSError, ChildFailed, ChildStopped, StepsFailed, KeyboardInterrupt))
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(explained)
