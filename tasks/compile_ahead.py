"""Compiling ahead: what preflight left open is compiled here while a run waits for its slice, and what will not fit is said early."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from logging import Logger, LoggerAdapter
from pathlib import Path
from typing import Any

from model.child import child_environment
from model.config import LlamaConfig
from model.durable import write_json
from model.train_config import SimpleTrainConfig
from tasks.preflight import DOES_NOT_FIT, FITS


class CompileAhead:
    """The evaluation of one job, compiled in a child process beside whatever else this process does; `look` tells what came out.

    with CompileAhead(name, model, train, log) as ahead:
        while waiting:
            ahead.look()
    """

    def __init__(self, name: str, model: LlamaConfig, train: SimpleTrainConfig, log: Logger | LoggerAdapter[Any]) -> None:
        """model: with its vocabulary. train: with the slice in `accelerator_type` and `slice_count`, divided as it will run."""
        self._log = log
        self._directory = tempfile.TemporaryDirectory(prefix="compile-ahead-")
        place = Path(self._directory.name)
        job_file, self._output, self._errors = place / "job.json", place / "stdout", place / "stderr"
        write_json(job_file, {"name": name, "model": model.model_dump(mode="json"), "train": train.model_dump(mode="json")})
        command = [sys.executable, "-m", "model.preflight", "--job", str(job_file), "--evaluation"]
        with self._output.open("wb") as output, self._errors.open("wb") as errors:
            self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                command, stdout=output, stderr=errors, env=child_environment() | {"COLUMNS": "500"}
            )
        log.info("compiling the evaluation of %s for %s while the run waits for its slice", name, train.accelerator_type)

    def __enter__(self) -> CompileAhead:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        self._directory.cleanup()

    def look(self) -> None:
        """Logs the outcome once it is there: a warning where the evaluation does not fit, or nothing can be said of it."""
        if self._process is None or (status := self._process.poll()) is None:
            return
        self._process = None
        said = self._output.read_text(encoding="utf-8").strip()
        if status == FITS:
            self._log.info(said)
        elif status == DOES_NOT_FIT:
            self._log.warning(said)
        else:
            errors = self._errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            self._log.warning("whether the evaluation fits is not known: %s", errors[-1] if errors else f"exit status {status}")
