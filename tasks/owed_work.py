"""What a run does besides training: exports and evaluations of its checkpoints, the push of its last export. None is forgotten."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.inference_jobs import HarnessJob
from model.secret_text import without_secrets
from tasks.artifacts import Artifact, brought_here
from tasks.bucket_runs import STEP_EXPORT, model_here
from tasks.checkpoint_exports import saved_steps
from tasks.children import ChildStopped
from tasks.config import ExportConfig, RunConfig
from tasks.eval_harness import due_steps, evaluated
from tasks.obligations import Evaluation, Export, Ledger, Obligation, Push, row_of
from tasks.places import Place, working_directory

BUCKET_SECONDS = 30.0  # between two looks for checkpoints in a bucket, each of which is a request or more
FAILED_SECONDS = 300.0  # after one that failed


class ObligationsLeft(ValueError):
    """A run whose training is done, and which still owes something that failed."""


@dataclass(frozen=True)
class Workers:
    """How each kind of work is done; every one raises what it fails with."""

    evaluate: Callable[[HarnessJob], Artifact]
    """Runs one job of lm-eval, as a flow run of its own."""
    export: Callable[[int, ExportConfig], Artifact]
    """Makes the Hugging Face directory of one step's checkpoint."""
    push: Callable[[str], str]
    """Sends the last export to a repository; where the commit can be seen."""
    track: Callable[[list[dict[str, Any]]], bool]
    """Hands rows to the run's trackers; whether all took them."""


class OwedWork:
    """The obligations of one run, met as its checkpoints come and at its end."""

    def __init__(
        self,
        run: Place,
        config: RunConfig,
        export: ExportConfig,
        workers: Workers,
        tell: Callable[[str], None],
        *,
        beside: bool,
        exports_last: bool = True,
    ) -> None:
        """`run`: the run's directory. `export`: how exports are made. `beside`: whether this machine's devices are free meanwhile.

        exports_last: whether the export step takes part, so that there is something to push.
        """
        self._run, self._config, self._export, self._workers, self._tell = run, config, export, workers, tell
        self._beside, self._exports_last = beside, exports_last
        self._tried: set[Any] = set()
        self._saved: set[int] = set()
        self._next_look = 0.0

    def while_training(self) -> None:
        """Does what is due by now. What fails is told and kept: it never stops the training."""
        if not self._beside or not self._asks_for_something() or time.monotonic() < self._next_look:
            return
        if not isinstance(self._run, Path):
            self._next_look = time.monotonic() + BUCKET_SECONDS
        try:
            # in a bucket the last step is evaluated by its export, which comes later
            if reached := list(self._reached(last=isinstance(self._run, Path))):
                self._work_off(reached, pushes=False)
        except (OSError, ValueError) as error:  # the place or the ledger: at the end it has to be there
            self._next_look = time.monotonic() + FAILED_SECONDS
            self._tell(f"what {self._config.name} owes waits: {without_secrets(str(error))[:500]}")

    def at_the_end(self) -> list[dict[str, Any]]:
        """Does all that is left, of earlier starts too; the rows of all evaluations of the run.

        Raises:
            ObligationsLeft: some failed; the next start of the run tries them again.
        """
        reached = list(self._reached(last=True))
        if self._export.hub_repo_id is not None and self._exports_last:
            reached.append(Push(step=self._config.train.num_train_steps, export=self._export))
        ledger = self._work_off(reached, pushes=True)
        self._track(ledger)
        if ledger.due:
            failed = "; ".join(f"{described(one)}: {one.error}" for one in ledger.due)
            raise ObligationsLeft(f"{self._config.name} is trained, but this failed: {failed}. The same command tries it again")
        return ledger.rows()

    def _asks_for_something(self) -> bool:
        return bool(self._config.eval_harness.tasks or self._config.train.hf_export_steps)

    def _reached(self, *, last: bool) -> Iterator[Obligation]:
        """What is owed for the checkpoints that are there, with or without the last step."""
        train, harness = self._config.train, self._config.eval_harness
        if not self._asks_for_something():
            return
        self._saved = {*saved_steps(self._run, self._saved)}
        # an earlier start may have saved at other steps: what was never there is not owed
        plain = self._export.model_copy(update={"hub_repo_id": None})
        yield from (Export(step=step, export=plain) for step in train.hf_export_steps if step in self._saved)
        newest = max(self._saved, default=0)
        due = [step for step in due_steps(harness, train.num_train_steps) if last or step != train.num_train_steps]
        yield from (Evaluation(step=step, harness=harness) for step in due if step <= newest)

    def _work_off(self, reached: list[Obligation], *, pushes: bool) -> Ledger:
        ledger = Ledger(self._run)
        ledger.owe(reached)
        for one in ledger.due:
            if one.key in self._tried or (isinstance(one, Push) and not pushes):
                continue
            self._tried.add(one.key)
            try:
                done = self._met(one)
            except ChildStopped:
                raise
            except Exception as error:  # whatever it was: it is owed still, and the training goes on
                said = without_secrets(str(error))[:500]
                ledger.keep(one.model_copy(update={"error": said}))
                self._tell(f"{described(one)} failed: {said}")
            else:
                ledger.keep(done.model_copy(update={"error": None}))
                self._drop_copy(one.step, ledger)
        return ledger

    def _met(self, one: Obligation) -> Obligation:
        match one:
            case Evaluation():
                return one.model_copy(update={"metrics": evaluated(one.harness, self._model(one.step), self._workers.evaluate)})
            case Export():
                if isinstance(self._run, Path):
                    _checkpoint(self._run, one.step, self._config.name)
                return one.model_copy(update={"place": self._workers.export(one.step, one.export).path})
            case Push():
                assert one.export.hub_repo_id is not None
                return one.model_copy(update={"commit": self._workers.push(one.export.hub_repo_id)})

    def _model(self, step: int) -> Path:
        """What is evaluated: the checkpoint or, in a bucket, its export."""
        if isinstance(self._run, Path):
            return _checkpoint(self._run, step, self._config.name)
        if step == self._config.train.num_train_steps:
            return model_here(str(self._run))
        return Path(brought_here(self._workers.export(step, self._export.model_copy(update={"hub_repo_id": None}))).path)

    def _drop_copy(self, step: int, ledger: Ledger) -> None:
        """An export in a bucket needs no disk of this machine once nothing is left to do with it."""
        if not isinstance(self._run, Path) and not any(one.step == step for one in ledger.due):
            shutil.rmtree(working_directory(self._run / f"{STEP_EXPORT}{step}"), ignore_errors=True)

    def _track(self, ledger: Ledger) -> None:
        """A tracker's run has one writer: the trainer until it ends, then this."""
        new = [one for one in ledger.evaluations if not one.tracked]
        if new and self._config.track and self._workers.track([row_of(one) for one in new]):
            for one in new:
                ledger.keep(one.model_copy(update={"tracked": True}))


def described(one: Obligation) -> str:
    """How a person names it."""
    match one:
        case Evaluation():
            return f"the evaluation of step {one.step}"
        case Export():
            return f"the export of step {one.step}"
        case Push():
            return f"the push of its export to {one.export.hub_repo_id}"


def _checkpoint(run: Path, step: int, name: str) -> Path:
    place = run / "checkpoints" / str(step)
    if not place.is_dir():
        raise ValueError(f"its checkpoint {place} is gone: train again with --force checkpoints/{name}")
    return place
