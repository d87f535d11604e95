"""The evaluation step: tasks of lm-eval on one trained model, wherever it lies, as an artifact with `results.json`."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from model.config_base import Config, runtime
from model.durable import sha256_of, write_json
from model.inference_jobs import HarnessJob
from model.model_place import find_model, model_digest
from tasks.artifacts import Artifact
from tasks.caching import StepOutput, step_task
from tasks.children import run_child
from tasks.progress import StepProgress
from tasks.steps import Step

RESULTS = "results.json"
_FINGERPRINT = re.compile(r"-[0-9a-f]{16}$")
_EXPORT = re.compile(r"hf(?:-step(-\d+))?")  # tasks.bucket_runs.STEP_EXPORT


class HarnessStep(Config):
    """What decides the numbers: the model and the tasks by content, how they are asked, and lm-eval's version."""

    model_sha256: str
    tasks: tuple[str, ...]
    task_files_sha256: str | None
    num_fewshot: int | None
    limit: int | None
    score_bos: bool
    lm_eval: str | None
    job: HarnessJob = runtime(..., description="What the process is told: also where model and tasks are now.")


def harness_step(job: HarnessJob) -> Step:
    """The step of one evaluation. A file that a task reads from outside `task_dir`, such as a dataset of the hub, is not part of it.

    Raises:
        ValueError: there is no model, or no directory of tasks; with the remedy.
    """
    place = find_model(job.model)
    if job.task_dir is not None and not job.task_dir.is_dir():
        raise ValueError(f"--task-dir={job.task_dir} is no directory: give the one that your task files (YAML) are in")
    config = HarnessStep(
        model_sha256=model_digest(place),
        tasks=job.tasks,
        task_files_sha256=None if job.task_dir is None else _files_digest(job.task_dir),
        num_fewshot=job.num_fewshot,
        limit=job.limit,
        score_bos=job.score_bos,
        lm_eval=_installed("lm_eval"),
        job=job.model_copy(update={"model": place, "task_dir": None if job.task_dir is None else job.task_dir.absolute()}),
    )
    return Step(kind="eval", name=model_name(place), config=config)


def model_name(place: Path) -> str:
    """The name of the run that a model is of, with the step of a checkpoint; of a model from elsewhere, its directory's."""
    run, step = (place.parent.parent, f"-{place.name}") if place.name.isdigit() else (place, "")
    if (exported := _EXPORT.fullmatch(run.name)) and _FINGERPRINT.search(run.parent.name):
        run, step = run.parent, exported[1] or ""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", _FINGERPRINT.sub("", run.name)).lstrip(".") or "model"
    return name[: 64 - len(step)] + step


def harness_body(step: Step, directory: Path, inputs: tuple[Artifact, ...]) -> StepOutput:
    """Runs the tasks in a child process and keeps its `results.json`; the metrics are in the manifest too.

    Raises:
        ChildFailed: the process named an error: no such task, a damaged model, lm-eval is not installed.
    """
    config = step.config
    assert isinstance(config, HarnessStep)
    with tempfile.TemporaryDirectory() as place:
        job_file = Path(place) / "job.json"
        write_json(job_file, config.job.model_dump(mode="json"))
        with _Shown(step.name) as shown:
            run_child("model.harness", [str(job_file), str(directory.absolute() / RESULTS)], shown.on_event)
    results = json.loads((directory / RESULTS).read_text(encoding="utf-8"))
    return StepOutput(stats={"metrics": results["metrics"]}, files=[directory / RESULTS])


class _Shown:
    """The progress of the harness process: one bar for the likelihoods, one for the texts."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._bars: dict[str, tuple[StepProgress, int]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> _Shown:
        return self

    def __exit__(self, *raised: Any) -> None:
        self._stack.__exit__(*raised)

    def on_event(self, event: dict[str, Any]) -> None:
        """Shows one event of the process."""
        if event.get("event") != "progress":
            return
        what, done = event["what"], int(event["done"])
        if what not in self._bars or done < self._bars[what][1]:  # the next kind of request has a count of its own
            bar = StepProgress(f"{self._name}: {what}", int(event["total"]), lambda count: f"{count:,.0f}")
            self._bars[what] = self._stack.enter_context(bar), 0
        bar, before = self._bars[what]
        bar.advance(done - before)
        self._bars[what] = bar, done


def _files_digest(directory: Path) -> str:
    files = sorted(path for path in directory.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    lines = [f"{path.relative_to(directory).as_posix()} {sha256_of(path)}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None  # the process says how to get it


evaluate_tasks = step_task(description="Run tasks of lm-eval")(harness_body)
