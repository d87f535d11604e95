"""Evaluating a run's checkpoints by lm-eval while it trains and after it: which are due, in flow runs of their own, none forgotten."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from model.checkpoint_files import steps_in
from model.inference_jobs import HarnessJob
from model.secret_text import without_secrets
from tasks.artifacts import Artifact, brought_here
from tasks.bucket_runs import model_here
from tasks.children import ChildStopped
from tasks.config import RunConfig
from tasks.obligations import Ledger, Obligation, due_steps
from tasks.places import Place

RESULTS = "results.json"


class ObligationsLeft(ValueError):
    """A run whose training is done, and which still owes an evaluation that failed."""


def check_eval_harness(config: RunConfig) -> None:
    """Refuses evaluations that could not be made. Raises ValueError with the remedy."""
    harness, train = config.eval_harness, config.train
    if not harness.tasks:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(f"eval_harness.tasks={harness.tasks} need lm-eval, which is not installed: pip install 'prefect-llama[eval]'")
    if harness.task_dir is not None and not harness.task_dir.is_dir():
        raise ValueError(f"eval_harness.task_dir={harness.task_dir} is no directory: give the one that your task files (YAML) are in")
    if harness.steps >= train.num_train_steps:
        return
    if harness.steps % train.steps_per_export:
        raise ValueError(
            f"eval_harness.steps={harness.steps} is no multiple of train.steps_per_export={train.steps_per_export}, so there would be no "
            "checkpoint to evaluate: make it one"
        )
    if train.max_checkpoints is not None:
        raise ValueError(
            f"train.max_checkpoints={train.max_checkpoints} may remove checkpoints before they are evaluated every "
            f"eval_harness.steps={harness.steps}: leave it out, or set eval_harness.steps to train.num_train_steps or more"
        )


class Evaluations:
    """The evaluations of one run. `evaluate` runs one job of lm-eval as a flow run of its own."""

    def __init__(
        self, run: Place, config: RunConfig, evaluate: Callable[[HarnessJob], Artifact], tell: Callable[[str], None], *, beside: bool
    ) -> None:
        """`run`: the run's directory. `beside`: whether this machine's devices are free while the training goes on."""
        self._run, self._config, self._evaluate, self._tell, self._beside = run, config, evaluate, tell, beside
        self._tried: set[Any] = set()

    def while_training(self) -> None:
        """Evaluates what is due by now. What fails is told and kept: it never stops the training."""
        # in a bucket a run is evaluated by its export, which comes last
        if self._beside and isinstance(self._run, Path) and self._reached():
            self._work_off()

    def at_the_end(self) -> list[dict[str, Any]]:
        """Evaluates all that is left, of earlier starts too; the rows of all evaluations of the run.

        Raises:
            ObligationsLeft: some failed; the next start of the run tries them again.
        """
        self._work_off()
        ledger = Ledger(self._run)
        if ledger.due:
            why = "; ".join(f"step {one.step}: {one.error}" for one in ledger.due)
            raise ObligationsLeft(f"{self._config.name} is trained, but evaluations failed ({why}): the same command tries them again")
        return ledger.rows()

    def _reached(self) -> list[int]:
        """The steps to evaluate that a checkpoint has reached."""
        due = due_steps(self._config.eval_harness, self._config.train.num_train_steps)
        if not isinstance(self._run, Path):
            return due[-1:]
        newest = max(steps_in(self._run / "checkpoints"), default=0)
        return [step for step in due if step <= newest]

    def _work_off(self) -> None:
        ledger = Ledger(self._run)
        ledger.owe(self._reached(), self._config.eval_harness)
        for one in ledger.due:
            if one.key in self._tried:
                continue
            self._tried.add(one.key)
            try:
                metrics = self._metrics(one)
            except ChildStopped:
                raise
            except Exception as error:  # whatever it was: it is owed still, and the training goes on
                ledger.failed(one, without_secrets(str(error))[:500])
                self._tell(f"the evaluation of step {one.step} failed: {without_secrets(str(error))[:500]}")
            else:
                ledger.met(one, metrics)

    def _metrics(self, one: Obligation) -> dict[str, float]:
        """The numbers of one checkpoint, each group of tasks with as many examples as it asks for."""
        metrics: dict[str, float] = {}
        groups = one.harness.by_num_fewshot()
        for shots, names in groups.items():
            job = HarnessJob(
                model=self._model(one.step), tasks=names, task_dir=one.harness.task_dir, num_fewshot=shots, limit=one.harness.limit
            )
            results = Path(brought_here(self._evaluate(job)).path) / RESULTS
            found = json.loads(results.read_text(encoding="utf-8"))["metrics"]
            metrics |= dict(_named(found, shots, alone=len(groups) == 1))
        return metrics

    def _model(self, step: int) -> Path:
        if not isinstance(self._run, Path):
            return model_here(str(self._run))
        place = self._run / "checkpoints" / str(step)
        if not place.is_dir():
            raise ValueError(f"its checkpoint {place} is gone: train again with --force checkpoints/{self._config.name}")
        return place


def _named(found: dict[str, float], shots: int | None, *, alone: bool) -> Iterator[tuple[str, float]]:
    """The metrics with the number of examples in the task's name, where it was asked for; averages only where they are of all tasks."""
    for name, value in found.items():
        lm_eval, task, metric = name.split("/", 2)
        if task == "averages":
            if alone:
                yield name, value
        else:
            yield (name if shots is None else f"{lm_eval}/{task}_{shots}shot/{metric}"), value
